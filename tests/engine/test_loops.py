"""Training loops: stop on SIGTERM and resume, with a model of one layer."""

import itertools
import os
import signal
from pathlib import Path

import pytest
import torch
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from torch import nn

from mmdense.engine import stopping
from mmdense.engine.loops import misfits
from mmdense.engine.stopping import STATUS
from mmdense.errors import UserError
from mmdense.weights.files import read_checkpoint
from runs import build_runner, loader

NUMBERS = itertools.count()
LOOPS = dict(
    epochs=dict(type='mmdense.EpochBasedTrainLoop', max_epochs=3, val_interval=2),
    iterations=dict(type='mmdense.IterBasedTrainLoop', max_iters=12, val_interval=5),
)


class Model(BaseModel):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 1)

    def forward(self, x, mode):
        out = self.layer(nn.functional.dropout(x, 0.5, self.training))
        return dict(loss=out.square().mean()) if mode == 'loss' else list(out)


class Noisy(torch.utils.data.Dataset):
    metainfo = None

    def __len__(self):
        return 8

    def __getitem__(self, index):
        return dict(x=index + torch.rand(4))


class Count(BaseMetric):
    def process(self, data_batch, data_samples):
        self.results += data_samples

    def compute_metrics(self, results):
        return dict(score=sum(r.item() for r in results), count=next(NUMBERS))


class Act(Hook):
    """Call a function after an iteration or during a validation."""

    def __init__(self, at, act, validating=False, batch=0):
        self.at, self.act, self.validating, self.batch = at, act, validating, batch

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter + 1 == self.at and not self.validating:
            self.act()

    def before_val_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.at and self.validating and batch_idx == self.batch:
            self.act()


def send_sigterm():
    os.kill(os.getpid(), signal.SIGTERM)


def build(folder, kind, *hooks, checkpoint=None, batch_size=2, resume=None, accumulate=1, seed=0):
    torch.manual_seed(0)
    by_epoch = kind == 'epochs'
    saved = dict(type='mmdense.CheckpointHook', by_epoch=by_epoch, interval=2 if by_epoch else 4)
    data = Noisy()
    batches = loader(data, endless=not by_epoch, shuffle=True, batch_size=batch_size)
    return build_runner(
        folder,
        Model(),
        data,
        train_dataloader=dict(batches, num_workers=0 if by_epoch else 1),
        val_dataloader=loader(data, batch_size=batch_size),
        train_cfg=dict(LOOPS[kind]),
        val_cfg=dict(),
        val_evaluator=dict(type=Count),
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.1), accumulative_counts=accumulate),
        param_scheduler=dict(type='PolyLR', by_epoch=False, end=12, eta_min=0.001),
        default_hooks=dict(checkpoint=checkpoint or saved),
        hooks=[dict(type='EMAHook'), *hooks],
        load_from=resume,
        resume=resume is not None,
        randomness=dict(seed=seed),
        log_level='WARNING',
    )


def state(runner):
    hub = runner.message_hub.log_scalars
    history = {k: hub[k].data[0].tolist() for k in ('train/loss', 'train/lr', 'val/score')}
    average = next(hook for hook in runner.hooks if hasattr(hook, 'ema_model')).ema_model
    weights = {**runner.model.state_dict(), **average.state_dict()}
    return history, {name: tensor.tolist() for name, tensor in weights.items()}


def last(folder):
    return (folder / 'last_checkpoint').read_text()


@pytest.mark.parametrize('validating', [False, True])
@pytest.mark.parametrize('kind', LOOPS)
def test_a_resumed_run_ends_like_an_uninterrupted_one(kind, validating, tmp_path):
    whole = build(tmp_path / 'whole', kind)
    whole.train()
    at = dict(epochs=8, iterations=5)[kind] if validating else 6
    runner = build(tmp_path / 'stopped', kind, Act(at, send_sigterm, validating))
    with pytest.raises(SystemExit) as exit:
        runner.train()
    assert exit.value.code == STATUS
    assert last(tmp_path / 'stopped') == str(tmp_path / 'stopped/interrupted.pth')
    meta = read_checkpoint(last(tmp_path / 'stopped'))['meta']
    assert (meta['epoch'], meta['iter']) == (at // 4 if kind == 'epochs' else 0, at)
    rest = build(tmp_path / 'stopped', kind, resume=last(tmp_path / 'stopped'))
    rest.train()
    assert len(state(whole)[0]['train/loss']) == 12
    assert len(state(whole)[0]['val/score']) == dict(epochs=2, iterations=3)[kind]
    assert state(rest) == state(whole)
    assert not (tmp_path / 'stopped/interrupted.pth').exists()
    assert sorted(f.name for f in (tmp_path / 'stopped').glob('*.pth')) == sorted(
        f.name for f in (tmp_path / 'whole').glob('*.pth')
    )


class Killed(BaseException):
    pass


def kill():
    raise Killed


@pytest.mark.parametrize('killed', [False, True])
@pytest.mark.parametrize('kind', LOOPS)
def test_several_processes_save_a_checkpoint_during_validation(kind, killed, tmp_path, monkeypatch):
    whole = build(tmp_path / 'whole', kind)
    whole.train()
    monkeypatch.setattr(stopping, 'is_distributed', lambda: True)
    monkeypatch.setattr(stopping, 'EXCHANGE', 1)
    at = dict(epochs=8, iterations=5)[kind]
    hooks = [Act(at, send_sigterm, validating=True)] + [Act(at, kill, True, batch=2)] * killed
    runner = build(tmp_path / 'stopped', kind, *hooks)
    with pytest.raises(Killed if killed else SystemExit):
        runner.train()
    assert read_checkpoint(last(tmp_path / 'stopped'))['meta']['iter'] == at + (not killed)
    rest = build(tmp_path / 'stopped', kind, resume=last(tmp_path / 'stopped'))
    rest.train()
    assert state(rest) == state(whole)


@pytest.mark.parametrize('kind', LOOPS)
def test_seeds_differ(kind, tmp_path):
    one, other = (build(tmp_path / str(seed), kind, seed=seed) for seed in (0, 1))
    one.train()
    other.train()
    assert state(one)[0]['train/loss'] != state(other)[0]['train/loss']


def test_it_stops_when_no_gradients_are_pending(tmp_path):
    runner = build(tmp_path, 'epochs', Act(4, send_sigterm), accumulate=3)
    with pytest.raises(SystemExit):
        runner.train()
    assert read_checkpoint(last(tmp_path))['meta']['iter'] == 6


def test_another_batch_size_resumes_after_the_same_share(tmp_path):
    with pytest.raises(SystemExit):
        build(tmp_path, 'epochs', Act(6, send_sigterm)).train()
    seen = []
    runner = build(tmp_path, 'epochs', batch_size=1, resume=last(tmp_path))
    runner.register_hook(Act(None, None))
    runner.hooks[-1].after_train_iter = lambda runner, batch_idx, **more: seen.append(batch_idx)
    runner.train()
    assert seen[:5] == [4, 5, 6, 7, 0]  # 2 of 4 batches are 4 of 8


def test_without_checkpoints_it_warns_that_nothing_was_saved(tmp_path):
    runner = build(
        tmp_path, 'epochs', Act(2, send_sigterm), checkpoint=dict(type=Act, at=0, act=None)
    )
    warnings = []
    runner.logger.warning = warnings.append
    with pytest.raises(SystemExit):
        runner.train()
    assert warnings == [
        'SIGTERM: stopped after 2 of 12 iterations; nothing was saved, since the config saves no '
        'checkpoints'
    ]


def test_an_old_checkpoint_is_removed_after_its_successor_is_written(tmp_path, monkeypatch):
    """mmengine's hook deletes first, so that a kill in between leaves neither."""
    hook = dict(
        type='mmdense.CheckpointHook',
        interval=1,
        max_keep_ckpts=1,
        save_best='count',
        rule='greater',
    )
    seen = set()
    replace = Path.replace

    def record(part, file):
        seen.add((file.name, *sorted(f.name for f in tmp_path.glob('*.pth'))))
        return replace(part, file)

    monkeypatch.setattr(Path, 'replace', record)
    build(tmp_path, 'epochs', checkpoint=hook).train()
    assert ('epoch_3.pth', 'best_count_epoch_2.pth', 'epoch_2.pth') in seen
    assert ('best_count_epoch_3.pth', 'best_count_epoch_2.pth', 'epoch_3.pth') in seen
    assert sorted(f.name for f in tmp_path.glob('*.pth')) == [
        'best_count_epoch_3.pth',
        'epoch_3.pth',
    ]


def test_a_validation_in_the_checkpoint_is_not_repeated(tmp_path):
    hook = dict(type='mmdense.CheckpointHook', interval=1, save_best='count', rule='greater')
    whole = build(tmp_path / 'whole', 'epochs', checkpoint=hook)
    whole.train()
    resume = str(tmp_path / 'whole/epoch_2.pth')  # saved again as the best so far
    rest = build(tmp_path / 'rest', 'epochs', checkpoint=hook, resume=resume)
    rest.train()
    assert len(state(whole)[0]['val/score']) == 2
    assert state(rest) == state(whole)


def test_partly_written_files_are_removed_at_the_next_start(tmp_path):
    (tmp_path / '.epoch_1.pth.part').touch()
    (tmp_path / '.other').touch()
    build(tmp_path, 'iterations').train()
    assert [f.name for f in tmp_path.glob('.*')] == ['.other']


def short(folder, kind='epochs', **options):
    """Train for 3 epochs of 4 iterations, or for 12 iterations; return the warnings."""
    batches = loader(Noisy(), endless=kind != 'epochs', batch_size=options.pop('batch_size', 2))
    runner = build_runner(
        folder,
        Model(),
        Noisy(),
        train_dataloader=dict(batches, drop_last=options.pop('drop_last', False)),
        train_cfg=dict(LOOPS[kind]),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
        log_level='WARNING',
        **options,
    )
    warnings = []
    runner.logger.warning = warnings.append
    runner.train()
    return warnings


@pytest.mark.parametrize(
    ('kind', 'schedule', 'warning'),
    [
        (
            'epochs',
            dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=101),
            'LinearLR ends at iteration 101: lr never reaches its final value, since training ends '
            'at iteration 12 (epoch 3)',
        ),
        (
            'epochs',
            dict(type='MultiStepLR', milestones=[2, 8, 11], end=12),
            'MultiStepLR changes lr at epoch 8, 11, which is never reached, since training ends at '
            'iteration 12 (epoch 3)',
        ),
        (
            'iterations',
            dict(type='PolyLR', by_epoch=False, end=160),
            'PolyLR ends at iteration 160: lr never reaches its final value, since training ends '
            'at iteration 12',
        ),
        ('epochs', dict(type='LinearLR', start_factor=0.1, by_epoch=False, end=12), None),
        ('epochs', dict(type='MultiStepLR', milestones=[1, 2], end=3), None),
        ('epochs', dict(type='CosineAnnealingLR', T_max=3, convert_to_iter_based=True), None),
        ('iterations', dict(type='PolyLR', by_epoch=False, end=12), None),
    ],
)
def test_schedules_longer_than_the_training_are_named(kind, schedule, warning, tmp_path):
    warnings = short(tmp_path, kind, param_scheduler=schedule)
    assert warnings == [f'param_scheduler.0: {warning}'] * (warning is not None)


@pytest.mark.parametrize(
    ('checkpoint', 'val_interval', 'switch_epoch', 'warnings'),
    [
        (dict(by_epoch=False, interval=12), 3, 2, []),
        (
            dict(by_epoch=False, interval=13),
            4,
            3,
            [
                'Act.switch_epoch=3: it never takes effect',
                'CheckpointHook.interval=13: it saves only at the end',
                'train_cfg.val_interval=4: validation only at the end',
            ],
        ),
    ],
)
def test_intervals_longer_than_the_training(
    checkpoint, val_interval, switch_epoch, warnings, tmp_path
):
    switch = Act(None, None)
    switch.switch_epoch = switch_epoch
    hook = dict(type='mmdense.CheckpointHook', **checkpoint)
    runner = build(tmp_path, 'epochs', switch, checkpoint=hook)
    runner.train_loop.val_interval, runner.param_schedulers = val_interval, None
    length = ', since training ends at iteration 12 (epoch 3)'
    assert [*misfits(runner)] == [line + length for line in warnings]


def test_images_that_make_no_batch(tmp_path):
    message = (
        'train_dataloader: 8 images are less than a batch of 9: add --cfg-options '
        'train_dataloader.drop_last=False'
    )
    with pytest.raises(UserError, match=message):
        short(tmp_path, batch_size=9, drop_last=True)
    short(tmp_path, 'iterations', batch_size=9, drop_last=True)  # its sampler starts over
