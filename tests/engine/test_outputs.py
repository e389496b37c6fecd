"""Predictions that are saved: of images of one name in several folders, all."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmdet.visualization import DetLocalVisualizer
from mmengine.structures import InstanceData, PixelData
from mmseg.structures import SegDataSample
from PIL import Image

from mmdense.registry import HOOKS

NAMES = ['cam0/1.png', 'cam1/1.png', 'cam1/1.jpg']


@pytest.fixture
def runner(tmp_path):
    """Return a runner whose test set has three images, of which two are of one name."""
    infos = [dict(img_path=str(tmp_path / 'in' / name)) for name in NAMES]
    for info in infos:
        file = tmp_path / 'in' / info['img_path']
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (8, 6)).save(file)

    class Images(list):
        def get_data_info(self, index):
            return self[index]

    loader = SimpleNamespace(dataset=Images(infos))
    return SimpleNamespace(test_dataloader=loader, work_dir=str(tmp_path), timestamp='now')


def run(hook, runner, samples):
    hook.before_test(runner)
    hook.after_test_iter(runner, 0, {}, samples[:2])
    hook.after_test_iter(runner, 1, {}, samples[2:])


@pytest.mark.parametrize('reduce_zero_label', [False, True])
def test_label_maps(runner, tmp_path, reduce_zero_label):
    samples = []
    for i, info in enumerate(runner.test_dataloader.dataset):
        sample = SegDataSample(metainfo=dict(info, reduce_zero_label=reduce_zero_label))
        sample.pred_sem_seg = PixelData(data=torch.full((1, 6, 8), 100 * i))
        samples.append(sample)
    out = tmp_path / 'maps'
    run(HOOKS.build(dict(type='mmdense.SaveLabelMapsHook', out_dir=str(out))), runner, samples)
    for i, name in enumerate(['cam0/1.png', 'cam1/1.png.png', 'cam1/1.jpg.png']):
        pixels = np.array(Image.open(out / name))
        assert pixels.dtype == np.uint8
        assert (pixels == 100 * i + reduce_zero_label).all()
    assert sum(file.is_file() for file in out.rglob('*')) == 3


def detections(runner):
    samples = []
    for info in runner.test_dataloader.dataset:
        sample = DetDataSample(metainfo=info)
        sample.pred_instances = InstanceData(
            bboxes=torch.zeros(0, 4), labels=torch.zeros(0, dtype=torch.long), scores=torch.zeros(0)
        )
        samples.append(sample)
    return samples


def test_predictions_of_detectors(runner, tmp_path):
    out = tmp_path / 'new/out.pkl'
    hook = HOOKS.build(dict(type='mmdense.SavePredictionsHook', out_file=str(out)))
    run(hook, runner, detections(runner))
    hook.after_test_epoch(runner)
    paths = [prediction['img_path'] for prediction in pickle.loads(out.read_bytes())]
    assert paths == [info['img_path'] for info in runner.test_dataloader.dataset]


def test_pictures_of_detectors(runner, tmp_path):
    DetLocalVisualizer.get_instance('test_outputs')
    hook = dict(type='mmdense.DetVisualizationHook', draw=True, test_out_dir=str(tmp_path / 'out'))
    run(HOOKS.build(hook), runner, detections(runner))
    files = [file for file in (tmp_path / 'out').rglob('*') if file.is_file()]
    assert sorted(str(file.relative_to(tmp_path / 'out')) for file in files) == sorted(NAMES)
