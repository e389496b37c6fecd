"""The costs of a training step, and which memory mode fits."""

import copy
import json
import sys
from functools import partial
from math import inf

import pytest
import torch
from mmengine.config import Config

from mmdense.benchmark import memory
from mmdense.benchmark.memory import (
    GB,
    NO_MODES,
    ModeCost,
    best_mode,
    build_training,
    config_changes,
    peak_bytes,
    plan,
    random_batch,
    tensor_bytes,
    training_step,
    usable,
)
from mmdense.config.edit import use_amp
from mmdense.config.read import load_config
from mmdense.errors import UserError
from support import DEMOS, ROOT

MODES = ['plain', 'lean', 'recompute']


def demo(task='detection', **options):
    return load_config(str(DEMOS[task]), options=options)


@pytest.fixture(scope='module')
def costs():
    """The costs of the demo detector in each of its modes, whose weights stay the same."""
    return plan(demo(**{'optim_wrapper.optimizer.lr': 0.0}), size=(128, 128))


def chain(length, requires_grad=False):
    """Take the exponential again and again, of a million bytes."""
    x = torch.zeros(250_000, requires_grad=requires_grad)
    y = x
    for _ in range(length):
        y = y.exp()
    if requires_grad:
        y.sum().backward()
    return y


def test_peak_of_known_bytes():
    # The argument stays; each result is freed when the next one exists.
    assert peak_bytes(partial(chain, 5)) == 3_000_000
    # All results are saved, and at the peak the gradients of two of them exist.
    saved = peak_bytes(partial(chain, 5, requires_grad=True))
    assert 8_000_000 <= saved < 8_001_000
    assert peak_bytes(lambda: None) == 0
    # Tensors from before don't count.
    kept = []
    for _ in range(2):
        assert peak_bytes(lambda: kept.append(chain(2))) == 3_000_000
    assert peak_bytes(kept.clear) == 0
    assert peak_bytes(partial(chain, 2)) == 3_000_000


def test_modes_are_ranked(costs):
    assert [cost.mode for cost in costs] == MODES
    plain, lean, recompute = (cost.per_image for cost in costs)
    assert plain > 1.2 * lean > 1.2 * recompute
    assert all(cost.seconds > 0 for cost in costs)
    assert all(cost.smallest == 1 < cost.ran for cost in costs)


def test_fixed_part_includes_weights_gradients_and_states(costs):
    cfg = demo()
    assert cfg.optim_wrapper.optimizer.type == 'AdamW'
    weights = tensor_bytes(build_training(cfg, 'cpu')[0].parameters())
    assert costs[0].fixed > 4 * weights
    cfg.optim_wrapper.optimizer = dict(type='SGD', lr=0.0)
    (stateless,) = plan(cfg, size=(128, 128), modes=['plain'])
    assert costs[0].fixed - stateless.fixed == pytest.approx(2 * weights, rel=0.01)


@pytest.mark.parametrize('width', [None, 1024], ids=['', 'more weights than activations'])
def test_larger_batches_are_predicted(width):
    cfg = demo(**({'model.roi_head.bbox_head.fc_out_channels': width} if width else {}))
    (cost,) = plan(cfg, size=(64, 96), modes=['lean'])
    cfg.model.backbone.memory = 'lean'
    model, wrapper = build_training(cfg, 'cpu')
    data = random_batch(6, (64, 96), scope='mmdet')

    def step():
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
        training_step(model, wrapper, data)

    weights = tensor_bytes(model.parameters())
    states = 2 * tensor_bytes(p for p in model.parameters() if p.requires_grad)  # AdamW's
    measured = weights + tensor_bytes(model.buffers()) + states + peak_bytes(step)
    assert cost.fixed + 6 * cost.per_image == pytest.approx(measured, rel=0.05)


@pytest.mark.parametrize(
    ('fits', 'ran', 'per_image'),
    [(99, 8, 0.5), (7, 4, 0.2), (3, 2, 0.2), (1, 1, None), (0, 0, None)],
)
def test_batches_grow_until_activations_determine_the_peak(fits, ran, per_image, monkeypatch):
    """In small batches the copy of a gradient does; on a GPU only those that fit are run."""
    model = build_training(demo(), 'cpu')[0]
    gradients = tensor_bytes(p for p in model.parameters() if p.requires_grad)

    def peak(run, device):
        batch, times = run.args
        if batch > fits:
            raise torch.cuda.OutOfMemoryError
        times.append(1.0 * batch)
        return int(gradients * max(2.5 + 0.2 * batch, 1.3 + 0.5 * batch))

    monkeypatch.setattr(memory, 'peak_bytes', peak)
    (cost,) = plan(demo(), size=(64, 64), modes=['plain'])
    assert cost.ran == ran
    assert cost.seconds == (1.0 if ran else inf)
    if per_image:
        assert cost.per_image == pytest.approx(per_image * gradients, rel=1e-3)
    else:
        assert (cost.fixed, cost.per_image, cost.largest(24 * GB)) == (None, None, ran)


def test_steps_on_a_gpu_follow_a_warm_up(monkeypatch):
    calls = []
    monkeypatch.setattr(memory, 'WARM_UP', dict(cpu=2))
    monkeypatch.setattr(memory, 'drain', lambda device: calls.append('drain'))
    monkeypatch.setattr(memory, 'training_step', lambda *args: calls.append('step'))
    monkeypatch.setattr(
        memory, 'peak_bytes', lambda run, device: calls.append('peak') or run() or 1
    )
    plan(demo(), size=(64, 64), modes=['plain'])
    step = ['drain', 'step', 'drain']  # the device is idle at the start and at the end
    assert calls[:10] == [*step, *step, 'peak', *step]


def test_largest_batch_fits_and_one_more_does_not():
    cost = ModeCost('plain', 2, 3, fixed=300, per_image=100, seconds=1.0)
    for free, largest in ((199, 0), (200, 2), (299, 2), (300, 3), (1499, 14)):
        gpu_bytes = (memory.CONTEXT + 300 + free) / (1 - memory.FRAGMENTATION)
        assert cost.largest(gpu_bytes + 1e-3) == largest
    assert usable(0.5 * GB) == 0
    assert usable(24 * GB) == pytest.approx(21 * GB)


def test_mixed_precision_and_synchronised_norms_on_a_cpu(costs):
    narrow = demo(**{'model.neck.norm_cfg': dict(type='SyncBN')})
    use_amp(narrow, 'float16')
    before = copy.deepcopy(narrow)
    (cost,) = plan(narrow, size=(128, 128), modes=['plain'])
    assert cost.per_image < 0.8 * costs[0].per_image
    assert narrow.to_dict() == before.to_dict()


@pytest.mark.slow
def test_a_segmentor_takes_the_size():
    cfg = demo('segmentation')
    small, large = (plan(cfg, size=size, modes=['plain'])[0] for size in ((128, 128), (128, 256)))
    assert 1.8 < large.per_image / small.per_image < 2.2
    assert cfg.model.data_preprocessor.size == (192, 192)


@pytest.mark.slow
def test_other_backbones_are_planned_without_modes():
    resnet = dict(_delete_=True, type='ResNet', depth=18, base_channels=8, out_indices=(0, 1, 2))
    cfg = demo()
    cfg.merge_from_dict(dict(model=dict(backbone=resnet, neck=dict(in_channels=[8, 16, 32]))))
    (cost,) = plan(cfg, size=(64, 64))
    assert cost.mode == NO_MODES
    assert config_changes(cfg, cost.mode, 8) == []
    with pytest.raises(UserError, match=r"ResNet has no memory mode 'lean' \(it has: \[\]\)"):
        plan(cfg, size=(64, 64), modes=['lean'])


@pytest.mark.slow
def test_a_panoptic_detector(tmp_path):
    file = tmp_path / 'panoptic.py'
    file.write_text("_base_ = 'mmdet::panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py'")
    cfg = load_config(str(file))
    cfg.model.train_cfg.rcnn.sampler.num = 32
    (cost,) = plan(cfg, size=(64, 96))
    assert cost.per_image > 0


def test_errors(monkeypatch):
    with pytest.raises(UserError, match="RDNet has no memory mode 'less'"):
        plan(demo(), size=(64, 64), modes=['less'])
    with pytest.raises(UserError, match='has no optim_wrapper'):
        plan(demo(optim_wrapper=None), size=(64, 64))
    with pytest.raises(UserError, match='SoftTeacher has no backbone'):
        plan(Config(dict(model=dict(type='SoftTeacher'))), size=(64, 64))

    def fail(run, device):
        raise ValueError('another')

    monkeypatch.setattr(memory, 'peak_bytes', fail)
    with pytest.raises(ValueError, match='another'):
        plan(demo(), size=(64, 64))


@pytest.mark.parametrize(
    ('figures', 'mode'),
    [
        (((8, 1.0), (16, 1.2), (32, 1.5)), 'plain'),
        (((3, 1.0), (16, 1.2), (32, 1.5)), 'lean'),
        (((8, 1.09), (16, 1.0), (32, 1.5)), 'plain'),  # within the noise
        (((8, 1.2), (16, 1.0), (32, 1.5)), 'lean'),
        (((1, 1.0), (2, 1.2), (3, 1.5)), 'recompute'),
        (((0, 1.0), (0, 1.2), (0, 1.5)), None),
    ],
)
def test_best_mode(figures, mode):
    costs = [
        ModeCost(name, 1, largest, None, None, seconds)
        for name, (largest, seconds) in zip(MODES, figures, strict=True)
    ]
    best = best_mode(costs, GB, 4)
    assert (best and best.mode) == mode


def test_config_changes():
    cfg = demo()
    assert cfg.train_dataloader.batch_size == 8
    assert config_changes(cfg, 'plain', 8) == []
    lean, batch = 'model.backbone.memory=lean', 'train_dataloader.batch_size=3'
    assert config_changes(cfg, 'lean', 3) == [lean, batch]
    cfg.model.backbone.with_cp = True
    assert config_changes(cfg, 'recompute', 8) == []
    assert config_changes(cfg, 'lean', 8) == [lean, 'model.backbone.with_cp=False']
    cfg.model.backbone.with_cp = False
    cfg.model.backbone.memory = 'lean'
    assert config_changes(cfg, 'lean', 8) == []
    assert config_changes(cfg, 'plain', 8) == ['model.backbone.memory=plain']


def test_plan_memory(call_tool, tmp_path):
    arguments = [DEMOS['detection'], '--device', 'cpu', '--size', 64, 64, '--modes', 'lean']
    file = tmp_path / 'figures/plan.json'
    status, output, _ = call_tool(
        'plan_memory', *arguments, '--json', file, '--amp-dtype', 'bfloat16'
    )
    assert status == 0, output
    assert 'images of 64 x 64 with 24 GB, of which 21.0' in ' '.join(output.split())
    assert 'workspaces of cuDNN' in ' '.join(output.split())
    end = 'A batch of 8 per GPU fits with --cfg-options model.backbone.memory=lean.'
    assert output.splitlines()[-1] == end
    figures = json.loads(file.read_text())
    assert figures['size'] == [64, 64]
    assert [mode['mode'] for mode in figures['modes']] == ['lean']


@pytest.mark.slow
def test_plan_memory_in_a_process(run_tool):
    command = [sys.executable, ROOT / 'tools/plan_memory.py', DEMOS['detection'], '--device', 'cpu']
    status, output = run_tool(*command)
    assert status == 0, output
    assert output.splitlines()[-1].startswith('A batch of 8 per GPU fits with')
    small = ['--size', 64, 64, '--gpu-gb', 0.6, '--cfg-options', 'model.backbone.with_cp=True']
    status, output = run_tool(*command, *small)
    assert status == 1, output
    assert output.splitlines()[-1].startswith('not even a batch of 1 fits')


RECIPES = [
    ('detection/rdnet/mask-rcnn_rdnet-t_fpn_amp-ms-crop-3x_coco', 1),
    ('detection/rexnet/ssdlite_rexnet-1.0_600e_coco-320x320', 2),
    ('detection/condensenetv2/retinanet_condensenetv2-c_fpn_1x_coco', 1),
    ('segmentation/densenet/upernet_densenet-121_160k_ade20k-512x512', 2),
    ('segmentation/rexnet/unet_rexnet-1.0_25k_nyu-480x480', 2),
]


@pytest.mark.slow
@pytest.mark.parametrize(('config', 'smallest'), RECIPES, ids=[name for name, _ in RECIPES])
def test_recipes(config, smallest):
    cfg = load_config(str(ROOT / f'configs/{config}.py'))
    if 'mask-rcnn' in config:  # masks of 512 regions take a minute
        cfg.model.train_cfg.rcnn.sampler.num = 32
    plain, recompute = plan(cfg, size=(160, 160), modes=['plain', 'recompute'])
    assert plain.smallest == recompute.smallest == smallest
    assert plain.per_image > recompute.per_image > 0
