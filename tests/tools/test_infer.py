"""tools/infer.py, run as users run it."""

import json
import sys

import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from mmdense.apis import Predictor
from mmdense.config.read import load_config
from support import DEMOS, ROOT

INFER = (sys.executable, ROOT / 'tools/infer.py')
pytestmark = pytest.mark.slow


@pytest.fixture(scope='module')
def checkpoints(tmp_path_factory):
    """Random weights whose detector gives every class a score about a tenth."""
    folder = tmp_path_factory.mktemp('weights')
    for task, config in DEMOS.items():
        torch.manual_seed(0)
        model = Predictor(load_config(str(config)), device='cpu').model
        torch.save(dict(state_dict=model.state_dict(), meta={}), folder / f'{task}.pth')
    return folder


@pytest.mark.parametrize('task', DEMOS)
def test_predictions_of_a_folder(task, checkpoints, project, run_tool, tmp_path):
    status, said = run_tool(
        *(*INFER, DEMOS[task], checkpoints / f'{task}.pth', 'data/digits/val'),
        *('--out', tmp_path, '--score', 0.05, '--deploy', '--device', 'cpu'),
    )
    assert status == 0, said
    assert said.splitlines()[-1] == (
        f'4 images; pictures: {tmp_path}/pictures; predictions: {tmp_path}/predictions.json'
    )
    assert '100%' in said
    pictures = sorted((tmp_path / 'pictures').iterdir())
    assert [p.name for p in pictures] == [f'{i:06}.jpg' for i in range(4)]
    assert Image.open(pictures[0]).size == (192, 192)
    held = COCO(str(tmp_path / 'predictions.json'))
    assert len(held.imgs) == 4
    assert held.anns


def test_a_bad_image_is_left_out(checkpoints, project, run_tool, tmp_path):
    bad = tmp_path / '[red]bad.jpg'  # no markup
    bad.write_bytes((project / 'data/digits/val/000000.jpg').read_bytes()[:1000])
    good = project / 'data/digits/val/000001.jpg'
    weights = checkpoints / 'detection.pth'
    status, said = run_tool(*INFER, DEMOS['detection'], weights, bad, good, '--out', tmp_path / 'o')
    assert status == 1, said
    complaints = [line for line in said.splitlines() if 'left out: ' in line]
    assert len(complaints) == 1
    assert f'left out: {bad}: damaged (OSError: image file is truncated' in complaints[0]
    assert said.splitlines()[-1].startswith('1 images, 1 left out; pictures: ')
    assert 'Traceback' not in said
    written = json.loads((tmp_path / 'o/predictions.json').read_text())
    assert [image['file_name'] for image in written['images']] == [str(good)]


def test_mistakes_are_one_line(checkpoints, project, run_tool, tmp_path):
    config, weights = DEMOS['detection'], checkpoints / 'detection.pth'
    image = 'data/digits/val/000000.jpg'
    for arguments, message in (
        (['nothing.py', weights, image, '--out', tmp_path], 'no config nothing.py'),
        ([config, 'nothing.pth', image, '--out', tmp_path], 'no checkpoint nothing.pth'),
        ([config, weights, 'nothing.jpg', '--out', tmp_path], 'no image or folder nothing.jpg'),
        ([config, weights, image, '--out', weights], f'cannot write {weights}/predictions.json'),
    ):
        status, said = run_tool(*INFER, *arguments)
        assert status == 2, said
        assert said.splitlines()[-1].startswith(f'error: {message}')
        assert 'Traceback' not in said
