"""Curves and grids of predictions; tests/tools draws them with real models."""

import json

import cv2
import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData, PixelData

from mmdense.apis import UserError, pictures


def write_log(folder, name, records):
    file = folder / name / 'vis_data/scalars.json'
    file.parent.mkdir(parents=True)
    file.write_text('\n'.join(map(json.dumps, records)))


def test_read_scalars_joins_resumed_runs(tmp_path):
    metric = {'coco/bbox_mAP': 0.1, 'step': 1}
    write_log(tmp_path, '1', [{'loss': 3.0, 'step': 50}, {'loss': 2.0, 'step': 100}, metric])
    write_log(
        tmp_path,
        '2',
        [{'loss': 1.5, 'step': 100}, {'coco/bbox_mAP': 0.2, 'step': 1}, {'loss': 1.0, 'step': 150}],
    )
    write_log(tmp_path, '3', [{'coco/bbox_mAP': 0.9, 'step': 0}])  # a test run, no training
    losses, metrics = pictures.read_scalars(tmp_path)
    assert [(r['step'], r['loss']) for r in losses] == [(50, 3.0), (100, 1.5), (150, 1.0)]
    assert [(r['iter'], r['coco/bbox_mAP']) for r in metrics] == [(100, 0.2)]
    # A run from the beginning is another training.
    write_log(tmp_path, '4', [{'loss': 9.0, 'step': 50}])
    assert pictures.read_scalars(tmp_path) == ([{'loss': 9.0, 'step': 50}], [])
    pictures.plot_curves(losses, metrics, tmp_path / 'curves.png')
    assert cv2.imread(str(tmp_path / 'curves.png')).std() > 0


def test_read_scalars_without_a_log(tmp_path):
    with pytest.raises(UserError, match='no training log'):
        pictures.read_scalars(tmp_path)


class Loader(list):
    dataset = None


class Meta:
    metainfo = dict(classes=('a', 'b'), palette=[(255, 0, 0), (0, 0, 255)])


class Sample(dict):
    __getattr__ = dict.__getitem__


class Runner:
    """What draw_predictions asks of a runner."""

    def __init__(self, samples):
        self.test_dataloader = Loader([samples])
        self.test_dataloader.dataset = Meta
        self.model = self

    def eval(self):
        pass

    def test_step(self, batch):
        return batch


@pytest.fixture
def image(tmp_path):
    file = tmp_path / 'grey.jpg'
    cv2.imwrite(str(file), np.full((40, 40, 3), 128, np.uint8))
    return str(file)


def colours(file):
    picture = cv2.imread(str(file))[..., ::-1].reshape(-1, 3).astype(int)
    return {
        name: int((np.abs(picture - colour).max(1) < 12).sum())
        for name, colour in dict(red=(255, 0, 0), blue=(0, 0, 255)).items()
    }


def test_boxes_below_the_threshold_are_left_out(image, tmp_path):
    found = InstanceData(
        bboxes=torch.tensor([[5.0, 5, 30, 30], [8.0, 8, 20, 20]]),
        labels=torch.tensor([0, 1]),
        scores=torch.tensor([0.9, 0.3]),
    )
    truth = InstanceData(bboxes=torch.tensor([[5.0, 5, 31, 31]]), labels=torch.tensor([0]))
    sample = Sample(img_path=image, pred_instances=found, gt_instances=truth)
    pictures.draw_predictions(Runner([sample, sample]), tmp_path / 'x.png', count=1, score_thr=0.5)
    assert colours(tmp_path / 'x.png')['red'] > 0
    assert colours(tmp_path / 'x.png')['blue'] == 0
    pictures.draw_predictions(Runner([sample]), tmp_path / 'x.png', count=1, score_thr=0.2)
    assert colours(tmp_path / 'x.png')['blue'] > 0


def test_label_maps_stand_beside_the_image(image, tmp_path):
    truth, guess = torch.zeros(1, 40, 40, dtype=torch.long), torch.ones(1, 40, 40, dtype=torch.long)
    truth[:, :, 20:] = 255  # ignored
    sample = Sample(
        img_path=image, gt_sem_seg=PixelData(data=truth), pred_sem_seg=PixelData(data=guess)
    )
    pictures.draw_predictions(Runner([sample]), tmp_path / 'x.png', count=1)
    seen = colours(tmp_path / 'x.png')
    assert 0.4 < seen['red'] / seen['blue'] < 0.6
