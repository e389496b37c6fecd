"""What the metadata of exported files say about resizing images."""

import pytest
from mmengine.config import Config

from mmdense.export.metadata import read_geometry

LOAD, PACK = dict(type='LoadImageFromFile'), dict(type='mmdet.PackDetInputs')
RESIZE = dict(type='mmdet.Resize', scale=(640, 320), keep_ratio=True)
PAD = dict(type='Pad', size=(640, 640), pad_val=dict(img=(114, 114, 114)))
EDGE, CROP = dict(type='ResizeEdge', scale=256), dict(type='CenterCrop', crop_size=224)
NOTHING = dict(resize=None, pad=None, crop=None)
RATIO = dict(scale=[640, 320], keep_ratio=True)


@pytest.mark.parametrize(
    ('transforms', 'expected'),
    [
        ([], {}),
        ([RESIZE], dict(resize=RATIO)),
        ([dict(type='Resize', scale=64)], dict(resize=dict(scale=[64, 64], keep_ratio=False))),
        ([dict(RESIZE, backend='pillow')], dict(resize=RATIO | dict(pillow='bilinear'))),
        ([RESIZE, PAD], dict(resize=RATIO, pad=dict(size=[640, 640], value=114.0))),
        (
            [dict(EDGE, backend='pillow', interpolation='bicubic'), CROP],
            dict(resize=dict(scale=256, edge='short', pillow='bicubic'), crop=[224, 224]),
        ),
    ],
)
def test_transforms_that_a_file_records(transforms, expected):
    dataset = dict(type='X', dataset=dict(pipeline=[LOAD, *transforms, PACK]))
    cfg = Config(dict(test_dataloader=dict(dataset=dataset)))
    assert read_geometry(cfg, crop=True) == (NOTHING | expected, '')


@pytest.mark.parametrize(
    'transforms',
    [
        [RESIZE, RESIZE],
        [PAD, RESIZE],
        [dict(RESIZE, interpolation='nearest')],
        [dict(type='Resize', scale_factor=2.0)],
        [dict(type='Pad', size_divisor=32)],
        [dict(PAD, pad_val=(1, 2, 3))],
        [dict(EDGE, interpolation='bicubic')],
        [CROP],
    ],
)
def test_transforms_that_it_does_not(transforms):
    cfg = Config(dict(test_dataloader=dict(dataset=dict(pipeline=[LOAD, *transforms, PACK]))))
    name = transforms[-1]['type'].removeprefix('mmdet.')
    assert read_geometry(cfg) == (NOTHING, f'{name} of the test pipeline is not in the file')


def test_no_test_data():
    assert read_geometry(None)[1] == read_geometry(Config())[1] != ''
