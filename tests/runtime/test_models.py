"""Detectors and segmentors from exported files, in Python and on the command line."""

import errno
import json
import re
import subprocess
import sys
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO

from mmdense.errors import UserError
from mmdense.runtime import Classifier, Detector, Segmentor, Session, models, open_model
from mmdense.runtime.__main__ import main
from onnx_files import (
    BOXES,
    LABELS,
    MASKS,
    SCORES,
    write_classifier,
    write_detector,
    write_segmentor,
)


@pytest.fixture
def detector(tmp_path):
    return write_detector(tmp_path / 'boxes.onnx')


@pytest.fixture
def segmentor(tmp_path):
    return write_segmentor(tmp_path / 'classes.onnx')


@pytest.fixture
def folder(tmp_path):
    """A folder of three images of two sizes, and a damaged one."""
    (tmp_path / 'in').mkdir()
    for name, size, colour in (
        ('a.png', (64, 48), 'red'),
        ('c.png', (32, 48), 'black'),
        ('d.png', (64, 48), 'lime'),
    ):
        Image.new('RGB', size, colour).save(tmp_path / 'in' / name)
    (tmp_path / 'in/b.jpg').touch()
    return tmp_path / 'in'


def test_boxes_are_in_pixels_of_the_original(tmp_path, folder, detector):
    one = Detector(detector)(folder / 'c.png')
    assert len(one) == 1
    np.testing.assert_allclose(one[0]['bboxes'], BOXES[:2])
    np.testing.assert_allclose(one[0]['scores'], SCORES[:2], atol=1e-6)
    assert one[0]['labels'].tolist() == LABELS[:2]
    resize = dict(scale=[128, 96], keep_ratio=False)
    file = write_detector(tmp_path / 'x.onnx', resize=resize)
    scaled = Detector(file)(folder / 'c.png')[0]['bboxes']  # 32 x 48 becomes 128 x 96
    np.testing.assert_allclose(scaled, np.array(BOXES[:2]) / [4, 2, 4, 2])


def test_a_batch_predicts_what_images_do_alone(folder, detector, segmentor, monkeypatch):
    files, shapes, run = sorted(folder.glob('*.png')), [], Session.run

    def counted(self, images, outputs=None):
        shapes.append(images.shape)
        return run(self, images, outputs)

    monkeypatch.setattr(Session, 'run', counted)
    for kind, file in ((Detector, detector), (Segmentor, segmentor)):
        together, alone = kind(file, batch=3)(files), kind(file)(files)
        for one, other in zip(together, alone, strict=True):
            assert one.keys() == other.keys()
            for name, value in one.items():
                np.testing.assert_array_equal(value, other[name])
    assert [shape[0] for shape in shapes] == [2, 1, 1, 1, 1] * 2
    fixed = write_detector(file.with_name('x.onnx'), shape=[1, 3, 48, 64])
    assert Detector(fixed, batch=8).batch == 1


def test_images_are_padded_where_the_pipeline_does(tmp_path, folder, monkeypatch):
    inputs, pad = [], dict(size=[70, 50], value=114.0)
    file = write_detector(tmp_path / 'x.onnx', pad=pad)
    monkeypatch.setattr(Session, 'run', lambda self, images: inputs.append(images) or {})
    with pytest.raises(KeyError):
        Detector(file)(folder / 'a.png')
    assert inputs[0].shape == (1, 3, 50, 70)
    assert inputs[0][0, :, 0, 0].tolist() == [255, 0, 0]
    assert (inputs[0][..., 64:] == 114).all()


def test_masks_are_pasted_as_mmdet_does(tmp_path):
    from mmdet.models.roi_heads.mask_heads.fcn_mask_head import _do_paste_mask

    generator = np.random.default_rng(0)
    masks = generator.random((20, 28, 28), np.float32)
    corners = np.sort(generator.uniform(-5, 105, (20, 2, 2)).astype(np.float32), 1)
    boxes = corners.reshape(20, 4)
    expected, _ = _do_paste_mask(
        torch.tensor(masks)[:, None], torch.tensor(boxes), 90, 100, skip_empty=False
    )
    sure = (expected - 0.5).abs() > 1e-3  # of rounding
    pasted = models.paste_masks(masks, boxes, (90, 100), 0.5)
    assert pasted.any((1, 2)).sum() > 15
    assert (pasted == (expected >= 0.5).numpy())[sure.numpy()].all()
    image = np.zeros((48, 64, 3), np.uint8)
    file = write_detector(tmp_path / 'x.onnx', masks=MASKS)
    (prediction,) = Detector(file)(image)
    assert prediction['masks'].shape == (2, 48, 64)
    assert prediction['masks'][0, 5:16, 9:39].all()
    assert prediction['masks'][0].sum() < 33 * 15
    drawn = Detector(file).draw(image, prediction)
    assert drawn.any()


@pytest.mark.parametrize('scale', [None, [128, 96]])
@pytest.mark.parametrize('slide', [None, dict(crop_size=[20, 24], stride=[16, 10])])
def test_segmentations_of_complete_images_and_windows(scale, slide, tmp_path):
    resize = scale and dict(scale=scale, keep_ratio=True)
    settings = dict(threshold=0.6, slide=slide)
    image = np.zeros((48, 64, 3), np.uint8)
    image[:, :32, 0] = image[:, 32:, 1] = 200
    file = write_segmentor(tmp_path / 'x.onnx', resize=resize, postprocessing=settings)
    (found,) = Segmentor(file)(image)
    assert found['label_map'].shape == (48, 64)
    assert (found['label_map'][:, :32] == 0).all()
    assert (found['label_map'][:, 32:] == 1).all()
    sure = 1 / (1 + np.exp(-2))
    np.testing.assert_allclose(found['probabilities'][:, :30], sure, atol=1e-4)
    # One channel for two classes: red where its probability is above the threshold.
    file = write_segmentor(tmp_path / 'y.onnx', 1, resize=resize, postprocessing=settings)
    (found,) = Segmentor(file)(image)
    assert (found['label_map'][:, :30] == 1).all()
    assert (found['label_map'][:, 34:] == 0).all()
    np.testing.assert_allclose(found['probabilities'][:, :30], sure, atol=1e-4)
    np.testing.assert_allclose(found['probabilities'][:, 34:], 0.5, atol=1e-4)


def test_each_kind_refuses_the_other_s_file(tmp_path, detector, segmentor):
    assert isinstance(open_model(detector), Detector)
    assert isinstance(open_model(segmentor), Segmentor)
    with pytest.raises(UserError, match=r'classes\.onnx is for semantic .*runtime\.Segmentor'):
        Detector(segmentor)
    with pytest.raises(UserError, match=r'boxes\.onnx is for detection: .*runtime\.Detector'):
        Segmentor(detector)
    with pytest.raises(UserError, match=r'is for depth: load it by mmdense\.runtime\.Session'):
        open_model(write_segmentor(tmp_path / 'x.onnx', task='depth'))
    resize = dict(scale=[64, 64], keep_ratio=True)
    model = Detector(write_detector(tmp_path / 'y.onnx', resize=resize))
    with pytest.raises(UserError, match='1 x 5000 pixels: too narrow'):
        model(np.zeros((1, 5000, 3), np.uint8))


def test_a_classifier(tmp_path, folder):
    rules = dict(resize=dict(scale=8, edge='short', pillow='bilinear'), crop=[8, 8])
    file = write_classifier(tmp_path / 'x.onnx', **rules)
    image = np.zeros((20, 60, 3), np.uint8)
    image[..., 2], image[:, :15, 0] = 100, 255  # blue, and red outside the centre
    (found,) = Classifier(file)(image)
    expected = np.exp([1, 0, 0]) / (np.e + 2)
    np.testing.assert_allclose(found['scores'], expected, atol=1e-6)
    assert found['labels'].tolist() == [2, 0, 1]
    (result,) = open_model(file).coco(found, 1, score_thr=0.9)  # whatever the score
    assert (result['category_id'], result['bbox']) == (3, [0, 0, 60, 20])
    assert Classifier(file).draw(image, found).shape == image.shape
    together = Classifier(file, batch=3)(sorted(folder.glob('*.png')))
    assert [x['labels'][0] for x in together] == [0, 0, 1]


# The command


@pytest.mark.parametrize('batch', [1, 4])
def test_a_folder(batch, tmp_path, folder, capsys):
    file = write_detector(tmp_path / 'x.onnx', masks=MASKS)
    arguments = [file, folder, '--out', tmp_path / 'out', '--batch', batch, '--threads', 1]
    with pytest.raises(SystemExit) as status:
        main([str(argument) for argument in arguments])
    assert status.value.code == 1
    output = capsys.readouterr()
    assert output.err == f'skipped: {folder}/b.jpg: empty file\n'
    assert output.out.startswith('3 images, 1 skipped; pictures: ')
    data = COCO(str(tmp_path / 'out/predictions.json'))
    assert [data.imgs[i]['picture'] for i in (1, 2, 3)] == [
        f'pictures/{name}.png' for name in 'acd'
    ]
    assert len(data.anns) == 3  # those above the threshold
    assert data.anns[1]['category_id'] == 7
    assert data.anns[1]['bbox'] == [8, 4, 32, 26]
    assert data.anns[1]['area'] == data.annToMask(data.anns[1]).sum() > 300
    assert {path.name for path in (tmp_path / 'out/pictures').iterdir()} == {
        'a.png',
        'c.png',
        'd.png',
    }


def test_an_image_that_fails_in_a_batch_is_skipped_alone(tmp_path, folder, detector, monkeypatch):
    run = Session.run

    def fails(self, images, outputs=None):
        if images.shape[3] == 32:
            raise UserError('the model takes no such size')
        return run(self, images, outputs)

    monkeypatch.setattr(Session, 'run', fails)
    results = list(open_model(detector, batch=4).try_each(sorted(folder.glob('*.png'))))
    assert [isinstance(result, UserError) for result in results] == [False, True, False]


def test_a_command_without_torch_and_mm_packages(tmp_path, folder, segmentor):
    """It runs where they cannot be imported, and says in one line what is wrong."""
    hidden = ('torch', 'torchvision', 'timm', 'mmengine', 'mmcv', 'mmdet', 'mmseg', 'cv2')
    code = f"""
import sys
sys.modules.update(dict.fromkeys({(*hidden, 'matplotlib', 'rich', 'onnx')!r}))
from mmdense.runtime.__main__ import main
main()
"""
    command = [sys.executable, '-c', code, segmentor, folder, '--out', tmp_path / 'out']
    done = subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (1, f'skipped: {folder}/b.jpg: empty file\n')
    assert json.loads((tmp_path / 'out/predictions.json').read_text())['categories'][0]['id'] == 3
    labels = np.asarray(Image.open(tmp_path / 'out/label_maps/d.png'))
    assert labels.shape == (48, 64)
    assert (labels == 1).all()
    done = subprocess.run(
        [*map(str, command), '--provider', 'cuda'], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 2
    assert done.stderr.startswith('error: ')
    assert done.stderr.count('\n') == 1
    code = f"""
import sys, mmdense.runtime.__main__
assert not set({hidden!r}) & {{name.partition('.')[0] for name in sys.modules}}
"""
    subprocess.run([sys.executable, '-c', code], check=True, timeout=60)  # where they are installed


@pytest.mark.parametrize('option', [('--batch', '0'), ('--threads', '-1'), ('--score', '30')])
def test_options_out_of_range(option, detector, folder, tmp_path, capsys):
    with pytest.raises(SystemExit) as status:
        main([str(detector), str(folder), '--out', str(tmp_path / 'out'), *option])
    assert status.value.code == 2
    assert f'argument {option[0]}: {option[1]} is not ' in capsys.readouterr().err


@pytest.mark.parametrize(
    ('error', 'code', 'line'),
    [
        (
            OSError(errno.ENOSPC, 'No space left on device'),
            2,
            'error: cannot write .*No space left',
        ),
        (KeyboardInterrupt(), 130, 'interrupted'),
    ],
)
def test_a_full_disk_and_ctrl_c_end_in_one_line(
    error, code, line, detector, folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(Image.Image, 'save', Mock(side_effect=error))
    with pytest.raises(SystemExit) as status:
        main([str(detector), str(folder), '--out', str(tmp_path / 'out')])
    assert status.value.code == code
    assert re.fullmatch(line + '.*\n', capsys.readouterr().err)
