"""Published figures: their units, and which fit a config."""

import pytest

from mmdense.benchmark.published import find_published
from mmdense.errors import UserError

MASK_RCNN = 'mask-rcnn_rdnet-t_fpn_amp-ms-crop-3x_coco'


def test_figures():
    """Percentages become what mmdet logs, and stay what mmseg logs."""
    of_backbone = find_published(['rdnet-t'], 'detection')
    assert [row['name'].split('_')[0] for row in of_backbone] == ['mask-rcnn', 'cascade-mask-rcnn']
    (row,) = find_published([MASK_RCNN, MASK_RCNN], 'detection')
    assert row in of_backbone
    assert (row['metrics']['box AP75'], row['metrics']['mask AP']) == (0.521, 0.424)
    assert row['source'].startswith('https://')
    (light,) = find_published(['condensenetv2-a'], 'detection')
    assert light['metrics'] == {'box AP': 0.235}
    (segmentor,) = find_published(['rdnet-t'], 'segmentation')
    assert segmentor['metrics'] == {'mIoU (%)': 47.6}
    with pytest.raises(UserError, match="no published segmentation of 'rdnet-x'; did you mean 'rd"):
        find_published(['rdnet-x'], 'segmentation')


def test_those_like_a_config():
    names = ['rdnet-t', 'timm:resnet18']
    for config, found in (
        ('x/mask-rcnn_r50_fpn_1x_coco.py', [MASK_RCNN]),
        ('mask-rcnn_r50_fpn_1x_digits.py', []),
    ):
        assert [row['name'] for row in find_published(names, 'detection', config)] == found
