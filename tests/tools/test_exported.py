"""Exported files in the tools: lower precision, and predictions beside the checkpoint's."""

from importlib.util import find_spec

import mmengine
import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from PIL import Image

from mmdense.config.read import load_config
from mmdense.export.check import find_images
from mmdense.export.onnx_model import OnnxModel
from onnx_files import write_classifier, write_detector, write_segmentor
from support import DEMOS

pytest.importorskip('onnxscript')
pytest.importorskip('onnxruntime')
pytestmark = pytest.mark.slow


@pytest.fixture
def predict(call_tool, tmp_path):
    """Return a function that tests a checkpoint or file and returns the boxes or label maps."""

    def run(config, weights, name):
        status, output, _ = call_tool(
            'test', config, weights, '--out', tmp_path / name, '--work-dir', tmp_path
        )
        assert status == 0
        if not name.endswith('.pkl'):
            maps = [np.array(Image.open(x)) for x in sorted((tmp_path / name).glob('*.png'))]
            return dict(maps=torch.tensor(np.stack(maps)))
        samples = mmengine.load(tmp_path / name)
        return {
            key: torch.cat([sample['pred_instances'][key] for sample in samples])
            for key in ('bboxes', 'scores', 'labels')
        }

    return run


@pytest.mark.parametrize(
    ('task', 'options', 'names'),
    [
        ('detection', ['--half'], ['a.pkl', 'b.pkl']),
        ('segmentation', ['--int8', 2], ['a', 'b']),
    ],
)
def test_a_file_predicts_what_its_checkpoint_does(
    task, options, names, call_tool, predict, checkpoints, tmp_path
):
    config, checkpoint, file = DEMOS[task], checkpoints / f'{task}.pth', tmp_path / 'net.onnx'
    arguments = [config, checkpoint, '--out', file, '--work-dir', tmp_path, '--size', 64, 96]
    status, output, errors = call_tool('export_onnx', *arguments, '--rounds', 2, *options)
    assert status == 0, errors
    assert 'largest differences from the model: ' in output
    cells = [line.split()[1] for line in output.splitlines() if line.startswith('│')]
    lower = [option[2:] for option in map(str, options) if option.startswith('--')]
    assert cells[-len(lower) - 1 :] == ['float32', *lower]
    a, b = (predict(config, *each) for each in zip((checkpoint, file), names, strict=True))
    for key, values in a.items():
        torch.testing.assert_close(values, b[key], rtol=0, atol=1e-3, msg=key)
    for arguments, message in (
        ((file, '--deploy'), 'runs as it is: leave out --tta and --deploy'),
        ((tmp_path / 'no.onnx',), 'no file'),
    ):
        status, _, errors = call_tool('test', config, *arguments)
        assert status == 2
        assert message in errors
    if find_spec('openvino') and task == 'detection':
        images = find_images(load_config(str(config)))
        found = []
        for provider in ('cpu', 'openvino'):
            samples = [DetDataSample(metainfo=dict(ori_shape=x.shape[1:])) for x in images]
            data = dict(inputs=images, data_samples=samples)
            found.append(OnnxModel(file, provider=provider).test_step(data))
        for one, other in zip(*found, strict=True):
            for key in ('bboxes', 'scores'):
                x, y = (sample.pred_instances[key] for sample in (one, other))
                torch.testing.assert_close(x, y, rtol=0, atol=1e-2, msg=key)


def test_a_file_of_another_model(call_tool, project, monkeypatch, tmp_path):
    monkeypatch.chdir(project)
    detector = write_detector(tmp_path / 'a.onnx', [[0, 0, 9, 9]], [0.9], [0])
    for file, kind in (
        (detector, 'detector of 2'),
        (write_segmentor(tmp_path / 'b.onnx', classes=['x'] * 10), 'segmentor of 10'),
        (write_classifier(tmp_path / 'c.onnx', classes=['x'] * 10), 'classifier of 10'),
    ):
        status, _, errors = call_tool('test', DEMOS['detection'], file, '--work-dir', tmp_path)
        assert status == 2
        assert f'is a {kind} classes, and the config has another model' in errors
