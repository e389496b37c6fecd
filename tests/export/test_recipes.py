"""Recipes from config to boxes and masks without torch: a file predicts as the model does."""

import numpy as np
import pytest
import torch
from families import FAMILIES
from mmengine.registry import MODELS
from PIL import Image

from mmdense.apis import Predictor
from mmdense.apis.export import export_onnx
from mmdense.config.read import load_config
from mmdense.errors import UserError
from mmdense.export.networks import build_network
from support import ROOT

pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')
from mmdense.runtime.models import open_model  # noqa: E402

WIDTH, CLASSES = 16, 3
ROI = dict(in_channels=WIDTH, fc_out_channels=32, num_classes=CLASSES)
POOL = dict(out_channels=WIDTH, featmap_strides=[4, 8])
TWO_STAGE = dict(rpn_head=dict(in_channels=WIDTH, feat_channels=WIDTH))
TWO_STAGE['rpn_head']['anchor_generator'] = dict(strides=[4, 8, 16])
MASKS = dict(
    mask_roi_extractor=POOL,
    mask_head=dict(in_channels=WIDTH, num_convs=1, conv_out_channels=8, num_classes=CLASSES),
)
DENSE = dict(num_classes=CLASSES, in_channels=WIDTH, feat_channels=WIDTH, stacked_convs=1)
DENSE['anchor_generator'] = dict(strides=[4, 8, 16])


def one_stage(model):
    return dict(neck=dict(num_outs=3, start_level=0), bbox_head=DENSE)


def ssd(model):
    channels = (*model.neck.in_channels, 32, 16, 16, 16)
    head = dict(num_classes=CLASSES, in_channels=channels)
    return dict(neck=dict(out_channels=channels), bbox_head=head)


def two_stage(model):
    head = model.roi_head.bbox_head
    if isinstance(head, list):
        convs = {'num_shared_convs', 'conv_out_channels'} & {*head[0]}
        head = [dict(x, **ROI, **dict.fromkeys(convs, 4)) for x in head]
    else:
        head = dict(ROI)
    masks = MASKS if model.roi_head.get('mask_head') else {}
    roi_head = dict(bbox_head=head, bbox_roi_extractor=POOL, **masks)
    return dict(TWO_STAGE, neck=dict(num_outs=3), roi_head=roi_head)


# Recipe -> family, and what changes for two feature maps of a tiny network. Of the slow ones too.
ALGORITHMS = {
    'rexnet/ssdlite_rexnet-1.0_600e_coco-320x320': ('ReXNet', ssd),
    'densenet/faster-rcnn_densenet-121_fpn_1x_coco': ('DenseNet', two_stage),
    'rdnet/retinanet_rdnet-t_fpn_1x_coco': ('RDNet', one_stage),
    'rdnet/mask-rcnn_rdnet-t_fpn_amp-ms-crop-3x_coco': ('RDNet', two_stage),
    'rdnet/cascade-mask-rcnn_rdnet-t_fpn_amp-ms-crop-3x_coco': ('RDNet', two_stage),
    'mmdet::cascade_rcnn/cascade-rcnn_r50_fpn_1x_coco': ('DenseNet', two_stage),
}
LAST = ('cls.weight', 'reg.weight', '2.weight', 'conv_logits.weight')
FAST = [*ALGORITHMS][:2]


def load(recipe, family='RDNet', change=two_stage):
    """Return a recipe's config for a tiny network and images of 96 x 64."""
    path = recipe if recipe.startswith('mmdet::') else ROOT / f'configs/detection/{recipe}'
    cfg = load_config(f'{path}.py')
    network = dict(FAMILIES[family].smallest, type=f'mmdense.{family}')
    if family == 'ReXNet':
        network.update(taps='stages', out_indices=(1, 2))
    cfg.model.backbone = network
    channels = MODELS.build(network).out_channels
    cfg.model.neck.in_channels = type(cfg.model.neck.in_channels)(channels)
    if 'out_channels' in cfg.model.neck and change is not ssd:
        cfg.model.neck.out_channels = WIDTH
    cfg.merge_from_dict(dict(model=change(cfg.model)))
    settings = cfg.model.test_cfg.get('rcnn', cfg.model.test_cfg)
    settings.update(score_thr=0.34, max_per_img=8)
    for transform in cfg.test_dataloader.dataset.pipeline:
        if transform['type'] == 'Resize':
            transform['scale'] = (96, 64)
    return cfg


def randomise(model):
    """Give a model weights by which scores and boxes differ, the same in any order of tests."""
    generator = torch.Generator().manual_seed(0)
    for name, x in model.state_dict().items():
        if name.endswith('bias'):
            x.zero_()
        if x.is_floating_point() and x.ndim > 1 and name.endswith('weight'):
            last = 0.3 if name.endswith(LAST) else 1.5  # no scores near 0 and 1, no huge boxes
            x.copy_(torch.randn(x.shape, generator=generator) * last / x[0].numel() ** 0.5)


@pytest.fixture(scope='module')
def pictures(project, tmp_path_factory):
    """Three files: two of one size, and an upright one."""
    files = sorted((project / 'data/digits/val').glob('*'))[:3]
    upright = tmp_path_factory.mktemp('pictures') / 'upright.png'
    Image.open(files[2]).crop((20, 0, 120, 170)).save(upright)
    return [*map(str, files[:2]), str(upright)]


def compare(found, sample, size):
    """Compare a file's prediction with a data sample; boxes of equal scores may change places."""
    expected = sample.pred_instances.numpy()
    assert len(found['scores']) == len(expected) > 0
    np.testing.assert_allclose(found['scores'], expected.scores, atol=1e-5)
    scale = max(size) / 64  # of differences, which were in pixels of the network's input
    distance = np.abs(found['bboxes'][:, None] - expected.bboxes).max(-1)
    near = (distance < 1e-3 * scale) & (found['labels'][:, None] == expected.labels)
    last = expected.scores.min() + 1e-5  # of a full list, whose end is a matter of ties
    for scores, paired in ((expected.scores, near.any(0)), (found['scores'], near.any(1))):
        assert (paired | (scores <= last)).all(), distance.min(1)
    if 'masks' in expected:
        masks = expected.masks[near.argmax(1)]
        assert 0 < masks.mean() < 1
        assert (found['masks'] ^ masks).mean() < 1e-3


@pytest.mark.parametrize(
    'recipe',
    [x if x in FAST else pytest.param(x, marks=pytest.mark.slow) for x in ALGORITHMS],
)
def test_a_file_predicts_as_the_model(recipe, pictures, tmp_path):
    cfg = load(recipe, *ALGORITHMS[recipe])
    predictor = Predictor(cfg, device='cpu')
    randomise(predictor.model)
    exported = export_onnx(predictor.model, tmp_path / 'x.onnx', config=cfg, size=(64, 96))
    assert (exported.fixed, exported.unread) == ('', '')
    assert exported.metadata['resize']['scale'] == [96, 64]
    for found, file in zip(open_model(exported.file, batch=2)(pictures), pictures, strict=True):
        compare(found, *predictor(file), Image.open(file).size)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'roi_head.bbox_roi_extractor.type': 'GenericRoIExtractor'}, 'GenericRoIExtractor with'),
        ({'roi_head.bbox_roi_extractor.roi_layer.pool_mode': 'max'}, 'average RoIAlign'),
        ({'roi_head.type': 'PISARoIHead'}, 'does not know PISARoIHead'),
        ({'roi_head.bbox_head.bbox_coder.type': 'LegacyDeltaXYWHBBoxCoder'}, 'Shared2FCBBoxHead'),
        ({'roi_head.bbox_head.with_reg': False}, 'Shared2FCBBoxHead'),
        ({'test_cfg.rcnn.nms.type': 'soft_nms'}, "not {'type': 'soft_nms'"),
        ({'test_cfg.rcnn.nms.class_agnostic': True}, 'by class'),
    ],
)
def test_other_parts_are_refused(changes, message):
    cfg = load('densenet/faster-rcnn_densenet-121_fpn_1x_coco')
    cfg.merge_from_dict({f'model.{key}': value for key, value in changes.items()})
    with pytest.raises(UserError, match=message):
        build_network(MODELS.build(cfg.model), 'model')
