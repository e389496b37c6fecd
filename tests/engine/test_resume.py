"""Finding and reading the checkpoint to resume from."""

import os
import re
from types import SimpleNamespace

import pytest
import torch
from mmengine.config import Config
from mmengine.optim import MultiStepLR, OptimWrapper

from mmdense.config.read import load_config
from mmdense.engine.resume import (
    compare_settings,
    find_training,
    read_training,
    use_checkpoint,
)
from mmdense.errors import UserError
from support import ROOT

COCO = str(ROOT / 'configs/detection/rdnet/faster-rcnn_rdnet-t_fpn_1x_coco.py')


def training(file, iteration=1, **more):
    """Write a checkpoint of a training, dated by its iteration."""
    weights = dict(w=torch.arange(5000.0))
    checkpoint = dict(meta=dict(epoch=1, iter=iteration), message_hub={}, state_dict=weights)
    torch.save(dict(checkpoint, optimizer={}, **more), file)
    os.utime(file, ns=(iteration * 10**9,) * 2)
    return file


def damage(file):
    """Change one byte of the weights, which leaves the file's structure and date intact."""
    content, time = bytearray(file.read_bytes()), file.stat().st_mtime_ns
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    os.utime(file, ns=(time, time))


def cut(file):
    file.write_bytes(file.read_bytes()[:-2000])


def point(folder, name):
    (folder / 'last_checkpoint').write_text(str(folder / name) if name else '')


def test_last_checkpoint_names_the_file(tmp_path):
    assert find_training(tmp_path) is None
    one, _ = training(tmp_path / 'a.pth', 1), training(tmp_path / 'b.pth', 2)
    point(tmp_path, 'a.pth')
    file, checkpoint = find_training(tmp_path)
    assert file == str(one)
    assert checkpoint['meta']['iter'] == 1


@pytest.mark.parametrize('harm', [damage, cut, lambda f: f.unlink(), lambda f: f.write_bytes(b'')])
def test_a_damaged_checkpoint_is_skipped_for_the_newest_intact_one(harm, log, tmp_path):
    for i, name in enumerate(['old.pth', 'newer.pth', 'last.pth'], 1):
        training(tmp_path / name, i)
    weights = dict(state_dict={}, meta=dict(epoch=1, iter=9))
    torch.save(weights, tmp_path / 'published.pth')  # the newest
    torch.save(dict(weights, message_hub={}), tmp_path / 'best.pth')
    point(tmp_path, 'last.pth')
    harm(tmp_path / 'last.pth')
    assert find_training(tmp_path)[0] == str(tmp_path / 'newer.pth')
    assert len(log) == 1
    assert re.search(r'last\.pth.*: resuming from \S+newer\.pth', log[0]), log
    damage(tmp_path / 'newer.pth')
    assert find_training(tmp_path)[0] == str(tmp_path / 'old.pth')
    damage(tmp_path / 'old.pth')
    with pytest.raises(UserError, match='is intact: .*last.pth.*; .*newer.pth is damaged'):
        find_training(tmp_path)


@pytest.mark.parametrize('name', ['', None])
def test_without_a_name_the_newest_is_used(name, log, tmp_path):
    """A process killed while writing the name leaves an empty file."""
    if name is not None:
        point(tmp_path, name)
    training(tmp_path / 'a.pth', 1)
    newest = training(tmp_path / 'b.pth', 2)
    assert find_training(tmp_path)[0] == str(newest)
    assert ['last_checkpoint is empty: resuming' in line for line in log] == [True] * (name == '')


def test_a_moved_folder_is_searched(tmp_path):
    (tmp_path / 'new').mkdir()
    (tmp_path / 'new/last_checkpoint').write_text(str(tmp_path / 'old/a.pth'))
    moved = training(tmp_path / 'new/a.pth')
    assert find_training(tmp_path / 'new')[0] == str(moved)


def test_other_storage_and_folders_are_not_read(tmp_path):
    (tmp_path / 'last_checkpoint').write_text('s3://bucket/a.pth')
    assert find_training(tmp_path) == ('s3://bucket/a.pth', {})
    (tmp_path / 'epoch_1.pth').mkdir()
    point(tmp_path, 'epoch_1.pth')
    assert find_training(tmp_path) == (str(tmp_path / 'epoch_1.pth'), {})


def test_weights_cannot_be_resumed(tmp_path):
    torch.save(dict(state_dict={}), tmp_path / 'a.pth')
    with pytest.raises(UserError, match='weights only, which cannot be resumed: use --load-from'):
        read_training(tmp_path / 'a.pth')
    assert find_training(tmp_path) is None


# What a config becomes


@pytest.mark.parametrize('choice', ['auto', 'file', 'config'])
@pytest.mark.parametrize('seed', [None, 5])
def test_resume(choice, seed, tmp_path):
    """The seed is the first run's: mmengine restores it after the samplers are built."""
    file = training(tmp_path / 'x.pth')
    torch.save(torch.load(file) | dict(meta=dict(epoch=1, iter=1, seed=7)), file)
    point(tmp_path, 'x.pth')
    cfg = load_config(COCO, work_dir=str(tmp_path))
    if seed:
        cfg.randomness = dict(seed=seed, deterministic=True)
    cfg.resume = choice == 'config'
    use_checkpoint(cfg, dict(auto='auto', file=str(file), config=None)[choice])
    assert cfg.resume
    assert cfg.load_from == str(file)
    assert 'init_cfg' not in cfg.model.backbone
    assert cfg.randomness.seed == (seed or 7)
    assert cfg.randomness.get('deterministic', False) == bool(seed)


@pytest.mark.parametrize('choice', ['auto', 'x.pth'])
def test_a_damaged_checkpoint_is_not_resumed(choice, tmp_path):
    cut(training(tmp_path / 'x.pth'))
    cfg = load_config(COCO, work_dir=str(tmp_path))
    with pytest.raises(UserError, match='x.pth is damaged'):
        use_checkpoint(cfg, choice if choice == 'auto' else str(tmp_path / choice))


@pytest.mark.parametrize('other', [None, 'x.pth'])
def test_a_first_start_with_resume_is_as_without(other, tmp_path):
    cfg = load_config(COCO, work_dir=str(tmp_path))
    if other:
        torch.save(dict(state_dict={}), tmp_path / other)
        cfg.load_from = str(tmp_path / other)
    use_checkpoint(cfg, 'auto')
    assert not cfg.resume
    # Weights come from one of the two: never from neither.
    assert ('init_cfg' in cfg.model.backbone) == (other is None)
    assert cfg.get('load_from') == (str(tmp_path / other) if other else None)


def test_load_from(tmp_path):
    file = tmp_path / 'x.pth'
    file.touch()
    cfg = load_config(COCO)
    use_checkpoint(cfg, None)
    assert 'init_cfg' in cfg.model.backbone
    use_checkpoint(cfg, None, str(file), min_loaded=0.5)
    assert cfg.model.backbone.init_cfg.checkpoint.startswith('timm://')
    use_checkpoint(cfg, None, str(file))
    assert cfg.load_from == str(file)
    assert not cfg.get('resume')
    assert 'init_cfg' not in cfg.model.backbone  # the file must fill the backbone
    cfg = load_config(COCO, options=dict(load_from=str(file)))
    use_checkpoint(cfg, None)
    assert 'init_cfg' not in cfg.model.backbone
    wrong = str(tmp_path / 'xx.pth')
    for load_from, choice in ((wrong, None), (None, wrong)):
        with pytest.raises(UserError, match=rf'^no checkpoint {wrong}; did you mean {file}\?'):
            use_checkpoint(cfg, choice, load_from)
    with pytest.raises(UserError, match='choose one'):
        use_checkpoint(cfg, 'auto', str(file))


# Settings of the checkpoint and of the config


def runner_of(
    kind='AdamW', batch_size=8, max_epochs=4, milestones=(2, 3), layers=1, schedules=1, **options
):
    """Return what compare_settings reads of a runner, which keeps its warnings."""
    model = torch.nn.Sequential(*[torch.nn.Linear(2, 2) for _ in range(layers)])
    groups = [dict(params=[parameter]) for parameter in model.parameters()]
    wrapper = OptimWrapper(getattr(torch.optim, kind)(groups, **(dict(lr=0.1) | options)))
    loader = dict(batch_sampler=dict(type='AspectRatioBatchSampler'), batch_size=batch_size)
    # Long enough for several lines of the text.
    loader.update(sampler=dict(type='DefaultSampler', shuffle=True), persistent_workers=True)
    cfg = dict(train_dataloader=loader, val_dataloader=dict(batch_size=1))
    warnings = []
    return SimpleNamespace(
        cfg=Config(cfg | dict(train_cfg=dict(max_epochs=max_epochs))),
        optim_wrapper=wrapper,
        param_schedulers=[MultiStepLR(wrapper, [*milestones]) for _ in range(schedules)],
        logger=SimpleNamespace(warning=warnings.append),
        warnings=warnings,
    )


def compare(new, old=None, epoch=1):
    old = runner_of(**(old or {}))
    checkpoint = dict(
        meta=dict(epoch=epoch, iter=10 * epoch, cfg=old.cfg.pretty_text),
        optimizer=old.optim_wrapper.state_dict(),
        param_schedulers=[schedule.state_dict() for schedule in old.param_schedulers],
    )
    runner = runner_of(**new)
    compare_settings(runner, checkpoint)
    return runner.warnings


@pytest.mark.parametrize(
    ('new', 'changes'),
    [
        (dict(lr=0.5), 'lr 0.1 (config: 0.5)'),
        (dict(weight_decay=0.5), 'weight_decay 0.01 (config: 0.5)'),
        (dict(betas=(0.5, 0.9)), 'betas [0.9, 0.999] (config: [0.5, 0.9])'),
        (dict(milestones=[3]), 'param_scheduler.0.milestones [2, 3] (config: [3])'),
        (dict(schedules=2), 'number of schedules 1 (config: 2)'),
        (
            dict(lr=0.5, weight_decay=0.5),
            'lr 0.1 (config: 0.5), weight_decay 0.01 (config: 0.5)',
        ),
    ],
)
def test_settings_of_the_checkpoint_stay(new, changes):
    assert compare({}) == []
    assert compare(new) == [
        f'resumed with settings of the checkpoint, not of the config: {changes}. --load-from '
        'starts with those of the config'
    ]


def test_other_batches():
    assert compare(dict(batch_size=4)) == ['resumed in batches of 4 images, where it had 8']


@pytest.mark.parametrize(('epoch', 'lines'), [(3, 0), (4, 1)])
def test_a_finished_training(epoch, lines):
    line = 'nothing is left to train: train_cfg.max_epochs=4 is reached'
    assert compare({}, epoch=epoch) == [line] * lines
    with pytest.raises(UserError, match='the checkpoint is at epoch 5, beyond train_cfg.max_epoch'):
        compare({}, epoch=5)


@pytest.mark.parametrize('new', [dict(kind='SGD'), dict(layers=2)])
def test_another_optimizer_cannot_be_resumed(new):
    with pytest.raises(UserError, match='has another optimizer or other paramwise_cfg'):
        compare(new)
