"""One-stage heads and DETRs: their boxes in batches, in onnxruntime and in OpenVINO."""

from importlib.util import find_spec

import pytest
import torch

from detectors import DETECTORS, build, images, predict, same_boxes
from mmdense.apis.export import export_onnx
from mmdense.errors import UserError
from mmdense.export.networks import build_network

REFUSED = dict(paa='PAAHead .* ATSSHead, FCOSHead', ddq='DeformableDETR and DINO .* DDQDETR')
READ = [name for name in DETECTORS if name not in REFUSED]
SIZES = [(2, 64, 96), (1, 97, 131)]


@pytest.mark.parametrize('name', READ)
def test_batches_equal_predict(name):
    model = build(name)
    network = build_network(model, None)
    network.fit_divisor((64, 96))
    for size in SIZES:
        with torch.no_grad():
            outputs = network(images(*size))
        same_boxes(outputs, predict(model, network, images(*size)))
        assert all(scores.std() > 0 for scores in outputs[1])


@pytest.mark.parametrize('name', ['deformable_detr_twostage', 'dino'])
def test_a_detr_ignores_padding(name):
    model = build(name, data_preprocessor=dict(pad_size_divisor=64))
    network = build_network(model, None)
    with torch.no_grad():
        outputs = network(images(2, 97, 131))
    same_boxes(outputs, predict(model, network, images(2, 97, 131)))


@pytest.mark.parametrize('name', REFUSED)
def test_other_heads_are_refused(name):
    model = build(name)
    with pytest.raises(UserError, match=REFUSED[name]):
        build_network(model, 'model')


def test_settings_of_a_detr():
    network = build_network(build('deformable_detr'), None)
    network.override(score=None, iou=None, max_per_img=4)
    with torch.no_grad():
        assert network(images(1, 64, 64))[1].shape == (1, 4)
    assert network.postprocessing()['max_per_img'] == 4
    for setting in ('score', 'iou'):
        settings = dict(score=None, iou=None, max_per_img=None) | {setting: 0.5}
        with pytest.raises(UserError, match='DeformableDETR has neither'):
            network.override(**settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('name', 'family'),
    [
        ('atss', 'DenseNet'),
        ('fcos', 'RDNet'),
        ('gfl', 'DenseNet'),
        ('rtmdet', 'RDNet'),
        ('deformable_detr_refine', 'RDNet'),
        ('dino', 'RDNet'),
    ],
)
def test_a_file_equals_predict(name, family, tmp_path):
    onnx, onnxruntime = (pytest.importorskip(x) for x in ('onnx', 'onnxruntime'))
    model = build(name, family)
    exported = export_onnx(model, tmp_path / f'{name}.onnx', size=(64, 96))
    assert exported.shapes['images'] == ('batch', 3, 'height', 'width'), exported.fixed
    assert exported.shapes['boxes'] == (
        'batch',
        exported.metadata['postprocessing']['max_per_img'],
        4,
    )
    assert {node.domain for node in onnx.load(exported.file).graph.node} <= {'', 'ai.onnx'}
    session = onnxruntime.InferenceSession(exported.file, providers=['CPUExecutionProvider'])
    runs = [lambda x: session.run(None, dict(images=x))]
    if find_spec('openvino'):
        import openvino

        options = dict(INFERENCE_PRECISION_HINT='f32')
        compiled = openvino.Core().compile_model(exported.file, 'CPU', options)
        runs.append(lambda x: [*compiled(x).values()])
    network = build_network(model, None)
    network.fit_divisor((64, 96))
    for size in ((1, 64, 96), (3, 96, 64), (2, 97, 131)):
        pixels = images(*size)
        expected = predict(model, network, pixels)
        for run in runs:
            same_boxes(run(pixels.numpy()), expected)
    alone = [predict(model, network, x[None])[0] for x in pixels]
    same_boxes(run(pixels.numpy()), alone)


@pytest.mark.slow
def test_deformable_convolutions(tmp_path):
    """The exported file is compared with the model. mmcv's layers fix the image size."""
    onnx = pytest.importorskip('onnx')
    pytest.importorskip('onnxruntime')
    exported = export_onnx(build('vfnet'), tmp_path / 'vfnet.onnx', size=(64, 96))
    assert exported.shapes['images'] == (1, 3, 64, 96)
    assert 'DeformConv' in {node.op_type for node in onnx.load(exported.file).graph.node}
