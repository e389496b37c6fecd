"""Checks of images and label maps, one fault at a time."""

import io
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from mmseg.datasets.transforms import LoadAnnotations
from PIL import Image

import mmdense.models  # noqa: F401  (before OpenCV: sets its limit of pixels)
from bad_data import INTACT, PIXELS, UNUSABLE, USABLE, bomb, encode, png, write
from mmdense.datasets import check
from mmdense.datasets.check import Finding, ReadOptions, Sample, check_sample, map_labels

THREE = ReadOptions(classes=3)


def check_image(file, size=None, options=None):
    return check_sample(Sample(str(file), size=size), options or ReadOptions())


def check_map(file, options=THREE):
    """Check a label map beside an intact image of 96 x 64 pixels; return (kind, text) pairs."""
    image = write(file.parent, 'intact.jpg', INTACT)
    findings = check_sample(Sample(str(image), label_map=str(file)), options)
    assert all(finding.file == str(file) for finding in findings)
    return [(finding.kind, finding.text) for finding in findings]


def kinds(findings):
    return [finding.kind for finding in findings]


# Images


@pytest.mark.parametrize('name', USABLE)
def test_usable_images(name, tmp_path):
    content, (width, height), kind = USABLE[name]
    file = write(tmp_path, name, content)
    findings = check_image(file, size=(width, height))
    assert kinds(findings) == ([kind] if kind else [])
    assert not kind or findings[0].severity == 'warning'
    assert 'size mismatch' in kinds(check_image(file, size=(width + 1, height)))


@pytest.mark.parametrize('name', UNUSABLE)
def test_unusable_images(name, tmp_path):
    content, kind = UNUSABLE[name]
    file = write(tmp_path, name, content)
    (finding,) = check_image(file, size=(96, 64))
    assert (finding.kind, finding.severity, finding.file) == (kind, 'error', str(file))
    assert '\n' not in str(finding)
    assert kinds(check_sample(Sample(str(file), label_map=str(file)), THREE)) == [kind] * 2


def test_a_photograph_annotated_before_its_rotation(tmp_path):
    file = write(tmp_path, 'rotated.jpg', USABLE['rotated.jpg'][0])
    (finding,) = check_image(file, size=(96, 64))
    assert str(finding) == f'{file}: 64 x 96 pixels upright, annotated as 96 x 64'
    assert not check_image(file, size=(64, 96))
    as_stored = ReadOptions(color_type='color_ignore_orientation')
    assert not check_image(file, (96, 64), as_stored)
    assert kinds(check_image(file, (64, 96), as_stored)) == ['size mismatch']


def test_a_raised_limit_of_pixels_is_left_to_opencv(tmp_path, monkeypatch):
    file = write(tmp_path, 'bomb.png', bomb(20000, 10000))
    assert kinds(check_image(file)) == ['too many pixels']
    monkeypatch.setenv(check.PIXELS_VARIABLE, str(10**9))
    monkeypatch.setattr(check.mmcv, 'imread', lambda *args, **kwargs: PIXELS)
    assert not check_image(file)


LIMITED = """
import resource, sys
import mmdense.models
import cv2, mmcv
from mmdense.datasets.check import ReadOptions, Sample, check_sample

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

def kinds(file):
    return [f.kind for f in check_sample(Sample(file, label_map=file), ReadOptions(classes=2))]

intact, *files = sys.argv[1:]
kinds(intact)
before = peak()
for file in files:
    try:
        trained = mmcv.imread(file) is not None
    except cv2.error:
        trained = 'refused'
    print(*kinds(file), trained, sep=', ')
print(peak() - before)
try:
    mmcv.imread(files[-1], 'unchanged', backend='pillow')  # as mmseg reads a label map
except OSError:
    print('refused')
"""


@pytest.mark.slow
def test_bombs_take_no_memory_and_nothing_is_started(tmp_path):
    """Pillow hands PostScript to Ghostscript: a stand-in would leave a file behind."""
    stand_in = write(tmp_path, 'gs', f'#!/bin/sh\ntouch {tmp_path}/started\n'.encode())
    stand_in.chmod(0o755)
    files = [write(tmp_path, f'{n}.png', bomb(n, n)) for n in (15_000, 30_000, 50_000)]
    for name in ('drawing.jpg', 'postscript.jpg'):
        files.append(write(tmp_path, name, UNUSABLE[name][0]))
    lines = subprocess.run(
        [sys.executable, '-c', LIMITED, write(tmp_path, 'intact.jpg', INTACT), *files],
        env=dict(os.environ, PATH=f'{tmp_path}:/usr/bin:/bin'),
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert lines[:3] == ['too many pixels, too many pixels, refused'] * 3
    assert lines[3:5] == ['not an image, not an image, False'] * 2
    assert float(lines[5]) < 100  # MB
    assert lines[6:] == ['refused']
    assert not (tmp_path / 'started').exists()


# Label maps


def label_map(folder, values, kind='PNG'):
    values = np.asarray(values)
    file = io.BytesIO()
    Image.fromarray(values.astype(np.uint16 if values.max() > 255 else np.uint8)).save(file, kind)
    return write(folder, f'map.{kind.lower()}', file.getvalue())


MAP = np.arange(64 * 96).reshape(64, 96) % 3


def test_label_maps_that_fit(tmp_path):
    assert not check_map(label_map(tmp_path, MAP))
    assert not check_map(label_map(tmp_path, np.where(MAP == 1, 255, MAP)))
    assert not check_map(label_map(tmp_path, MAP * 80), ReadOptions())  # labels are not checked
    palette = Image.fromarray(MAP.astype(np.uint8), 'P')
    palette.putpalette([9, 8, 7, 200, 100, 0, 1, 2, 3])
    palette.save(tmp_path / 'palette.png')
    assert not check_map(tmp_path / 'palette.png')
    by_opencv = ReadOptions(classes=3, label_backend='cv2')  # reads the palette's colours
    assert check_map(tmp_path / 'palette.png', by_opencv)[0][0] == 'not a label map'


@pytest.mark.parametrize(
    ('values', 'options', 'kind', 'text'),
    [
        (MAP + 1, {}, 'unknown label', '3 found, but the 3 classes are 0 to 2'),
        (MAP * 90, {}, 'unknown label', '90, 180 found'),
        (MAP + 2, dict(reduce_zero_label=True), 'unknown label', '4 found, but .* are 1 to 3'),
        (MAP * 0 + 255, {}, 'no labels', 'no pixel has a class'),
        (MAP * 0, dict(reduce_zero_label=True), 'no labels', 'no pixel has a class'),
        (MAP, dict(label_map={2: 7}), 'unknown label', '2 found'),
        (MAP[:, :90], {}, 'size mismatch', '90 x 64 pixels, but its image has 96 x 64'),
        (MAP * 300, {}, 'not a label map', 'numbers from 0 to 600, of which training'),
    ],
)
def test_label_maps_that_do_not_fit(values, options, kind, text, tmp_path):
    ((found, message),) = check_map(label_map(tmp_path, values), ReadOptions(classes=3, **options))
    assert found == kind
    assert re.search(text, message), message


def test_colours_and_jpeg_are_not_label_maps(tmp_path):
    for name, content, text in (
        ('colour.png', encode('PNG'), '3 numbers per pixel'),
        ('map.jpg', encode(mode='L'), 'a JPEG, which changes the numbers'),
    ):
        assert check_map(write(tmp_path, name, content)) == [('not a label map', text)]


@pytest.mark.parametrize('reduce_zero_label', [False, True])
@pytest.mark.parametrize('replaced', [{}, {0: 3, 3: 255, 254: 1}])
def test_labels_are_those_of_mmseg(reduce_zero_label, replaced, tmp_path):
    numbers = np.arange(256, dtype=np.uint8).reshape(16, 16)
    file = write(tmp_path, 'map.png', png(numbers))
    info = dict(seg_map_path=str(file), reduce_zero_label=reduce_zero_label, seg_fields=[])
    expected = LoadAnnotations()(dict(info, label_map=replaced))['gt_seg_map']
    options = ReadOptions(reduce_zero_label=reduce_zero_label, label_map=replaced)
    assert (map_labels(numbers, options) == expected).all()


def test_a_map_belongs_to_the_rotated_image(tmp_path):
    image = str(write(tmp_path, 'image.jpg', USABLE['rotated.jpg'][0]))
    stored = str(label_map(tmp_path, MAP))
    upright = str(write(tmp_path, 'upright.png', png(MAP.T.astype(np.uint8))))
    assert not check_sample(Sample(image, label_map=upright), THREE)
    (finding,) = check_sample(Sample(image, label_map=stored), THREE)
    assert (finding.kind, finding.file) == ('size mismatch', stored)
    (finding,) = check_sample(Sample(image, 7, (96, 64)), ReadOptions())
    assert (finding.kind, finding.id) == ('size mismatch', 'image 7')


def test_control_codes_in_names_are_escaped():
    finding = Finding('not an image', 'a\x1b[2J\nb.jpg', 'not an image', 'image 3')
    assert str(finding) == 'a\\x1b[2J\\nb.jpg: image 3: not an image'
