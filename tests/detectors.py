"""Tiny detectors by mmdet's configs, and comparisons of batched boxes with their predict()."""

import copy

import torch
from families import FAMILIES
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

import mmdense.models  # noqa: F401  (registers the backbones)
from mmdense.patches import find_config

CLASSES, WIDTH = 3, 32
SOFTMAX = dict(embed_dims=WIDTH, loss_cls=dict(_delete_=True, type='CrossEntropyLoss'))


def _dense(channels, **head):
    neck = dict(in_channels=channels, out_channels=WIDTH, start_level=0, num_outs=3)
    head = dict(in_channels=WIDTH, feat_channels=WIDTH, stacked_convs=1, **head)
    return dict(neck=neck, bbox_head=dict(num_classes=CLASSES, **head))


def _anchors(channels, **head):
    return _dense(channels, anchor_generator=dict(strides=[4, 8, 16]), **head)


def _points(channels, **head):
    ranges = ((-1, 16), (16, 32), (32, 1e8))
    return _dense(channels, strides=[4, 8, 16], regress_ranges=ranges, **head)


def _vfnet(channels):
    scales = dict(octave_base_scale=8, scales_per_octave=1, ratios=[1.0], strides=[4, 8, 16])
    anchors = dict(type='AnchorGenerator', center_offset=0.0, **scales)
    return _points(channels, anchor_generator=anchors)


def _rtmdet(channels):
    neck = dict(in_channels=channels, out_channels=WIDTH, num_csp_blocks=1)
    head = dict(in_channels=WIDTH, feat_channels=WIDTH, num_classes=CLASSES)
    return dict(neck=neck, bbox_head=dict(anchor_generator=dict(strides=[4, 8]), **head))


def _detr(channels, width=WIDTH):
    across = dict(embed_dims=width, num_heads=2, num_levels=2)
    ffn = dict(embed_dims=width, feedforward_channels=2 * width)
    layer = dict(self_attn_cfg=dict(embed_dims=width, num_heads=2), cross_attn_cfg=across)
    return dict(
        num_queries=10,
        num_feature_levels=2,
        neck=dict(in_channels=channels, out_channels=width, num_outs=2),
        encoder=dict(num_layers=1, layer_cfg=dict(self_attn_cfg=across, ffn_cfg=ffn)),
        decoder=dict(num_layers=2, layer_cfg=dict(**layer, ffn_cfg=ffn)),
        positional_encoding=dict(num_feats=width // 2),
        bbox_head=dict(num_classes=CLASSES, embed_dims=width),
        test_cfg=dict(max_per_img=12),
    )


# Name -> mmdet's config and what changes for two feature maps of a tiny backbone.
DETECTORS = dict(
    atss=('atss/atss_r50_fpn_1x_coco', _anchors),
    fcos=('fcos/fcos_r50-caffe_fpn_gn-head_1x_coco', _points),
    fcos_centered=(
        'fcos/fcos_r50-caffe_fpn_gn-head-center-normbbox-centeronreg-giou_1x_coco',
        _points,
    ),
    gfl=('gfl/gfl_r50_fpn_1x_coco', _anchors),
    rtmdet=('rtmdet/rtmdet_tiny_8xb32-300e_coco', _rtmdet),
    rtmdet_exp=('rtmdet/rtmdet_l_8xb32-300e_coco', _rtmdet),
    vfnet=('vfnet/vfnet_r50_fpn_1x_coco', _vfnet),  # deformable convolutions
    ddod=('ddod/ddod_r50_fpn_1x_coco', _anchors),
    autoassign=('autoassign/autoassign_r50-caffe_fpn_1x_coco', _points),
    fsaf=('fsaf/fsaf_r50_fpn_1x_coco', _anchors),
    paa=('paa/paa_r50_fpn_1x_coco', _anchors),
    deformable_detr=('deformable_detr/deformable-detr_r50_16xb2-50e_coco', _detr),
    deformable_detr_refine=('deformable_detr/deformable-detr-refine_r50_16xb2-50e_coco', _detr),
    deformable_detr_twostage=(  # mmdet's proposals have 256 channels
        'deformable_detr/deformable-detr-refine-twostage_r50_16xb2-50e_coco',
        lambda c: _detr(c, 256),
    ),
    deformable_detr_softmax=(
        'deformable_detr/deformable-detr_r50_16xb2-50e_coco',
        lambda c: _detr(c) | dict(bbox_head=SOFTMAX, test_cfg=dict(max_per_img=8)),
    ),
    dino=('dino/dino-4scale_r50_8xb2-12e_coco', _detr),
    ddq=('ddq/ddq-detr-4scale_r50_8xb2-12e_coco', _detr),
)


def build(name, family='RDNet', **options):
    """Return a detector whose scores and boxes differ, with options of the model's config."""
    network = dict(type=f'mmdense.{family}', **(FAMILIES[family].smallest))
    channels = list(MODELS.build(network).out_channels)
    file, change = DETECTORS[name]
    cfg = Config.fromfile(find_config(f'mmdet::{file}.py'))
    for part in (dict(backbone=dict(_delete_=True, **network)), change(channels), options):
        cfg.merge_from_dict(dict(model=copy.deepcopy(part)))
    generator = torch.Generator().manual_seed(0)
    gain = 1.6 if 'rtmdet' in name else 0.8 if 'num_queries' in cfg.model else 1.2
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(cfg.model).eval().requires_grad_(False)
    for name, x in model.state_dict().items():
        if x.is_floating_point() and x.ndim > 1 and name.endswith(('weight', 'embed')):
            x.copy_(torch.randn(x.shape, generator=generator) * gain / x[0].numel() ** 0.5)
        elif x.is_floating_point() and x.ndim == 1:
            x.copy_(torch.rand(x.shape, generator=generator) - (0.5 if 'bias' in name else -0.5))
    return model


def images(number, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (number, 3, height, width)
    return torch.randint(256, shape, generator=generator).to(torch.uint8)


@torch.no_grad()
def predict(model, network, pixels):
    """Return the predictions of a model for pixels, with a network's padding."""
    x, size = network.preprocess(pixels), tuple(pixels.shape[2:])
    meta = dict(img_shape=size, ori_shape=size, batch_input_shape=tuple(x.shape[2:]))
    samples = [DetDataSample(metainfo=dict(meta)) for _ in x]
    return [sample.pred_instances for sample in model.predict(x, samples, rescale=False)]


def same_boxes(outputs, predictions):
    """Compare boxes, scores and labels of a batch with predictions; equal scores in any order."""
    for boxes, scores, labels, expected in zip(*outputs, predictions, strict=True):
        boxes, scores, labels = (torch.as_tensor(x) for x in (boxes, scores, labels))
        count = int((scores > 0).sum())
        assert count == len(expected)
        torch.testing.assert_close(scores[:count], expected.scores, rtol=0, atol=1e-5)
        near = torch.cdist(boxes[:count], expected.bboxes, p=torch.inf) < 1e-3
        near &= (scores[:count, None] - expected.scores).abs() < 1e-5
        near &= labels[:count, None] == expected.labels
        assert near.any(0).all()
        assert near.any(1).all()
