"""What annotations and label maps leave to learn."""

import numpy as np
import pytest

from mmdense.datasets.check import ReadOptions
from mmdense.datasets.content import check_objects, check_pixels, count_suffixes

RANDOM = np.random.default_rng(0)
SIZE = np.array([640, 480])
CORNER = (RANDOM.uniform(0, 0.7, (60, 2)) * SIZE).round()
BOXES = np.hstack([CORNER, (RANDOM.uniform(0.05, 0.3, (60, 2)) * SIZE).round()])
CORNERS = np.hstack([CORNER, CORNER + BOXES[:, 2:]])
BEYOND = BOXES.copy()
BEYOND[:2] = [600, 400, 99, 99]


def kinds(findings):
    return [finding.kind for finding in findings]


@pytest.mark.parametrize(
    ('boxes', 'kind', 'text'),
    [
        (BOXES, None, ''),
        (BEYOND, None, ''),  # careless annotators
        (BOXES[:, [0, 1, 3, 2]] * [1, 1, 0, 0], None, ''),  # without area
        (BOXES / [*SIZE, *SIZE], 'relative boxes', '60 of 60 boxes lie between 0 and 1, such as ['),
        (CORNERS / [*SIZE, *SIZE], 'relative boxes', '60 of 60'),
        (CORNERS, 'box format', 'and none would as x1, y1, x2, y2'),
        (CORNERS[:, [1, 0, 3, 2]], 'box format', 'and none would as y1, x1, y2, x2'),
        (BOXES + BOXES[:, [2, 3, 0, 0]] * [0.5, 0.5, 0, 0], 'box format', 'as centre, width'),
    ],
)
def test_formats_of_boxes(boxes, kind, text):
    rows = np.hstack([boxes, np.tile(SIZE, (60, 1))])
    findings = check_objects('a.json', rows, dict(a=60), ['a'])
    assert kinds(findings) == ([kind] if kind else [])
    assert not kind or text in findings[0].text


def test_classes_without_objects():
    for objects, kind, text in (
        (dict(a=2, b=1), None, ''),
        (dict(a=2), 'absent class', 'no object of b is left of 0 annotations'),
        ({}, 'nothing to learn', 'no object of a, b is left of 0 annotations'),
    ):
        findings = check_objects('a.json', [], objects, ['a', 'b'])
        assert [(f.kind, f.text) for f in findings] == ([(kind, text)] if kind else [])


@pytest.mark.parametrize(
    ('pixels', 'options', 'kind', 'text'),
    [
        ({0: 50, 1: 50}, {}, None, ''),
        ({0: 99, 255: 1}, {}, 'binary masks', 'contain only 0, 255: no pixel of b'),
        ({0: 50, 1: 50}, dict(reduce_zero_label=True), 'nothing to learn', 'True ignores 0'),
        ({0: 50, 255: 50}, dict(reduce_zero_label=True), 'binary masks', 'no pixel of a, b'),
        ({0: 50}, {}, 'nothing to learn', 'only 0: no pixel of b'),
        ({0: 50}, dict(where='val_dataloader.dataset'), 'one class', 'only 0: no pixel of b'),
        ({1: 50, 255: 99}, {}, 'nothing to learn', 'only 1, 255: no pixel of a'),
        ({0: 5, 1: 5, 255: 90}, {}, 'mostly ignored', '90% of all pixels'),
        ({0: 50, 2: 50}, dict(classes=3, names='abc'), 'absent class', 'no pixel of b'),
        ({0: 50, 2: 50}, dict(classes=3, names='abc', label_map={2: 1}), 'absent class', 'of c'),
        ({}, {}, None, ''),
        ({0: 50}, dict(classes=None), None, ''),
    ],
)
def test_classes_without_pixels(pixels, options, kind, text):
    counts = np.zeros(256, int)
    counts[list(pixels)] = list(pixels.values())
    options = ReadOptions(**dict(dict(classes=2, names='ab', where='train'), **options))
    findings = check_pixels(counts, options)
    assert kinds(findings)[:1] == ([kind] if kind else [])
    assert not kind or text in findings[0].text
    few = kinds(check_pixels(counts, options, complete=False))
    assert 'absent class' not in few  # it may be in the others
    assert 'nothing to learn' not in few


def test_suffixes():
    names = ['x.PNG', 'y.tar.PNG', 'z.jpeg', 'README']
    assert count_suffixes(names) == '2 .PNG, 1 , 1 .jpeg'
    assert count_suffixes(['1_mask.png', '10_mask.png'], ['1', '10']) == '2 _mask.png'
    assert count_suffixes([]) == 'none'
