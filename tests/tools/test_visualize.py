"""tools/visualize.py: pictures of test images, and the curves of a run."""

import cv2
import pytest

from support import DEMOS, write_log

METRICS = dict(detection='coco/bbox_mAP', segmentation='mIoU')


@pytest.mark.parametrize('task', DEMOS)
def test_predictions_and_curves(task, checkpoints, call_tool, tmp_path):
    records = [dict(loss=2.0, loss_cls=1.5, step=5), {METRICS[task]: 0.5, 'step': 1}]
    write_log(tmp_path / 'run', records)
    arguments = [DEMOS[task], checkpoints / f'{task}.pth', '--work-dir', tmp_path / 'run']
    options = ['--out', tmp_path / 'out', '--num', 4, '--score', 0.05]
    status, output, _ = call_tool('visualize', *arguments, *options)
    assert status == 0
    assert '0.500' in output[output.index('last validation') :]
    assert len(output.splitlines()) < 30
    picture = cv2.imread(str(tmp_path / 'out/predictions.png'))
    assert picture.shape == (900, 2700, 3)  # four pairs in rows of three
    assert (picture[480:850, 950:] == 255).all()
    assert (picture[850:, 950:] < 255).any() == (task == 'segmentation')  # the legend
    assert picture[450:, :900].std() > 20
    assert cv2.imread(str(tmp_path / 'out/curves.png')).std() > 0
    status, _, errors = call_tool('visualize', *arguments[:3], tmp_path / 'empty')
    assert status == 2
    assert errors.splitlines()[-1].startswith('error: no training log in ')
