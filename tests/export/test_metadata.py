"""What the metadata of exported files say about resizing images."""

import pytest
from mmengine.config import Config

from mmdense.export.metadata import read_geometry

LOAD, PACK = dict(type='LoadImageFromFile'), dict(type='mmdet.PackDetInputs')
RESIZE = dict(type='mmdet.Resize', scale=(640, 320), keep_ratio=True)
PAD = dict(type='Pad', size=(640, 640), pad_val=dict(img=(114, 114, 114)))
RATIO = dict(scale=[640, 320], keep_ratio=True)


@pytest.mark.parametrize(
    ('transforms', 'resize', 'pad'),
    [
        ([], None, None),
        ([RESIZE], RATIO, None),
        ([dict(type='Resize', scale=64)], dict(scale=[64, 64], keep_ratio=False), None),
        ([RESIZE, PAD], RATIO, dict(size=[640, 640], value=114.0)),
    ],
)
def test_transforms_that_a_file_records(transforms, resize, pad):
    dataset = dict(type='X', dataset=dict(pipeline=[LOAD, *transforms, PACK]))
    assert read_geometry(Config(dict(test_dataloader=dict(dataset=dataset)))) == (resize, pad, '')


@pytest.mark.parametrize(
    'transforms',
    [
        [RESIZE, RESIZE],
        [PAD, RESIZE],
        [dict(RESIZE, interpolation='nearest')],
        [dict(type='Resize', scale_factor=2.0)],
        [dict(type='Pad', size_divisor=32)],
        [dict(PAD, pad_val=(1, 2, 3))],
        [dict(type='CenterCrop', crop_size=64)],
    ],
)
def test_transforms_that_it_does_not(transforms):
    cfg = Config(dict(test_dataloader=dict(dataset=dict(pipeline=[LOAD, *transforms, PACK]))))
    name = transforms[-1]['type'].removeprefix('mmdet.')
    assert read_geometry(cfg) == (None, None, f'{name} of the test pipeline is not in the file')


def test_no_test_data():
    assert read_geometry(None)[2] == read_geometry(Config())[2] != ''
