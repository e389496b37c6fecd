"""tools/export_onnx.py: the file, the description of its inputs and outputs, and errors."""

import inspect

import pytest
import torch

from mmdense.apis.export import Exported, Preprocessing
from support import CONDENSED, DEMOS, load_tool

pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')
pytestmark = pytest.mark.slow
if 'dynamic_shapes' not in inspect.signature(torch.onnx.export).parameters:
    pytest.skip('torch is too old for ONNX', allow_module_level=True)


@pytest.fixture
def export(call_tool, tmp_path):
    def run(*arguments):
        options = ['--out', tmp_path / 'net.onnx', '--work-dir', tmp_path, '--size', 64, 96]
        return call_tool('export_onnx', *arguments, *options)

    return run


def test_detector(export, checkpoints, tmp_path):
    status, output, _ = export(DEMOS['detection'], checkpoints / 'detection.pth')
    assert status == 0
    assert 'checked against the model on batches of 1 x 64 x 96, 3 x 64 x 96' in output
    assert 'minus (123.675, 116.28, 103.53), divided by (58.395, 57.12, 57.375)' in output
    assert 'feature maps: proposals, boxes, NMS and masks are not in the file' in output
    assert 'weights: random' not in output
    assert len(output.splitlines()) < 30
    assert (tmp_path / 'net.onnx').exists()


def test_segmentor_with_random_weights(export):
    status, output, _ = export(DEMOS['segmentation'], '--fixed', '--normalize')
    assert status == 0
    assert 'weights: random' in output
    assert 'the file normalizes them' in output
    assert 'the largest along axis 1 is the class' in output


def test_advice_for_one_output_and_multiples(tmp_path):
    shapes = dict(image=('batch', 3, 'height', 'width'), logits=('batch', 1, 'height', 'width'))
    exported = Exported(
        *(tmp_path, 'model', 1, 18, shapes, '', {(1, 8, 8): dict(logits=0.0)}),
        Preprocessing(multiple=32),
        normalized=False,
    )
    *_, image, outputs, _ = load_tool('export_onnx').describe(exported)
    assert image.endswith('padded with zeros at the right and bottom to multiples of 32')
    assert 'where their sigmoid exceeds decode_head.threshold' in outputs


def test_checkpoint_of_another_model(export, checkpoints, tmp_path):
    status, _, errors = export(CONDENSED, checkpoints / 'detection.pth')
    assert status == 2
    assert 'detection.pth: the checkpoint fills ' in errors.splitlines()[-1]
    assert not (tmp_path / 'net.onnx').exists()
