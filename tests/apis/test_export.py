"""ONNX files of parts of models and of segmentors: their content, dynamic axes, refusals."""

import copy
import inspect
import json
from itertools import chain

import pytest
import torch
from families import image, randomise, same
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmseg.structures import SegDataSample
from torch import nn

from mmdense.apis import export
from mmdense.apis.export import export_onnx
from mmdense.errors import UserError
from mmdense.export.networks import AdaptivePool, Preprocessing, build_network
from mmdense.models import CondenseNetV2
from support import DEMOS, ROOT

onnx = pytest.importorskip('onnx')
onnxruntime = pytest.importorskip('onnxruntime')
if 'custom_translation_table' not in inspect.signature(torch.onnx.export).parameters:
    pytest.skip('torch is too old for ONNX', allow_module_level=True)

# The smallest with all their parts, and feature maps of strides 4 and 8.
FAMILIES = {
    'RDNet': dict(arch=dict(stem=8, growth=(8, 8), down=(1,), blocks=2, gate_from=1)),
    'DenseNet': dict(arch=dict(growth_rate=8, layers=(2, 2))),
    'CondenseNetV2': dict(
        arch=dict(layers=(1, 1, 2), growth=(8, 4, 8), groups=4, hard_swish_from=1, gated_from=2),
        out_indices=(1, 2),
    ),
    'ReXNet': dict(arch=dict(width=0.25, depth=0.4), out_indices=(1, 2)),
    'ShuffleNetV2': dict(
        arch=dict(channels=(20, 40, 80), units=(1, 1, 1), stem=4, last=64), out_indices=(0, 1)
    ),
    'TimmBackbone': dict(model_name='mobilenetv2_035', out_indices=(1, 2)),
}
DEPLOYED = ('RDNet', 'DenseNet', 'CondenseNetV2', 'ReXNet')
SIZE = (64, 96)
AXES_OF_SCORES = ('cls_score_0_height', 'cls_score_0_width')


def backbone(family, **options):
    torch.manual_seed(0)
    net = MODELS.build(dict(type=f'mmdense.{family}', **{**FAMILIES[family], **options}))
    if isinstance(net, CondenseNetV2):
        net.prune_to(1.0)
    return randomise(net).eval().requires_grad_(False)


class Features(nn.Module):
    """A model that ends in a neck."""

    def __init__(self, net):
        from mmdet.models.necks import FPN

        super().__init__()
        self.backbone = net
        self.neck = FPN(list(net.out_channels), 8, num_outs=3)


def build(cfg):
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        return randomise(MODELS.build(cfg.model)).eval().requires_grad_(False)


def pixels(*size, batch=1):
    return torch.randint(256, (batch, 3, *size), generator=torch.Generator().manual_seed(1)).byte()


def compare(exported, model, images):
    """Compare a file's outputs for images with those of a function of preprocessed ones."""
    session = onnxruntime.InferenceSession(exported.file, providers=['CPUExecutionProvider'])
    outputs = [torch.from_numpy(x) for x in session.run(None, dict(images=images.numpy()))]
    if exported.metadata['task'] == 'semantic segmentation':
        segmentation, *outputs = outputs
        assert (segmentation == outputs[0].argmax(1)).all()
    preprocess = Preprocessing(exported.network.model)
    preprocess.divisor = exported.metadata['input']['divisor']
    same(outputs, model(preprocess(images)), 1e-4)


def logits(model):
    return lambda x: [model.encode_decode(x, [dict(img_shape=x.shape[2:])])]


@pytest.mark.parametrize(
    ('family', 'deploy'),
    [
        *((family, True) for family in DEPLOYED),
        *(pytest.param(family, False, marks=pytest.mark.slow) for family in FAMILIES),
    ],
)
def test_every_family_in_both_forms(family, deploy, tmp_path):
    model = Features(backbone(family)).eval().requires_grad_(False)
    exported = export_onnx(model, tmp_path / 'net.onnx', size=SIZE, deploy=deploy)
    assert getattr(model.backbone, 'form', None) != 'deployed'  # not modified
    assert (exported.metadata['part'], exported.fixed) == ('neck', '')
    assert exported.shapes['images'] == ('batch', 3, 'height', 'width')
    assert exported.shapes['p3'] == ('batch', 8, 'p3_height', 'p3_width')
    assert list(exported.shapes) == ['images', 'p2', 'p3', 'p4']
    assert list(exported.batches) == [(1, 64, 96), (3, 64, 96), (2, 96, 160), (1, 65, 127)]
    assert all(difference < 1e-4 for difference in exported.differences.values())
    compare(exported, lambda x: model.neck(model.backbone(x)), image(77, 131, batch=2))
    # The file needs no other, has standard operators only, and no paths of this machine.
    assert [path.name for path in tmp_path.iterdir()] == ['net.onnx']
    file = onnx.load(exported.file)
    onnx.checker.check_model(file)
    assert {node.domain for node in file.graph.node} == {''}
    assert not file.functions
    assert exported.opset == file.opset_import[0].version
    assert exported.bytes == exported.file.stat().st_size
    assert b'mmdense/models' not in exported.file.read_bytes()
    metadata = json.loads({entry.key: entry.value for entry in file.metadata_props}['mmdense'])
    assert metadata == exported.metadata
    assert (metadata['backbone'], metadata['input']['normalized']) == (family, False)


@pytest.mark.slow
def test_condensed_forms(tmp_path):
    net = backbone('CondenseNetV2')
    expected = copy.deepcopy(net)
    net.condense()
    for deploy in (False, True):
        exported = export_onnx(net, tmp_path / 'net.onnx', size=SIZE, deploy=deploy)
        assert list(exported.shapes) == ['images', 'c2', 'c3']
        compare(exported, expected, image(65, 50, batch=2))


def test_backbone_of_fixed_size(tmp_path):
    model = build(Config.fromfile(DEMOS['detection']))
    exported = export_onnx(model, tmp_path / 'net.onnx', part='backbone', size=SIZE, fixed=True)
    assert list(exported.shapes) == ['images', 'c2', 'c3', 'c4']
    assert exported.shapes['c2'] == (1, 64, 16, 24)
    assert (exported.fixed, len(exported.batches)) == ('', 1)
    mean = [123.675, 116.28, 103.53]
    assert exported.metadata['input'] == dict(
        channels='RGB',
        dtype='uint8',
        normalized=True,
        mean=mean,
        std=[58.395, 57.12, 57.375],
        order='RGB',
        divisor=32,
    )
    with pytest.raises(UserError, match='FasterRCNN has no dense head with raw outputs'):
        export_onnx(model, tmp_path / 'net.onnx', part='raw', size=SIZE)


@pytest.mark.slow
def test_dense_detector(tmp_path):
    net = backbone('ReXNet', out_indices=(2, 3, 4))
    cfg = Config.fromfile(ROOT / 'configs/detection/rexnet/retinanet_rexnet-1.0_fpn_1x_coco.py')
    cfg.model.backbone = dict(FAMILIES['ReXNet'], type='mmdense.ReXNet', out_indices=(2, 3, 4))
    cfg.model.neck.update(in_channels=list(net.out_channels), out_channels=16)
    cfg.model.bbox_head.update(in_channels=16, feat_channels=16, stacked_convs=1, num_classes=3)
    retinanet = build(cfg)
    exported = export_onnx(retinanet, tmp_path / 'net.onnx', part='raw', size=(128, 128))
    levels = range(5)
    assert list(exported.shapes) == [
        'images',
        *(f'cls_score_{i}' for i in levels),
        *(f'bbox_pred_{i}' for i in levels),
    ]
    compare(exported, lambda x: [*chain(*retinanet(x, mode='tensor'))], pixels(96, 64, batch=2))


def test_demo_segmentor(tmp_path):
    cfg = Config.fromfile(DEMOS['segmentation'])
    cfg.model.test_cfg = dict(mode='slide', crop_size=(64, 64), stride=(48, 48))
    model = build(cfg)
    exported = export_onnx(model, tmp_path / 'net.onnx', size=SIZE, config=cfg)
    assert exported.fixed == ''
    assert exported.shapes['logits'] == ('batch', 2, 'height', 'width')
    assert exported.metadata['postprocessing']['slide'] == dict(crop_size=[64, 64], stride=[48, 48])
    assert exported.metadata['classes'] == ['background', 'digit']
    compare(exported, logits(model), pixels(77, 131, batch=2))


def test_adaptive_pools_of_dynamic_size():
    for sides in ((1, 1), (2, 2), (3, 6), (6, 3)):
        for size in ((7, 5), (6, 12), (2, 4)):
            x = image(*size, batch=2)
            expected = nn.AdaptiveAvgPool2d(sides)(x)
            torch.testing.assert_close(AdaptivePool(sides)(x), expected)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('head', 'name', 'channels'),
    [
        (dict(type='mmdense.ReXUNetHead', num_classes=5), 'logits', 5),
        (dict(type='mmdense.ReXUNetDepthHead'), 'depth', 1),
    ],
)
def test_unet(head, name, channels, tmp_path):
    options = dict(taps='unet', out_indices=None)
    channels_in = list(backbone('ReXNet', **options).out_channels)
    unet = dict(
        type='EncoderDecoder',
        backbone=dict({**FAMILIES['ReXNet'], **options}, type='mmdense.ReXNet'),
        decode_head=dict(head, in_channels=channels_in),
        test_cfg=dict(mode='whole'),
        data_preprocessor=dict(type='SegDataPreProcessor', mean=[99.0] * 3, std=[55.0] * 3),
    )
    model = build(Config(dict(default_scope='mmseg', model=unet)))
    exported = export_onnx(model, tmp_path / 'net.onnx', size=SIZE)
    assert exported.fixed == ''
    assert exported.shapes[name][:2] == ('batch', channels)
    compare(exported, logits(model), pixels(64, 128, batch=2))


@pytest.mark.parametrize('order', ['RGB', 'BGR'])
def test_preprocessing_equals_the_models(order):
    cfg = Config.fromfile(DEMOS['segmentation'])
    cfg.model.data_preprocessor.bgr_to_rgb = order == 'RGB'
    cfg.model.data_preprocessor.test_cfg = dict(size_divisor=32)
    model = build(cfg)
    images = pixels(40, 50)
    data = model.data_preprocessor(dict(inputs=images.flip(1), data_samples=[SegDataSample()]))
    preprocess = Preprocessing(model)
    assert (preprocess.order, preprocess.divisor) == (order, 32)
    torch.testing.assert_close(preprocess(images), data['inputs'])


class Halves(nn.Module):
    """A detector for multiples of 16, as RTMDet is for those of 32, with YOLOX's three outputs."""

    def __init__(self):
        super().__init__()
        self.backbone = backbone('ReXNet', out_indices=(2, 3))
        self.neck, self.bbox_head = Sum(), Three()


class Sum(nn.Module):
    def forward(self, maps):
        fine, coarse = maps
        return (fine[:, :1] + nn.functional.interpolate(coarse[:, :1], scale_factor=2),)


class Three(nn.Module):
    def forward(self, maps):
        return [[x * factor for x in maps] for factor in (1, 2, 3)]


@pytest.mark.slow
@pytest.mark.parametrize('fixed', [False, True])
def test_a_neck_for_multiples_and_a_head_of_three_outputs(fixed, tmp_path):
    model = Halves()
    exported = export_onnx(model, tmp_path / 'net.onnx', part='raw', size=(64, 100), fixed=fixed)
    assert list(exported.shapes)[1:] == ['cls_score_0', 'bbox_pred_0', 'score_factor_0']
    assert exported.metadata['input']['divisor'] == 16
    assert exported.shapes['cls_score_0'][2:] == ((8, 14) if fixed else AXES_OF_SCORES)


class FixedSize(nn.Module):
    """A network for images of one size, in batches of any size."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=4)

    def forward(self, x):
        assert tuple(map(int, x.shape[2:])) == SIZE
        return (self.conv(x),)


def test_axes_that_cannot_be_dynamic_are_fixed(tmp_path):
    exported = export_onnx(FixedSize(), tmp_path / 'net.onnx', size=SIZE)
    assert exported.shapes['images'] == ('batch', 3, *SIZE)
    assert exported.fixed
    assert exported.batches == [(1, *SIZE), (3, *SIZE)]
    assert list(exported.shapes) == ['images', 'c2']


def test_a_file_that_differs_is_not_written(monkeypatch, tmp_path):
    write = export.write_graph

    def wrong(network, images, file, *args):
        written = write(network, images, file, *args)
        network = onnx.load(file)
        weights = max(network.graph.initializer, key=lambda tensor: len(tensor.raw_data))
        values = onnx.numpy_helper.to_array(weights) * 1.01
        weights.CopyFrom(onnx.numpy_helper.from_array(values.astype('float32'), weights.name))
        onnx.save(network, file)
        return written

    monkeypatch.setattr(export, 'write_graph', wrong)
    with pytest.raises(UserError, match='differs from the model: c3 0.0'):
        export_onnx(
            backbone('DenseNet', out_indices=(1,)), tmp_path / 'net.onnx', size=SIZE, fixed=True
        )
    assert not list(tmp_path.iterdir())


def test_mistakes(monkeypatch, tmp_path):
    net, file = backbone('ShuffleNetV2'), tmp_path / 'net.onnx'
    unpruned = MODELS.build(dict(type='mmdense.CondenseNetV2', **FAMILIES['CondenseNetV2']))
    for model, options, message in (
        (net, dict(part='neck'), 'ShuffleNetV2 has no neck'),
        (net, dict(part='model'), 'ShuffleNetV2 has no head: export its backbone'),
        (Halves(), {}, 'Halves has no data preprocessor: export its parts'),
        (net, dict(size=(16, 16)), 'at least 32'),
        (net, dict(file=tmp_path / 'net.pth'), 'must end in .onnx'),
        (net, dict(score=0.1), r"^score: complete detectors only, not part 'backbone'"),
        (unpruned, dict(size=SIZE), 'pruning is at stage 0 .*--no-deploy'),
    ):
        with pytest.raises(UserError, match=message):
            export_onnx(model, **{'file': file, **options})
    with pytest.raises(ValueError, match='must be one of'):
        export_onnx(net, file, part='head')
    with monkeypatch.context() as older:
        older.setattr(torch.onnx, 'export', lambda model, f, dynamo: None)
        with pytest.raises(UserError, match='too old for ONNX: pip install -U torch'):
            export_onnx(net, file)
    monkeypatch.setattr(export, 'PACKAGES', ('onnx', 'no_such_package'))
    with pytest.raises(UserError, match='pip install no_such_package'):
        export_onnx(net, file)
    assert not list(tmp_path.iterdir())


def test_ssd_feature_maps():
    config = ROOT / 'configs/detection/rexnet/ssdlite_rexnet-1.0_600e_coco-320x320.py'
    network = build_network(build(Config.fromfile(config)), 'neck')
    network.name_outputs((320, 320))
    assert network.names == [f'p{i}' for i in range(4, 10)]
