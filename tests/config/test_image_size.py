"""The size of the largest training images of a config."""

import pytest
from mmengine.config import Config

from mmdense.config.image_size import training_size
from mmdense.config.read import load_config
from mmdense.errors import UserError
from support import ROOT


@pytest.mark.parametrize(
    ('config', 'size'),
    [
        ('detection/rdnet/cascade-mask-rcnn_rdnet-t_fpn_amp-ms-crop-3x_coco', (800, 1344)),
        ('detection/densenet/faster-rcnn_densenet-121_fpn_ms-3x_coco', (800, 1344)),
        ('detection/rexnet/ssdlite_rexnet-1.0_600e_coco-320x320', (320, 320)),
        ('segmentation/rexnet/unet_rexnet-1.0_25k_nyu-480x480', (480, 480)),
    ],
)
def test_size_of_a_recipe(config, size):
    assert training_size(load_config(str(ROOT / f'configs/{config}.py'))) == size


@pytest.mark.parametrize(
    ('steps', 'size'),
    [
        ([dict(scale=(70, 50)), dict(type='RandomFlip')], (64, 96)),
        ([dict(scale=[(90, 40), (90, 60)])], (64, 96)),
        ([dict(scale=(500, 500)), dict(crop_size=(64, 64))], (64, 64)),
        ([dict(crop_size=(0.5, 0.5), crop_type='relative_range')], None),
        ([dict(transforms=[[dict(scale=(33, 33))], [dict(scales=[(9, 9), (65, 65)])]])], (96, 96)),
        ([dict(scale=(64, 64)), dict(transforms=[dict(type='RandomFlip')])], (64, 64)),
        ([dict(type='RandomFlip')], None),
        ([dict(crop_size=512)], (512, 512)),
        ([dict(scale=(99, 99)), dict(scale=640)], (640, 640)),
        ([dict(scale=(64, 64)), dict(scale=None, scale_factor=2.0)], (64, 64)),
        ([dict(scale=(-1, 512))], None),
        ([dict(scales=[480, 512, 640], resize_type='ResizeShortestEdge')], (640, 640)),
        ([dict(scale=(64, 64)), dict(transforms=dict(scale=(96, 96)))], (96, 96)),
        ([dict(scale=(64, 64)), dict(type='Pad', size=(128, 96))], (96, 128)),
    ],
)
def test_size_of_a_pipeline(steps, size):
    data = dict(type='RepeatDataset', dataset=dict(pipeline=steps))
    cfg = Config(dict(model=dict(), train_dataloader=dict(dataset=data)), filename=None)
    if size:
        assert training_size(cfg) == size
        return
    with pytest.raises(UserError, match='add --size H W'):
        training_size(cfg)


def test_size_with_nested_datasets():
    small, large = ([dict(scale=(side, side))] for side in (64, 640))
    for data in (
        dict(dataset=dict(pipeline=small), pipeline=large),  # as of mmdet's MultiImageMixDataset
        dict(datasets=[dict(pipeline=large)] * 2),
    ):
        cfg = Config(dict(model=dict(), train_dataloader=dict(dataset=data)))
        assert training_size(cfg) == (640, 640)
