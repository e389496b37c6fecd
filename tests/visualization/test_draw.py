"""Drawings of predictions and of ground truth, and a grid of them."""

import subprocess
import sys

import numpy as np
import pytest

from mmdense.visualization import draw
from mmdense.visualization.draw import draw_instances, draw_label_map, make_palette

CLASSES = ('background', 'cat', 'čaj')
PALETTE = [(0, 0, 0), (255, 225, 25), (0, 130, 200)]
BOX = [20, 60, 120, 160]
MASK = np.zeros((1, 200, 300), bool)
MASK[:, 80:140, 40:100] = True


@pytest.fixture
def image():
    return np.full((200, 300, 3), 100, np.uint8)


def draw_boxes(image, boxes, labels, scores=None, **more):
    instances = dict(bboxes=np.array(boxes, np.float32), labels=np.array(labels), **more)
    if scores is not None:
        instances['scores'] = np.array(scores)
    return draw_instances(image, instances, CLASSES, PALETTE)


def near(pixels, colour):
    return np.abs(pixels.astype(int) - colour).max(-1) < 3


def test_boxes_have_the_colours_of_their_classes(image):
    drawing = draw_boxes(image, [BOX, [180, 60, 280, 160]], [1, 2], [0.9, 0.8])
    assert drawing.dtype == np.uint8
    assert near(drawing[60:161, 20], PALETTE[1]).all()
    assert near(drawing[160, 180:281], PALETTE[2]).all()
    assert (drawing[80:150, 40:100] == 100).all()
    assert (image == 100).all()
    assert (draw_boxes(image, np.zeros((0, 4)), [], []) == image).all()
    assert draw_boxes(image, [[-50, -50, 500, 1], [290, 190, 300, 200]], [1, 2], [1, 1]).any()
    best_on_top = draw_boxes(image, [BOX, BOX], [1, 2], [0.9, 0.8])
    assert near(best_on_top[60:161, 20], PALETTE[1]).all()


def test_masks_are_blended_and_ground_truth_is_dashed(image):
    drawing = draw_boxes(image, [BOX], [1], [0.9], masks=MASK)
    assert near(drawing[85:135, 45:95], 100 * 0.55 + np.array(PALETTE[1]) * 0.45).all()
    assert (drawing[145:155, 40:100] == 100).all()
    assert near(drawing[80:140, 40], PALETTE[1]).all()  # the contour
    masks = np.concatenate([MASK, np.zeros_like(MASK)])
    truth = draw_boxes(image, [BOX, [50, 50, 50, 50]], [1, 2], masks=masks)
    for side in (truth[80:161, 20], truth[80:140, 40]):
        assert 0.3 < near(side, PALETTE[1]).mean() < 0.7


def test_labels_do_not_hide_small_objects(image):
    small = draw_boxes(image, [[100, 2, 110, 12]], [1], [0.9])
    assert (small[4:11, 102:109] == 100).all()
    assert near(small[13:30, 100:110], PALETTE[1]).any()


def test_label_maps_are_blended_and_named(image):
    label_map = np.zeros((200, 300), int)
    label_map[:, 100:200] = 1
    label_map[:, 200:] = 255  # ignored
    drawing = draw_label_map(image, label_map, CLASSES, PALETTE)
    assert (drawing[:, 200:] == 100).all()
    for area, colour in ((drawing[:, :100], PALETTE[0]), (drawing[:, 100:200], PALETTE[1])):
        share = near(area, 100 * 0.45 + np.array(colour) * 0.55).mean()
        assert 0.7 < share < 0.999  # the rest is the label
    label_map[:] = 0
    label_map[5:8, 5:8] = 2  # too small for a label
    drawing = draw_label_map(image, label_map, CLASSES, PALETTE)
    assert near(drawing[5:8, 5:8], 45 + np.array(PALETTE[2]) * 0.55).all()
    assert near(drawing[:40, :40][label_map[:40, :40] == 0], 45).all()


def test_colours_of_a_made_palette_differ():
    colours = make_palette(60)
    assert len(set(colours)) == 60
    assert all(len(c) == 3 and 0 <= min(c) <= max(c) <= 255 for c in colours)
    assert make_palette(0) == []


def test_drawing_needs_no_torch():
    code = f"""
import importlib.util, sys
spec = importlib.util.spec_from_file_location('draw', {draw.__file__!r})
spec.loader.exec_module(importlib.util.module_from_spec(spec))
assert not {{'torch', 'mmengine', 'mmdense'}} & set(sys.modules)
"""
    subprocess.run([sys.executable, '-c', code], check=True)
