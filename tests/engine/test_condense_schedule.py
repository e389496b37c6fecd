"""CondenseScheduleHook in runs of mmengine's runner."""

import os
import socket
from pathlib import Path

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel
from mmengine.runner import Runner
from mmengine.structures import InstanceData
from torch import nn
from torch.nn import functional as F

import mmdense  # noqa: F401
from mmdense.errors import UserError
from mmdense.models.backbones import CondenseNetV2, DenseNet
from mmdense.models.layers import LearnedGroupConv, SparseReactivation, pruning_stage
from runs import build_runner

ARCH = dict(layers=(1, 1, 1, 1, 1), growth=(4, 4, 4, 4, 4), groups=4)
LAST = 3  # stages start after 1/6, 1/3 and 1/2 of the run
CHANNELS = [16, 20, 24, 28]


class Classifier(BaseModel):
    """A backbone and a linear layer."""

    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone
        self.fc = nn.Linear(backbone.out_channels[-1], 2)

    def forward(self, images, labels, mode='tensor'):
        scores = self.fc(self.backbone(images)[-1].mean((2, 3)))
        if mode != 'loss':
            return dict(scores=scores)
        return dict(loss_cls=F.cross_entropy(scores, labels))


class Each(Hook):
    """Call a function after every iteration, after all other hooks."""

    priority = 'LOWEST'

    def __init__(self, function):
        self.function = function

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        self.function(runner, outputs)


def classifier(**options):
    torch.manual_seed(0)
    return Classifier(CondenseNetV2(arch=ARCH, **options))


def samples(number=48, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(number, 3, 32, 32, generator=generator)
    return [(image, i % 2) for i, image in enumerate(images)]


def build(folder, model, *, each=None, hooks=(), data=None, **options):
    """Build a runner: batches of 4 in order, a checkpoint for each iteration."""
    hooks = [dict(type='mmdense.CondenseScheduleHook'), *hooks]
    if each is not None:
        hooks.append(Each(each))
    optimizer = dict(type='SGD', lr=0.05, momentum=0.9, weight_decay=1e-2)
    return build_runner(
        folder,
        model,
        samples() if data is None else data,
        batch_size=4,
        hooks=hooks,
        optim_wrapper=dict(optimizer=optimizer),
        **options,
    )


def learned(model):
    kinds = (LearnedGroupConv, SparseReactivation)
    return [module for module in model.modules() if isinstance(module, kinds)]


def buffers(model):
    """Return masks, counts and stages."""
    return [b.clone() for layer in learned(model) for b in layer.buffers(recurse=False)]


def logged(runner):
    """Return the lines of the log without times."""
    (file,) = Path(runner.log_dir).glob('*.log')
    return [line.partition(' - INFO - ')[2] for line in file.read_text().splitlines()]


def stage_lines(runner):
    return [line for line in logged(runner) if line.startswith('condense: ')]


def history(runner, name):
    return runner.message_hub.get_scalar(name)._log_history.tolist()


@pytest.mark.parametrize('run', [dict(iters=12), dict(epochs=4, data=samples(12))])
def test_masks_follow_the_schedule(run, tmp_path):
    model = classifier()
    seen, shares = [], []

    def look(runner, outputs):
        stage = pruning_stage(runner.iter / 12, 4)
        seen.append(stage)
        shares.append(1 - stage / 4)
        for layer in learned(model):
            assert layer.stage == stage
            assert (layer.kept().sum(1) == layer.channels // 4 * (4 - stage)).all()

    runner = build(tmp_path, model, each=look, **run)
    assert len(learned(runner.model)) == 10
    runner.train()
    assert seen == [0, 0, 1, 1, 2, 2, 3, 3, 3, 3, 3, 3]
    assert stage_lines(runner) == [
        'condense: stage 1 of 3 at iteration 2 of 12, 75.0 % of the connections left',
        'condense: stage 2 of 3 at iteration 4 of 12, 50.0 % of the connections left',
        'condense: stage 3 of 3 at iteration 6 of 12, 25.0 % of the connections left',
    ]
    assert history(runner, 'train/connections') == shares
    shown = [line.partition('connections: ')[2][:6] for line in logged(runner) if 'loss:' in line]
    assert [float(share) for share in shown] == shares


@pytest.mark.parametrize('iters', [2, 3, 5])
def test_short_runs_reach_the_last_stage(iters, tmp_path):
    model = classifier()
    runner = build(tmp_path, model, iters=iters)
    runner.train()
    assert {layer.stage for layer in learned(model)} == {LAST}
    assert stage_lines(runner)[-1].startswith('condense: stage 3 of 3')
    images = samples()[0][0][None].double()
    maps = model.eval().double().backbone(images)
    model.backbone.condense()
    torch.testing.assert_close(model.backbone(images), maps)


@pytest.mark.parametrize('done', [4, 8])
def test_resumed_runs_end_like_uninterrupted_ones(done, tmp_path):
    whole = build(tmp_path / 'whole', classifier(), iters=16)
    whole.train()
    model = classifier()
    with torch.no_grad():
        model.backbone.features.init_conv.weight.zero_()  # only the checkpoint restores it
    checkpoint = str(tmp_path / f'whole/iter_{done}.pth')
    rest = build(tmp_path / 'rest', model, iters=16, load_from=checkpoint, resume=True)
    rest.train()
    lines = [line for line in stage_lines(whole) if int(line.split()[7]) >= done]
    assert stage_lines(rest) == lines
    assert len(lines) == (2 if done == 4 else 1)
    expected = whole.model.state_dict()
    assert int(expected['backbone.features.denseblock_1.denselayer_1.conv_1._stage']) == LAST
    for name, value in rest.model.state_dict().items():
        assert torch.equal(value, expected[name]), name
    assert history(rest, 'train/loss') == history(whole, 'train/loss')
    assert history(rest, 'train/connections') == history(whole, 'train/connections')


@pytest.mark.parametrize('interval', [1, 5])
@pytest.mark.parametrize('update_buffers', [False, True])
def test_averages_have_the_same_masks(update_buffers, interval, tmp_path):
    """mmengine's EMAHook ignores integer buffers when it averages buffers."""
    model = classifier()
    ema = dict(type='EMAHook', update_buffers=update_buffers, momentum=0.1, interval=interval)
    stages = []

    def look(runner, outputs):
        (hook,) = [hook for hook in runner.hooks if type(hook).__name__ == 'EMAHook']
        averages = buffers(hook.ema_model.module)
        assert len(averages) == 30
        for average, buffer in zip(averages, buffers(model), strict=True):
            assert average.dtype == buffer.dtype
            assert not average.is_floating_point()
            assert torch.equal(average, buffer)
        weights = (hook.ema_model.module.fc.weight, model.fc.weight)
        assert torch.equal(*weights) == (runner.iter == 0)  # weights are averaged
        stages.append(model.backbone.stage)

    build(tmp_path, model, iters=8, each=look, hooks=[ema]).train()
    assert stages == [0, 0, 1, 2, 3, 3, 3, 3]
    saved = torch.load(tmp_path / 'iter_8.pth', weights_only=False)['state_dict']
    masks = [value for name, value in saved.items() if name.endswith('._mask')]
    expected = [layer._mask for layer in learned(model)]
    assert len(masks) == 10
    assert all(torch.equal(*pair) for pair in zip(masks, expected, strict=True))


def test_a_pruned_model_continues_from_its_stage(tmp_path):
    model = classifier()
    model.backbone.prune_to(0.4)
    before = buffers(model)
    stages = []
    runner = build(
        tmp_path, model, each=lambda runner, outputs: stages.append(model.backbone.stage)
    )
    runner.train()
    assert stages == [2] * 6 + [3] * 6
    assert [line[:23] for line in stage_lines(runner)] == ['condense: stage 3 of 3 ']
    assert any(not torch.equal(*pair) for pair in zip(before, buffers(model), strict=True))
    before = buffers(model)
    again = build(tmp_path / 'again', model)
    again.train()
    assert not stage_lines(again)
    assert history(again, 'train/connections') == [0.25] * 12
    assert all(torch.equal(*pair) for pair in zip(before, buffers(model), strict=True))


def test_nothing_or_too_much_to_prune(tmp_path):
    condensed = Classifier(CondenseNetV2(arch=ARCH, form='condensed'))
    other = Classifier(DenseNet(arch=dict(growth_rate=4, layers=(1, 1, 1, 1))))
    two = classifier()
    two.teacher = CondenseNetV2(arch=ARCH)
    for model, count in ((condensed, 0), (other, 0), (two, 2)):
        with pytest.raises(UserError) as error:
            build(tmp_path, model, iters=2).train()
        assert str(error.value) == (
            f'CondenseScheduleHook prunes exactly one CondenseNetV2, but Classifier has {count} '
            "that can be pruned: set backbone.type='mmdense.CondenseNetV2' and "
            "backbone.form='learned', or remove the hook from custom_hooks"
        )


def test_detectors(tmp_path):
    """Their losses are lists, and their inputs go through a data preprocessor."""
    from mmdet.structures import DetDataSample

    sample = DetDataSample(metainfo=dict(img_shape=(64, 64), pad_shape=(64, 64), scale_factor=1))
    sample.gt_instances = InstanceData(
        bboxes=torch.tensor([[8.0, 8.0, 40.0, 40.0]]), labels=torch.tensor([1])
    )
    head = dict(type='FCOSHead', num_classes=2, in_channels=8, feat_channels=8, stacked_convs=1)
    model = dict(
        type='FCOS',
        data_preprocessor=dict(type='DetDataPreprocessor', mean=[128] * 3, std=[60] * 3),
        backbone=dict(type='mmdense.CondenseNetV2', arch=ARCH),
        neck=dict(type='FPN', in_channels=CHANNELS, out_channels=8, num_outs=5),
        bbox_head=dict(**head, strides=(4, 8, 16, 32, 64), norm_cfg=None),
    )
    image = torch.randint(0, 256, (3, 64, 64), dtype=torch.uint8)
    options = dict(data=[dict(inputs=image, data_samples=sample)] * 16, collate='pseudo_collate')
    runner = build(tmp_path, model, iters=4, default_scope='mmdet', **options)
    runner.train()
    assert runner.model.backbone.stage == LAST


def train_one_process(rank, port, folder, different):
    """Train on this process's share of the data; save the state after each iteration."""
    env = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=2, MASTER_ADDR='127.0.0.1', MASTER_PORT=port)
    os.environ.update({key: str(value) for key, value in env.items()}, CUDA_VISIBLE_DEVICES='')
    torch.set_num_threads(1)
    Runner._log_env = lambda self, env_cfg: None
    torch.distributed.init_process_group('gloo')
    model = classifier()
    seen = []

    def look(runner, outputs):
        assert type(runner.model).__name__ == 'MMDistributedDataParallel'
        if different and rank and runner.iter == 0:
            # Not earlier: mmengine broadcasts the weights before the first iteration.
            with torch.no_grad():
                for layer in learned(model):
                    layer.conv.weight.copy_(layer.conv.weight.flip(0, 1))
        weights = [layer.conv.weight.detach().clone() for layer in learned(model)]
        average = next(hook.ema_model for hook in runner.hooks if hasattr(hook, 'ema_model'))
        share = float(runner.message_hub.get_scalar('train/connections').current())
        state = dict(
            buffers=buffers(model),
            average=buffers(average),
            weights=weights,
            share=share,
        )
        seen.append(state)

    runner = build(
        folder,
        model,
        epochs=3,
        each=look,
        # The sampler gives each process every other image.
        data=samples(16),
        hooks=[dict(type='SyncBuffersHook'), dict(type='EMAHook', update_buffers=True)],
        launcher='pytorch',
        cfg=dict(model_wrapper_cfg=dict(type='MMDistributedDataParallel', device_ids=None)),
    )
    runner.train()
    torch.save(seen, folder / f'rank-{rank}.pth')
    torch.save(stage_lines(runner) if rank == 0 else [], folder / f'lines-{rank}.pth')
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize('different', [False, True])
def test_processes_agree(different, tmp_path):
    with socket.socket() as free:
        free.bind(('127.0.0.1', 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(train_one_process, (port, tmp_path, different), nprocs=2)
    first, second = (torch.load(tmp_path / f'rank-{rank}.pth') for rank in range(2))
    assert len(first) == len(second) == 6
    assert [state['share'] for state in first] == [1, 0.75, 0.5, 0.25, 0.25, 0.25]
    assert len(torch.load(tmp_path / 'lines-0.pth')) == LAST
    alone = classifier()
    for one, other in zip(first, second, strict=True):
        assert one['share'] == other['share']
        for name in ('buffers', 'average'):
            for a, b in zip(one[name], other[name], strict=True):
                assert torch.equal(a, b)
        same = [torch.equal(*pair) for pair in zip(one['weights'], other['weights'], strict=True)]
        assert not any(same) if different else all(same)
    if different:  # on its own, the second process would have other masks
        with torch.no_grad():
            for layer, weight in zip(learned(alone), second[0]['weights'], strict=True):
                layer.conv.weight.copy_(weight)
        alone.backbone.prune_to(1 / 6)
        pairs = zip(buffers(alone), first[1]['buffers'], strict=True)
        assert any(not torch.equal(*pair) for pair in pairs)
