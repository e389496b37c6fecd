"""mmdet's and mmseg's own inferencers run our configs: nobody imports mmdense by hand."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version

import cv2
import pytest
import torch

from mmdense.apis import Predictor
from mmdense.config.read import load_config
from support import DEMOS

# mmdet.apis of the original distribution imports mmcv.ops, which need mmdense first.
try:
    version('onedl-mmdetection')
    FIRST = ''
except PackageNotFoundError:
    FIRST = 'import mmdense'

# Both in one process: random weights give ties, which rounding breaks.
DETECT = """
from mmdet.apis import DetInferencer
infer = DetInferencer(model={config!r}, weights={weights!r}, device='cpu', show_progress=False)
found = infer({image!r}, out_dir={out!r}, no_save_pred=False)['predictions'][0]
import torch
from mmdense.apis import Predictor
(own,) = Predictor({config!r}, {weights!r}, device='cpu')({image!r})
assert len(found['scores']) > 0
torch.testing.assert_close(torch.tensor(found['bboxes']), own.pred_instances.bboxes)
torch.testing.assert_close(torch.tensor(found['scores']), own.pred_instances.scores)
"""
SEGMENT = """
from mmseg.apis import MMSegInferencer
infer = MMSegInferencer(model={config!r}, weights={weights!r}, device='cpu')
found = infer({image!r}, out_dir={out!r})['predictions']
from mmdense.apis import Predictor
(own,) = Predictor({config!r}, {weights!r}, device='cpu')({image!r})
assert (found == own.pred_sem_seg.data[0].numpy()).all()
"""
META = dict(
    detection=dict(classes=tuple('0123456789'), palette=[(i, i, i) for i in range(10)]),
    segmentation=dict(classes=('background', 'digit'), palette=[(0, 0, 0), (255, 225, 25)]),
)
pytestmark = pytest.mark.slow


@pytest.mark.parametrize('named', [True, False], ids=['named', 'nameless'])
@pytest.mark.parametrize('task', DEMOS)
def test_inferencers_give_what_predictor_gives(task, named, project, tmp_path):
    cfg = load_config(str(DEMOS[task]))
    torch.manual_seed(0)
    meta = dict(dataset_meta=META[task]) if named else {}
    weights, image = tmp_path / 'weights.pth', project / 'data/digits/val/000000.jpg'
    torch.save(dict(state_dict=Predictor(cfg, device='cpu').model.state_dict(), meta=meta), weights)
    names = dict(config=DEMOS[task], weights=weights, image=image, out=tmp_path / 'out')
    code = (DETECT if task == 'detection' else SEGMENT).format(
        **{key: str(value) for key, value in names.items()}
    )
    done = subprocess.run(
        [sys.executable, '-c', FIRST + code],
        cwd=project,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    (picture,) = (tmp_path / 'out/vis').iterdir()
    assert cv2.imread(str(picture)).shape == (192, 192, 3)
