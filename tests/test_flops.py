"""MACs against counts by hand and against a forward pass."""

from functools import partial

import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import InstanceData
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry
from torchvision.ops import DeformConv2d, roi_align, roi_pool

import mmdense  # noqa: F401
from mmdense import flops as cost
from mmdense.flops import Cost, backbone_macs, count_parameters, model_costs
from support import DEMOS, ROOT


def build(path, device='meta'):
    cfg = Config.fromfile(path)
    with torch.device(device), DefaultScope.overwrite_default_scope(cfg.default_scope):
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
    parts = model_costs(build(config), (64, 96), num_boxes=6, num_masks=6)
    model = build(config, 'cpu')
    sample = DetDataSample(metainfo=dict(img_shape=(64, 96)))
    boxes = torch.tensor([[i, i, 20.0 + 5 * i, 30.0] for i in range(6)])
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        features = model.extract_feat(torch.randn(1, 3, 64, 96))
        model.rpn_head(features)
        model.roi_head.forward(features, [InstanceData(bboxes=boxes)], [sample])
    assert sum(parts.values(), Cost()).macs == counter.get_total_flops() // 2
    assert {'backbone', 'neck', 'rpn_head', 'bbox_head'} <= set(parts)
    assert ('mask_head' in parts) == model.roi_head.with_mask


@pytest.mark.parametrize(
    'config',
    [DEMOS['segmentation'], ROOT / 'configs/detection/rdnet/retinanet_rdnet-t_fpn_1x_coco.py'],
    ids=lambda p: p.stem,
)
def test_other_parts_add_up_to_a_forward_pass(config):
    model = build(config)
    parts = model_costs(model, (64, 96))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, 64, 96, device='meta'), [], mode='tensor')
    assert sum(parts.values(), Cost()).macs == counter.get_total_flops() // 2
    assert parts.get('auxiliary_head', Cost()).macs == 0


def test_other_models_are_refused():
    model = nn.Module()
    model.backbone = nn.Conv2d(3, 3, 1, device='meta')
    with pytest.raises(ValueError, match='Module: no rpn_head, bbox_head or decode_head'):
        model_costs(model, (8, 8))


def test_products_that_torch_leaves_out_are_counted(log):
    conv = DeformConv2d(4, 6, 3, stride=2, padding=1, groups=2).to('meta')
    deformed = partial(conv, offset=torch.empty(1, 18, 4, 6, device='meta'))
    assert backbone_macs(deformed, (8, 12), in_channels=4) == 4 * 6 * 6 * 2 * 9

    def run(x):  # [N, C, H, W]
        y, image = x.new_zeros(5, 7), x.flatten(1)
        y.addmm_(image.new_empty(5, 11), image.new_empty(11, 7))
        return y[None].baddbmm_(x.new_empty(1, 5, 13), x.new_empty(1, 13, 7))

    assert backbone_macs(run, (8, 8)) == 5 * 7 * (11 + 13)
    assert not log


@torch.library.custom_op('mmdense_test::mystery', mutates_args=())
def mystery(x: torch.Tensor) -> torch.Tensor:
    return x.clone()


@mystery.register_fake
def _(x):
    return torch.empty_like(x)


def test_uncounted_operators_are_named(log):
    """Products that torch's counter doesn't know, and operators of other libraries."""

    def run(x):
        vector = x.new_empty(9)
        return mystery(x), torch.mv(x.new_empty(5, 9), vector), mystery(x), vector.dot(vector)

    assert backbone_macs(run, (8, 8)) == 0
    names = 'aten::dot (1 call), aten::mv (1 call), mmdense_test::mystery (2 calls)'
    assert log == [f'not counted: {names}']


def test_parts_of_a_model_are_named_together(log):
    model = nn.Module()
    model.backbone = lambda x: [mystery(x)]
    model.decode_head = nn.Module()
    model.decode_head.predict = lambda features, metas, cfg: mystery(features[0])
    assert model_costs(model, (8, 8)) == dict(backbone=Cost(), decode_head=Cost())
    assert log == ['not counted: mmdense_test::mystery (2 calls)']


def test_the_pattern_matches_all_products_of_torch():
    """Every operator that torch has a formula for."""
    names = [str(packet).partition('.')[2] for packet in flop_registry if '.' in str(packet)]
    assert len(names) > 10
    assert [name for name in names if not cost.PRODUCT.search(name)] == []
    for name in ('mul', 'upsample_bilinear2d', 'native_layer_norm', 'linalg_vector_norm'):
        assert not cost.PRODUCT.search(name)


def test_other_operators_are_not_named(log):
    with torch.device('meta'):
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.GELU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Upsample(scale_factor=2, mode='bilinear'),
            nn.GroupNorm(2, 8),
            nn.Softmax(1),
        )
    backbone_macs(net.eval(), (8, 8))
    model_costs(build(DEMOS['detection']), (64, 64))
    backbone_macs(
        lambda x: (roi_align(x, x.new_empty(4, 5), 7), roi_pool(x, x.new_empty(4, 5), 7)), (64, 64)
    )
    assert not log
