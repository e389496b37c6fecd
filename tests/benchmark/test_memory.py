"""What training takes, and which memory mode fits."""

import copy
import json
import sys
from dataclasses import replace
from functools import partial

import pytest
import torch
from mmengine.config import Config

from mmdense.benchmark import memory as planner
from mmdense.benchmark.memory import (
    AS_IT_IS,
    GB,
    ModeCost,
    best,
    peak_bytes,
    plan,
    settings,
    usable,
)
from mmdense.config.edit import use_amp
from mmdense.config.image_size import training_size
from mmdense.config.read import load_config
from mmdense.errors import UserError
from support import DEMOS, ROOT

MODES = ['plain', 'lean', 'recompute']
TOOL = ROOT / 'tools/benchmark.py'


def demo(task='detection', **options):
    return load_config(str(DEMOS[task]), options=options)


@pytest.fixture(scope='module')
def costs():
    """What the demo detector takes in each of its modes."""
    return plan(demo(), size=(192, 192))


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
    # The argument stays; each result goes when the next one is there.
    assert peak_bytes(partial(chain, 5)) == 3_000_000
    # All results are kept, and at the peak the gradients of two of them are there.
    kept = peak_bytes(partial(chain, 5, requires_grad=True))
    assert 8_000_000 <= kept < 8_001_000
    assert peak_bytes(lambda: None) == 0


def test_what_was_there_before_is_not_in_a_peak():
    left = []
    for _ in range(2):
        assert peak_bytes(lambda: left.append(chain(2))) == 3_000_000
    assert peak_bytes(left.clear) == 0
    assert peak_bytes(partial(chain, 2)) == 3_000_000


def test_modes_are_ranked(costs):
    assert [cost.mode for cost in costs] == MODES
    plain, lean, recompute = (cost.per_image for cost in costs)
    assert plain > 1.2 * lean > 1.2 * recompute
    assert all(cost.seconds > 0 for cost in costs)
    assert all(cost.smallest == 1 < cost.ran for cost in costs)


def test_fixed_part_holds_weights_gradients_and_states(costs):
    cfg = demo()
    assert cfg.optim_wrapper.optimizer.type == 'AdamW'
    parameters = [*planner.build_training(cfg, 'cpu')[0].parameters()]
    weights = sum(4 * p.numel() for p in parameters)
    assert costs[0].fixed > 4 * weights
    cfg.optim_wrapper.optimizer = dict(type='SGD', lr=0.01)
    (without,) = plan(cfg, size=(192, 192), modes=['plain'])
    assert costs[0].fixed - without.fixed == 2 * weights + 4 * len(parameters)  # and step numbers


@pytest.mark.parametrize('width', [None, 1024], ids=['', 'more weights than activations'])
def test_larger_batches_are_predicted(width):
    cfg = demo(**({'model.roi_head.bbox_head.fc_out_channels': width} if width else {}))
    cost = plan(cfg, size=(64, 96), modes=['lean'])[0]
    cfg.model.backbone.memory = 'lean'
    model, wrapper = planner.build_training(cfg, 'cpu')
    planner._make_states(model, wrapper)
    held = sum(x.numel() * x.element_size() for x in (*model.parameters(), *model.buffers()))
    for state in wrapper.optimizer.state.values():
        held += sum(x.numel() * x.element_size() for x in state.values())
    measured = held + peak_bytes(partial(planner._train, cfg, model, wrapper, 6, (64, 96), []))
    assert abs((cost.fixed + 6 * cost.per_image) / measured - 1) < 0.05


@pytest.mark.parametrize(('fits', 'ran', 'per_image'), [(99, 8, 0.5), (7, 4, 0.2), (3, 2, 0.2)])
def test_batches_grow_until_activations_make_the_peak(fits, ran, per_image, monkeypatch):
    """Below, a gradient's copy makes it; what fits the machine is taken."""
    model = planner.build_training(demo(), 'cpu')[0]
    gradients = sum(4 * p.numel() for p in model.parameters() if p.requires_grad)

    def peak(run, device):
        if not isinstance(run, partial):
            return 0
        batch, times = run.args[3], run.args[-1]
        if batch > fits:
            raise torch.cuda.OutOfMemoryError
        times.append(1.0 * batch)
        return int(gradients * max(2.5 + 0.2 * batch, 1.3 + 0.5 * batch))

    monkeypatch.setattr(planner, 'peak_bytes', peak)
    (cost,) = plan(demo(), size=(64, 64), modes=['plain'])
    assert cost.ran == ran
    assert cost.per_image == pytest.approx(per_image * gradients, rel=1e-3)
    assert cost.seconds == 1.0


def test_largest_batch_fits_and_one_more_does_not():
    cost = ModeCost('plain', 2, 3, fixed=300, per_image=100, update=700, seconds=1.0)
    for extra, largest in ((399, 0), (400, 4), (499, 4), (500, 5), (1499, 14)):
        gpu_bytes = (planner.CONTEXT + 300 + extra) / (1 - planner.FRAGMENTS)
        assert cost.largest(gpu_bytes + 1e-3) == largest
    light = replace(cost, update=0)
    for extra, largest in ((199, 0), (201, 2)):
        gpu_bytes = (planner.CONTEXT + 300 + extra) / (1 - planner.FRAGMENTS)
        assert light.largest(gpu_bytes) == largest
    assert usable(0.5 * GB) == 0
    assert usable(24 * GB) == pytest.approx(21 * GB)


def test_update_needs_what_it_works_on(costs):
    weights = sum(4 * p.numel() for p in planner.build_training(demo(), 'cpu')[0].parameters())
    for cost in costs:
        assert 4 * weights < cost.update < 5 * weights


def test_mixed_precision_and_synchronised_norms_on_a_cpu(costs):
    norm = {'model.neck.norm_cfg': dict(type='SyncBN')}
    narrow = demo(**norm)
    use_amp(narrow, 'float16')
    before = copy.deepcopy(narrow)
    (cost,) = plan(narrow, size=(192, 192), modes=['plain'])
    assert cost.per_image < 0.8 * costs[0].per_image
    assert narrow.to_dict() == before.to_dict()


@pytest.mark.slow
def test_segmentor_needs_two_images_and_takes_the_size():
    cfg = demo('segmentation')
    small, large = (plan(cfg, size=size, modes=['plain'])[0] for size in ((128, 128), (128, 256)))
    assert small.smallest == 2  # its pooling norms one value per image
    assert 1.8 < large.per_image / small.per_image < 2.2
    assert cfg.model.data_preprocessor.size == (192, 192)


@pytest.mark.slow
def test_backbone_of_others_is_taken_as_it_is():
    resnet = dict(_delete_=True, type='ResNet', depth=18, base_channels=8, out_indices=(0, 1, 2))
    cfg = demo()
    cfg.merge_from_dict(dict(model=dict(backbone=resnet, neck=dict(in_channels=[8, 16, 32]))))
    (cost,) = plan(cfg, size=(64, 64))
    assert cost.mode == AS_IT_IS
    assert settings(cfg, cost.mode, 8) == []
    with pytest.raises(UserError, match=r"ResNet has no memory mode 'lean' \(it has: \[\]\)"):
        plan(cfg, size=(64, 64), modes=['lean'])


@pytest.mark.slow
def test_panoptic_detectors_learn_from_maps_of_labels(tmp_path):
    file = tmp_path / 'panoptic.py'
    file.write_text("_base_ = 'mmdet::panoptic_fpn/panoptic-fpn_r50_fpn_1x_coco.py'")
    cfg = load_config(str(file))
    cfg.model.train_cfg.rcnn.sampler.num = 32
    (cost,) = plan(cfg, size=(64, 96))
    assert cost.per_image > 0
    cfg.model.data_preprocessor.pad_seg = False
    with pytest.raises(UserError, match='^PanopticFPN learns from gt_sem_seg, which random images'):
        plan(cfg, size=(64, 96))


def test_mistakes_are_told(monkeypatch):
    with pytest.raises(UserError, match="RDNet has no memory mode 'less'"):
        plan(demo(), size=(64, 64), modes=['less'])
    with pytest.raises(UserError, match='has no optim_wrapper'):
        plan(demo(optim_wrapper=None), size=(64, 64))
    with pytest.raises(UserError, match='SoftTeacher has no backbone'):
        plan(Config(dict(model=dict(type='SoftTeacher'))), size=(64, 64))

    def wrong(*args):
        raise ValueError('another')

    monkeypatch.setattr(planner, '_train', wrong)
    with pytest.raises(ValueError, match='another'):
        plan(demo(), size=(64, 64))


@pytest.mark.parametrize('runs', [0, 1])
def test_gpu_with_too_little_memory_to_measure(runs, monkeypatch):
    def out_of_memory(cfg, model, wrapper, batch, size, times):
        if batch > runs:
            raise torch.cuda.OutOfMemoryError
        times.append(1.0)

    monkeypatch.setattr(planner, '_train', out_of_memory)
    (cost,) = plan(demo(), size=(64, 64), modes=['plain'])
    assert (cost.fixed, cost.per_image, cost.ran, cost.largest(24 * GB)) == (None, None, runs, runs)


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
        ModeCost(name, 1, largest, None, None, 0, seconds)
        for name, (largest, seconds) in zip(MODES, figures, strict=True)
    ]
    found = best(costs, GB, 4)
    assert (found and found.mode) == mode


def test_settings_that_the_best_mode_needs():
    cfg = demo()
    assert cfg.train_dataloader.batch_size == 8
    assert settings(cfg, 'plain', 8) == []
    memory, batch = 'model.backbone.memory=lean', 'train_dataloader.batch_size=3'
    assert settings(cfg, 'lean', 8) == [memory]
    assert settings(cfg, 'lean', 3) == [memory, batch]
    assert settings(cfg, 'plain', 9) == ['train_dataloader.batch_size=9']
    cfg.model.backbone.with_cp = True
    assert settings(cfg, 'recompute', 8) == []
    assert settings(cfg, 'lean', 8) == [memory, 'model.backbone.with_cp=False']
    cfg.model.backbone.with_cp = False
    cfg.model.backbone.memory = 'lean'
    assert settings(cfg, 'lean', 8) == []
    assert settings(cfg, 'plain', 8) == ['model.backbone.memory=plain']


@pytest.mark.parametrize(
    ('config', 'size'),
    [
        ('detection/rdnet/cascade-mask-rcnn_rdnet-t_fpn_amp-ms-crop-3x_coco', (800, 1344)),
        ('detection/densenet/faster-rcnn_densenet-121_fpn_ms-3x_coco', (800, 1344)),
        ('detection/rexnet/ssdlite_rexnet-1.0_600e_coco-320x320', (320, 320)),
        ('segmentation/rexnet/unet_rexnet-1.0_25k_nyu-480x480', (480, 480)),
    ],
)
def test_size_of_a_recipe(config, size):
    assert training_size(load_config(str(ROOT / f'configs/{config}.py'))) == size


@pytest.mark.parametrize(
    ('steps', 'size'),
    [
        ([dict(scale=(70, 50)), dict(type='RandomFlip')], (64, 96)),
        ([dict(scale=[(90, 40), (90, 60)])], (64, 96)),
        ([dict(scale=(500, 500)), dict(crop_size=(64, 64))], (64, 64)),
        ([dict(crop_size=(0.5, 0.5), crop_type='relative_range')], None),
        ([dict(transforms=[[dict(scale=(33, 33))], [dict(scales=[(9, 9), (65, 65)])]])], (96, 96)),
        ([dict(scale=(64, 64)), dict(transforms=[dict(type='RandomFlip')])], (64, 64)),
        ([dict(type='RandomFlip')], None),
        ([dict(crop_size=512)], (512, 512)),
        ([dict(scale=(99, 99)), dict(scale=640)], (640, 640)),
        ([dict(scale=(64, 64)), dict(scale=None, scale_factor=2.0)], (64, 64)),
        ([dict(scale=(-1, 512))], None),
        ([dict(scales=[480, 512, 640], resize_type='ResizeShortestEdge')], (640, 640)),
        ([dict(scale=(64, 64)), dict(transforms=dict(scale=(96, 96)))], (96, 96)),
        ([dict(scale=(64, 64)), dict(type='Pad', size=(128, 96))], (96, 128)),
    ],
)
def test_size_of_a_pipeline(steps, size):
    data = dict(type='RepeatDataset', dataset=dict(pipeline=steps))
    cfg = Config(dict(model=dict(), train_dataloader=dict(dataset=data)), filename=None)
    if size:
        assert training_size(cfg) == size
        return
    with pytest.raises(UserError, match='give --size H W'):
        training_size(cfg)


def test_size_behind_several_data_sets():
    small, large = ([dict(scale=(side, side))] for side in (64, 640))
    for data in (
        dict(dataset=dict(pipeline=small), pipeline=large),  # as of mmdet's MultiImageMixDataset
        dict(datasets=[dict(pipeline=large)] * 2),
    ):
        cfg = Config(dict(model=dict(), train_dataloader=dict(dataset=data)))
        assert training_size(cfg) == (640, 640)


@pytest.mark.slow
def test_command_plans_a_demo(run_tool, tmp_path):
    command = [sys.executable, TOOL, 'memory', DEMOS['detection'], '--device', 'cpu']
    file = tmp_path / 'figures/plan.json'
    status, said = run_tool(
        *command, '--json', file, '--modes', 'lean', 'recompute', '--amp-dtype', 'bfloat16'
    )
    assert status == 0, said
    assert 'images of 192 x 192 with 24 GB, of which 21.0' in ' '.join(said.split())
    assert 'workspaces of cuDNN' in said
    last = said.splitlines()[-1]
    assert last.startswith('A batch of 8 per GPU fits with --cfg-options model.backbone.memory=')
    figures = json.loads(file.read_text())
    assert figures['size'] == [192, 192]
    assert [mode['mode'] for mode in figures['modes']] == ['lean', 'recompute']
    options = ['--size', 64, 64, '--gpu-gb', 0.6, '--cfg-options', 'model.backbone.with_cp=True']
    status, said = run_tool(*command, *options)
    assert status == 1, said
    assert said.splitlines()[-1].startswith('not even a batch of 1 fits')


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
    found = plan(cfg, size=(160, 160), modes=['plain', 'recompute'])
    assert [cost.smallest for cost in found] == [smallest] * 2
    plain, recompute = (cost.per_image for cost in found)
    assert plain > recompute > 0
