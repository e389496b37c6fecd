"""tools/infer.py: its files, its output and its exit status."""

import json
import sys

import pytest
from PIL import Image
from pycocotools.coco import COCO

from support import DEMOS, ROOT

IMAGE = 'data/digits/val/000000.jpg'


@pytest.mark.parametrize('task', DEMOS)
def test_predictions_of_a_folder(task, checkpoints, call_tool, tmp_path):
    status, output, errors = call_tool(
        *('infer', DEMOS[task], checkpoints / f'{task}.pth', 'data/digits/val'),
        *('--out', tmp_path, '--score', 0.05, '--deploy', '--device', 'cpu'),
    )
    assert status == 0
    maps = f'; label maps: {tmp_path}/label_maps' if task == 'segmentation' else ''
    assert output.splitlines()[-1] == (
        f'4 images; pictures: {tmp_path}/pictures; predictions: {tmp_path}/predictions.json{maps}'
    )
    assert '100%' in errors
    pictures = sorted((tmp_path / 'pictures').iterdir())
    assert [p.name for p in pictures] == [f'{i:06}.jpg' for i in range(4)]
    assert Image.open(pictures[0]).size == (192, 192)
    dataset = COCO(str(tmp_path / 'predictions.json'))
    assert len(dataset.imgs) == 4
    assert dataset.anns


@pytest.mark.slow
def test_a_bad_image_is_skipped(checkpoints, project, run_tool, tmp_path):
    bad = tmp_path / '[red]bad.jpg'  # no markup
    bad.write_bytes((project / IMAGE).read_bytes()[:1000])
    good = project / 'data/digits/val/000001.jpg'
    arguments = [DEMOS['detection'], checkpoints / 'detection.pth', bad, good]
    status, output = run_tool(
        sys.executable, ROOT / 'tools/infer.py', *arguments, '--out', tmp_path / 'out'
    )
    assert status == 1, output
    (line,) = [line for line in output.splitlines() if 'skipped: ' in line]
    assert f'skipped: {bad}: damaged (OSError: image file is truncated' in line
    assert output.splitlines()[-1].startswith('1 images, 1 skipped; pictures: ')
    assert 'Traceback' not in output
    predictions = json.loads((tmp_path / 'out/predictions.json').read_text())
    assert [image['file_name'] for image in predictions['images']] == [str(good)]


def test_mistakes_are_one_line(checkpoints, call_tool, tmp_path):
    config, weights = DEMOS['detection'], checkpoints / 'detection.pth'
    for arguments, message in (
        (['nothing.py', weights, IMAGE, '--out', tmp_path], 'no config nothing.py'),
        ([config, 'nothing.pth', IMAGE, '--out', tmp_path], 'no checkpoint nothing.pth'),
        ([config, weights, 'nothing.jpg', '--out', tmp_path], 'no image or folder nothing.jpg'),
        ([config, weights, IMAGE, '--out', weights], f'cannot write {weights}/predictions.json'),
    ):
        status, _, errors = call_tool('infer', *arguments)
        assert status == 2
        assert errors.splitlines()[-1].startswith(f'error: {message}')
    status, _, errors = call_tool('infer', config, weights, IMAGE, '--out', 'x', '--score', 2)
    assert status == 2
    assert '2 is not from 0 to 1' in errors
