"""Channels that follow from the backbone, and backbones that replace others."""

import pytest
import torch
from families import FAMILIES
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, DefaultScope
from torch import nn

from mmdense.benchmark.memory import build_training, random_batch, training_step
from mmdense.config.channels import backbone_maps, fill_channels, put_backbone
from mmdense.config.read import load_config
from mmdense.errors import UserError
from support import DEMOS, ROOT

TINY = dict(stem=16, growth=(8, 16), down=(1,), blocks=1, gate_from=1)


def demo(task, **options):
    return load_config(str(DEMOS[task]), options=options)


def test_auto_is_what_the_neck_reads():
    cfg = demo('detection', **{'model.neck.in_channels': 'auto'})
    assert cfg.model.neck.in_channels == [64, 96, 144]


def test_auto_is_what_each_head_reads():
    options = {f'model.{name}.in_channels': 'auto' for name in ('decode_head', 'auxiliary_head')}
    cfg = demo('segmentation', **options, **{'model.auxiliary_head.in_index': 1})
    assert cfg.model.decode_head.in_channels == [64, 96, 144]
    assert cfg.model.auxiliary_head.in_channels == 96


@pytest.mark.parametrize(
    ('place', 'head'),
    [
        ('detector.neck', {}),  # SoftTeacher's
        ('teacher_config.model.neck', {}),
        ('panoptic_head', {}),  # Mask2Former's
        ('decode_head.kernel_generate_head', dict(in_index=[0, 1, 2])),  # K-Net's
    ],
)
def test_auto_inside_other_parts(place, head):
    *outer, last = place.split('.')
    node = {last: dict(type='Part', in_channels='auto', **head)}
    backbone = demo('detection').model.backbone
    if last == 'neck':
        node['backbone'] = backbone
    for name in reversed(outer):
        node = {name: node}
    model = node if last == 'neck' else dict(node, backbone=backbone)
    cfg = Config(dict(default_scope='mmdet', model=model))
    fill_channels(cfg)
    part = cfg.model
    for name in place.split('.'):
        part = part[name]
    assert part.in_channels == [64, 96, 144]


def test_auto_elsewhere_is_refused():
    with pytest.raises(UserError, match=r"faster-rcnn_rdnet.*in_channels='auto' works in parts"):
        demo('detection', **{'model.rpn_head.in_channels': 'auto'})


def test_maps_of_a_backbone_without_out_channels():
    resnet = dict(type='ResNet', depth=18, out_indices=(0, 2), init_cfg='none')
    assert backbone_maps(resnet, 'mmdet') == ((64, 256), (4, 16), (0, 2))


def test_maps_of_a_backbone_that_cannot_be_built_on_meta():
    swin = dict(type='SwinTransformer', embed_dims=24, depths=(1, 1, 1, 1), num_heads=(1, 1, 1, 1))
    assert backbone_maps(swin, 'mmdet')[:2] == ((24, 48, 96, 192), (4, 8, 16, 32))


@pytest.mark.parametrize(
    ('backbone', 'indices', 'channels'),
    [
        (dict(type='mmdense.DenseNet', arch='121'), [0, 1, 2], [256, 512, 1024]),
        (dict(type='mmdense.ReXNet', arch='1.0'), [1, 2, 3], [38, 61, 128]),
        (dict(type='mmdense.TimmBackbone', model_name='resnet18'), [1, 2, 3], [64, 128, 256]),
        (dict(type='mmdense.TimmBackbone', model_name='convnext_atto'), [0, 1, 2], [40, 80, 160]),
    ],
)
@pytest.mark.parametrize('task', DEMOS)
def test_put_backbone(task, backbone, indices, channels):
    cfg = demo(task)
    put_backbone(cfg, backbone)
    assert cfg.model.backbone == dict(backbone, out_indices=indices)
    if task == 'detection':
        assert cfg.model.neck.in_channels == channels
    else:
        assert cfg.model.decode_head.in_channels == channels
        assert cfg.model.auxiliary_head.in_channels == channels[2]


WEIGHTS = dict(init_cfg=dict(type='Pretrained', checkpoint='x.pth'))


@pytest.mark.parametrize('detector', ['faster-rcnn', 'retinanet'])  # four feature maps, and three
def test_what_was_frozen_stays_frozen(detector):
    recipe = f'configs/detection/rexnet/{detector}_rexnet-1.0_fpn_1x_coco.py'
    cfg = load_config(str(ROOT / recipe))
    assert cfg.model.backbone.frozen_stages == 2  # the stages up to stride 4
    put_backbone(cfg, dict(type='mmdense.DenseNet', arch='121', **WEIGHTS))
    assert cfg.model.backbone.frozen_stages == 1
    assert cfg.model.backbone.norm_eval
    put_backbone(cfg, dict(type='mmdense.TimmBackbone', model_name='resnet18', **WEIGHTS))
    assert cfg.model.backbone.frozen_stages == 2  # its first feature map has stride 2
    cfg.model.backbone = ConfigDict(
        type='ResNet', depth=50, frozen_stages=1, norm_eval=False, out_indices=(1, 2, 3)
    )
    ignored = dict(norm_eval=True, frozen_stages=4)
    put_backbone(cfg, dict(type='mmdense.ReXNet', arch='1.0', **WEIGHTS, **ignored))
    assert cfg.model.backbone.frozen_stages == 2
    assert not cfg.model.backbone.norm_eval


# Output norms and a pyramid have no pretrained weights, and train.
WITHOUT_WEIGHTS = [
    dict(type='mmdense.RDNet', **FAMILIES['RDNet'].network, output_norm=True),
    dict(type='mmdense.TimmBackbone', model_name='test_vit'),
]
COMPLETE = [
    dict(type='mmdense.DenseNet', **FAMILIES['DenseNet'].network),
    dict(type='mmdense.TimmBackbone', model_name='test_resnet'),
]


@pytest.mark.parametrize('backbone', [*WITHOUT_WEIGHTS, *COMPLETE])
@pytest.mark.parametrize('frozen', [True, False])
def test_training_changes_nothing_in_a_frozen_backbone(backbone, frozen):
    cfg = demo('detection')
    put_backbone(cfg, backbone, frozen=frozen)
    model, wrapper = build_training(cfg, 'cpu')
    model.init_weights()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    for _ in range(2):
        training_step(model, wrapper, random_batch(2, (64, 96), scope='mmdet'))
        wrapper.step()
    changed = {
        name for name, old in before.items() if not torch.equal(model.state_dict()[name], old)
    }
    assert 'neck.lateral_convs.0.conv.weight' in changed
    changed = {name.removeprefix('backbone.') for name in changed if 'backbone.' in name}
    learned = {name for name in changed if not name.startswith(model.backbone.not_pretrained)}
    assert bool(learned) != frozen
    assert bool(changed - learned) == (backbone in WITHOUT_WEIGHTS)


@pytest.mark.parametrize(
    ('base', 'channels'),
    [
        ('yolo/yolov3_d53_8xb8-320-273e_coco', [96, 192, 48]),  # of strides 32, 16 and 8
        ('centernet/centernet_r18_8xb16-crop512-140e_coco', 96),  # of stride 32
        ('faster_rcnn/faster-rcnn_r50-caffe_c4-1x_coco', None),
        ('cornernet/cornernet_hourglass104_8xb6-210e-mstest_coco', None),
    ],
)
def test_necks_from_coarse_to_fine_and_none(base, channels, tmp_path):
    (tmp_path / 'x.py').write_text(f"_base_ = 'mmdet::{base}.py'")
    cfg = load_config(str(tmp_path / 'x.py'))
    backbone = dict(type='mmdense.TimmBackbone', model_name='test_resnet')
    if channels is None:
        with pytest.raises(UserError, match='x.py has no neck: only detectors with one take'):
            put_backbone(cfg, backbone)
        return
    put_backbone(cfg, backbone)
    assert cfg.model.neck.in_channels == channels
    model, wrapper = build_training(cfg, 'cpu')
    training_step(model, wrapper, random_batch(2, (64, 64), scope='mmdet'))


def test_random_weights_are_not_frozen():
    cfg = load_config(str(ROOT / 'configs/detection/rexnet/faster-rcnn_rexnet-1.0_fpn_1x_coco.py'))
    put_backbone(cfg, dict(type='mmdense.DenseNet', arch='121', norm_eval=True, frozen_stages=1))
    assert not {'frozen_stages', 'norm_eval'} & cfg.model.backbone.keys()


def test_ssdlite_takes_another_backbone():
    path = ROOT / 'configs/detection/rexnet/ssdlite_rexnet-1.0_600e_coco-320x320.py'
    cfg = load_config(str(path), options={'model.backbone.out_indices': [3, 4]})
    cfg.model.neck.in_channels = [128, 185]
    cfg.model.bbox_head.in_channels = [128, 185, 512, 256, 256, 128]
    cfg.model.neck.out_channels = cfg.model.bbox_head.in_channels
    put_backbone(cfg, dict(type='mmdense.DenseNet', arch='121'))
    assert cfg.model.neck.in_channels == [1024, 1024]
    assert cfg.model.neck.out_channels == [1024, 1024, 512, 256, 256, 128]
    assert cfg.model.bbox_head.in_channels == cfg.model.neck.out_channels
    with DefaultScope.overwrite_default_scope('mmdet'):
        assert isinstance(MODELS.build(cfg.model), nn.Module)


def test_missing_strides():
    cfg = demo('detection')
    two = dict(type='mmdense.RDNet', arch=TINY)
    with pytest.raises(UserError, match=r'at strides 4, 8, 16, but mmdense.RDNet has .* 4, 8$'):
        put_backbone(cfg, two)
    unet = 'configs/segmentation/rexnet/unet_rexnet-1.0_160k_ade20k-512x512.py'
    cfg = load_config(str(ROOT / unet))
    with pytest.raises(UserError, match='reads feature maps at strides 2, 4, 8'):
        put_backbone(cfg, dict(type='mmdense.DenseNet', arch='121'))


def test_configs_without_auto_are_not_built(monkeypatch):
    monkeypatch.setattr('mmdense.config.channels.backbone_maps', None)  # would build it
    fill_channels(Config(dict(model=dict(backbone=dict(type='Nothing'), neck=dict(type='FPN')))))
