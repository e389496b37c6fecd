"""The inferencers of mmdet and mmseg run mmdense's configs without importing mmdense by hand."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import cv2
import pytest
import torch

from mmdense.apis import Predictor
from support import DEMOS

# mmdet.apis of the original distribution imports mmcv.ops, which mmdense provides.
try:
    version('onedl-mmdetection')
    FIRST = ''
except PackageNotFoundError:
    FIRST = 'import mmdense'

# In one process: with random weights scores are tied, and rounding decides.
DETECT = """
from mmdet.apis import DetInferencer
infer = DetInferencer(model={config!r}, weights={weights!r}, device='cpu', show_progress=False)
theirs = infer({image!r}, out_dir={out!r}, no_save_pred=False)['predictions'][0]
import torch
from mmdense.apis import Predictor
(ours,) = Predictor({config!r}, {weights!r}, device='cpu')({image!r})
assert len(theirs['scores']) > 0
torch.testing.assert_close(torch.tensor(theirs['bboxes']), ours.pred_instances.bboxes)
torch.testing.assert_close(torch.tensor(theirs['scores']), ours.pred_instances.scores)
"""
SEGMENT = """
from mmseg.apis import MMSegInferencer
infer = MMSegInferencer(model={config!r}, weights={weights!r}, device='cpu')
theirs = infer({image!r}, out_dir={out!r})['predictions']
from mmdense.apis import Predictor
(ours,) = Predictor({config!r}, {weights!r}, device='cpu')({image!r})
assert (theirs == ours.pred_sem_seg.data[0].numpy()).all()
"""
META = dict(dataset_meta=dict(classes=tuple('0123456789'), palette=[(i, i, i) for i in range(10)]))


@pytest.mark.slow
@pytest.mark.parametrize(
    ('task', 'code', 'meta'),
    [('detection', DETECT, META), ('segmentation', SEGMENT, {})],
    ids=['detection with class names', 'segmentation without'],
)
def test_inferencers_predict_as_predictor_does(task, code, meta, project, tmp_path):
    torch.manual_seed(0)
    weights, image = tmp_path / 'weights.pth', project / 'data/digits/val/000000.jpg'
    model = Predictor(DEMOS[task], device='cpu').model
    torch.save(dict(state_dict=model.state_dict(), meta=meta), weights)
    names = dict(config=DEMOS[task], weights=weights, image=image, out=tmp_path / 'out')
    code = FIRST + code.format(**{key: str(value) for key, value in names.items()})
    done = subprocess.run(
        [sys.executable, '-c', code], cwd=project, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    (picture,) = (tmp_path / 'out/vis').iterdir()
    assert cv2.imread(str(picture)).shape == (192, 192, 3)
