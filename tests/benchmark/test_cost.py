"""Multiply-adds against counts by hand and against a real forward pass."""

import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope, init_default_scope
from mmengine.structures import InstanceData
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import mmdense  # noqa: F401
from mmdense.benchmark import backbone_macs, count_parameters, model_macs
from support import DEMOS, ROOT


@pytest.fixture(autouse=True)
def _scope():
    yield
    DefaultScope._instance_dict.clear()


def build(path, device='meta'):
    cfg = Config.fromfile(path)
    init_default_scope(cfg.default_scope)
    with torch.device(device):
        return MODELS.build(cfg.model).eval()


def test_by_hand():
    with torch.device('meta'):
        net = nn.Sequential(nn.Conv2d(5, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4))
    assert backbone_macs(net, (8, 12), in_channels=5) == 4 * 6 * 8 * 5 * 9 + 2 * 4 * 8 * 2 * 9
    assert count_parameters(net) == 8 * 5 * 9 + 8 + 8 * 2 * 9 + 8


@pytest.mark.parametrize(
    'config',
    [
        DEMOS['detection'],
        ROOT / 'configs/detection/rdnet/cascade-mask-rcnn_rdnet-t_fpn_amp-ms-crop-3x_coco.py',
    ],
    ids=lambda p: p.stem,
)
def test_two_stage_parts_add_up_to_a_forward_pass(config):
    parts = model_macs(build(config), (64, 96), num_boxes=6, num_masks=6)
    model = build(config, 'cpu')
    sample = DetDataSample(metainfo=dict(img_shape=(64, 96)))
    boxes = torch.tensor([[i, i, 20.0 + 5 * i, 30.0] for i in range(6)])
    proposals = InstanceData(bboxes=boxes)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        maps = model.extract_feat(torch.randn(1, 3, 64, 96))
        model.rpn_head(maps)
        model.roi_head.forward(maps, [proposals], [sample])
    assert sum(parts.values()) == counter.get_total_flops() // 2
    assert {'backbone', 'neck', 'rpn_head', 'bbox_head'} <= set(parts)
    assert ('mask_head' in parts) == model.roi_head.with_mask


@pytest.mark.parametrize(
    'config',
    [DEMOS['segmentation'], ROOT / 'configs/detection/rdnet/retinanet_rdnet-t_fpn_1x_coco.py'],
    ids=lambda p: p.stem,
)
def test_other_parts_add_up_to_a_forward_pass(config):
    model = build(config)
    parts = model_macs(model, (64, 96))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, 64, 96, device='meta'), [], mode='tensor')
    assert sum(parts.values()) == counter.get_total_flops() // 2
    assert 'auxiliary_head' not in parts


def test_other_models_are_refused():
    model = nn.Module()
    model.backbone = nn.Conv2d(3, 3, 1, device='meta')
    with pytest.raises(ValueError, match='Module: no rpn_head, bbox_head or decode_head'):
        model_macs(model, (8, 8))
