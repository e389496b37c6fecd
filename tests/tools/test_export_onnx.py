"""tools/export_onnx.py: the file, its description, deprecated options, and errors."""

import inspect
import json

import pytest
import torch

from support import CONDENSED, DEMOS

onnx = pytest.importorskip('onnx')
pytest.importorskip('onnxruntime')
pytestmark = pytest.mark.slow
if 'custom_translation_table' not in inspect.signature(torch.onnx.export).parameters:
    pytest.skip('torch is too old for ONNX', allow_module_level=True)


@pytest.fixture
def export(call_tool, tmp_path):
    def run(*arguments):
        options = ['--out', tmp_path / 'net.onnx', '--work-dir', tmp_path, '--size', 64, 96]
        return call_tool('export_onnx', *arguments, *options)

    return run


def test_detector(export, checkpoints, tmp_path):
    settings = ['--score', 0.2, '--iou', 0.4, '--max-per-img', 7, '--dtype', 'float32']
    status, output, _ = export(DEMOS['detection'], checkpoints / 'detection.pth', *settings)
    assert status == 0
    assert 'float32 RGB from 0 to 255; the file normalizes and pads them; resize them to' in output
    assert 'detections: score above 0.2, NMS at IoU 0.4, at most 7 an image' in output
    assert 'weights: random' not in output
    assert len(output.splitlines()) < 30
    file = onnx.load(tmp_path / 'net.onnx')
    metadata = json.loads({entry.key: entry.value for entry in file.metadata_props}['mmdense'])
    assert metadata['categories'][1] == dict(id=2, name='1')
    assert metadata['resize'] == dict(scale=[192, 192], keep_ratio=True)


def test_deprecated_options(export):
    options = ['--what', 'model', '--deploy', '--normalize', '--fixed']
    status, output, errors = export(DEMOS['segmentation'], *options)
    assert status == 0
    for text in ('--what model is a deprecated alias of --part raw', '--normalize is deprecated'):
        assert text in output + errors
    assert 'weights: random' in output
    assert 'segmentation' not in output


def test_errors(export, checkpoints, tmp_path):
    status, _, errors = export(CONDENSED, checkpoints / 'detection.pth')
    assert status == 2
    assert 'detection.pth: the checkpoint fills ' in errors.splitlines()[-1]
    status, _, errors = export(
        DEMOS['detection'], '--cfg-options', 'model.test_cfg.rcnn.nms.type=x'
    )
    assert (status, len(errors.splitlines())) == (2, 1)
    assert "needs nms=dict(type='nms', iou_threshold=...)" in errors
    assert not (tmp_path / 'net.onnx').exists()
