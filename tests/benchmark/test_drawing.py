"""Drawings: labels stay apart, scales are round, colours can be told apart, and files show it."""

import random
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest

from mmdense.benchmark.drawing import (
    COLOURS,
    FAMILIES,
    Box,
    Dot,
    Drawing,
    Line,
    Point,
    Scale,
    Text,
    add_legend,
    place_labels,
    spread,
    svg,
    write_png,
)


def apart(boxes):
    return not any(a.hits(b) for i, a in enumerate(boxes) for b in boxes[:i])


@pytest.mark.parametrize('seed', range(12))
def test_labels_never_collide(seed):
    rng = random.Random(seed)
    room = Box(40, 20, *rng.choice([(360, 300), (560, 320)]))
    spread = rng.choice([1, 0.3, 0.02])  # all over, in a corner, nearly in one point
    points = [
        Point(
            room.left + spread * rng.random() * (room.right - room.left),
            room.top + spread * rng.random() * (room.bottom - room.top),
        )
        for _ in range(20)
    ]
    sizes = [(rng.uniform(30, 110), 14) for _ in points]
    taken = [Dot(at, 0).box for at in points]
    boxes = place_labels(points, sizes, room=room, taken=taken)
    assert None not in boxes
    assert apart(boxes)
    assert all(box.within(room) for box in boxes)
    assert not any(box.hits(other) for box in boxes for other in taken)
    for box, (width, height) in zip(boxes, sizes, strict=True):
        assert box.right - box.left == pytest.approx(width)
        assert box.bottom - box.top == pytest.approx(height)


def test_labels_are_near_and_avoid_lines():
    room, at = Box(0, 0, 300, 300), Point(150, 150)
    (box,) = place_labels([at], [(60, 14)], room=room, taken=[Dot(at, 0).box])
    assert (box.right, box.top, box.bottom) == (at.x - 12, at.y - 7, at.y + 7)  # beside it
    line = (Point(150, 150), Point(0, 150))
    (box,) = place_labels([at], [(60, 14)], room=room, taken=[Dot(at, 0).box], lines=[line])
    assert not box.crossed(*line)
    assert place_labels([at], [(301, 14)], room=room, taken=[]) == [None]


def test_labels_at_the_ends_of_curves_stay_apart():
    rng = random.Random(0)
    for _ in range(20):
        wanted = sorted(rng.uniform(0, 300) ** rng.choice([1, 0.5]) for _ in range(20))
        found = spread(wanted, 15, 0, 300)
        assert all(b - a >= 15 - 1e-9 for a, b in zip(found, found[1:], strict=False))
        assert found[0] >= 0
        assert found[-1] <= 300
    assert spread([10, 100], 15, 0, 300) == [10, 100]
    assert spread([50, 50, 51], 10, 0, 300) == pytest.approx([121 / 3, 151 / 3, 181 / 3])


def test_scales():
    assert not Scale.over([1, 8], 0, 100).log
    scale = Scale.over([1, 9], 0, 100)
    assert scale.log
    assert scale(3) == pytest.approx(50)
    assert list(scale.ticks().values()) == ['1', '2', '5', '10']
    assert list(Scale.over([0.61, 0.77], 0, 100).ticks().values()) == [
        '0.60',
        '0.65',
        '0.70',
        '0.75',
    ]
    for value in (0.0, 0.5, 1e-9, 3e12):
        scale = Scale.over([value], 0, 100)
        assert 0 <= scale(value) <= 100
        assert scale.ticks()


# How reds, greens and blues look without green cones, without red ones, without blue ones, and
# with all (Machado et al. 2009, linear RGB).
SIGHTS = (
    ((0.367, 0.861, -0.228), (0.280, 0.673, 0.047), (-0.012, 0.043, 0.969)),
    ((0.152, 1.053, -0.205), (0.115, 0.786, 0.099), (-0.004, -0.048, 1.052)),
    ((1.256, -0.077, -0.179), (-0.078, 0.931, 0.148), (0.005, 0.691, 0.304)),
    ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
)


def linear(colours):
    rgb = np.array([[int(c[i : i + 2], 16) / 255 for i in (1, 3, 5)] for c in colours])
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


@pytest.mark.parametrize('mode', [0, 1])
def test_colours_can_be_seen(mode):
    names = ('paper', 'ink', 'soft', 'bad')
    families = [look[mode] for look in FAMILIES]
    colours = linear([*(COLOURS[name][mode] for name in names), *families])
    paper, *others = colours @ (0.2126, 0.7152, 0.0722) + 0.05
    contrasts = [max(paper, light) / min(paper, light) for light in others]
    assert min(contrasts[:3]) > 4.5
    assert min(contrasts) > 3.5
    for sight in SIGHTS:
        seen = np.clip(linear(families) @ np.transpose(sight), 0, 1)
        seen = np.where(seen <= 0.0031308, 12.92 * seen, 1.055 * seen ** (1 / 2.4) - 0.055)
        lab = cv2.cvtColor(seen[None].astype(np.float32), cv2.COLOR_RGB2LAB)[0]
        distances = np.linalg.norm(lab[:, None] - lab, axis=-1)[np.triu_indices(len(lab), 1)]
        assert distances.min() > 15


def test_looks_differ_in_colour_and_shape():
    looks = {(i % len(FAMILIES), tuple(Dot(Point(0, 0), i).corners())) for i in range(36)}
    assert len(looks) == 36
    assert len({tuple(Dot(Point(0, 0), i).corners()) for i in range(6)}) == 6


def test_the_files_show_the_marks(tmp_path):
    marks = [
        Line((Point(0, 0), Point(90, 50)), 'axis', row=3),
        Dot(Point(40, 20), 1, title='<a>'),
        Text(Point(5, 40), 'a $1 & b'),
    ]
    drawing = Drawing(100, 60, 'a "title"', marks)
    add_legend(drawing, {'a family': 0, 'another one': 1})
    picture = ElementTree.fromstring(svg(drawing, 'wide'))
    assert [e.tag for e in picture] == ['polyline', 'polygon', 'text', *['polygon', 'text'] * 2]
    assert picture[0].attrib['data-row'] == '3'
    assert picture[1].findtext('title') == '<a>'
    assert picture[2].text == 'a $1 & b'
    assert picture.attrib['aria-label'] == 'a "title"'
    assert picture.attrib['viewBox'] == f'0 0 100 {drawing.height:.0f}'
    assert drawing.height > 80  # the second name is below the first one
    write_png(drawing, tmp_path / 'a.png')
    pixels = cv2.imread(str(tmp_path / 'a.png'))
    colour = [int(FAMILIES[1][0][i : i + 2], 16) for i in (5, 3, 1)]
    assert (np.abs(pixels - colour).max(2) < 3).sum() > 50
