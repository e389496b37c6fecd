"""What is found in images, label maps and annotation files, one fault at a time."""

import io
import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from mmseg.datasets.transforms import LoadAnnotations
from PIL import Image
from pycocotools import mask as coco_mask

import mmdense.models  # noqa: F401  (before OpenCV: sets its limit of pixels)
from bad_data import PIXELS, UNUSABLE, USABLE, WHOLE, bomb, box, coco, encode, png, write
from mmdense.datasets import check
from mmdense.datasets.check import (
    Finding,
    ReadOptions,
    Sample,
    check_coco,
    check_image,
    check_label_map,
    check_sample,
    map_labels,
)


def kinds(found):
    return [finding.kind for finding in found]


# Images


@pytest.mark.parametrize('name', USABLE)
def test_images_that_training_can_use(name, tmp_path):
    content, (width, height), kind = USABLE[name]
    file = write(tmp_path, name, content)
    found = check_image(file, size=(width, height))
    assert kinds(found) == ([kind] if kind else [])
    assert not kind or found[0].severity == 'warning'
    assert 'another size' in kinds(check_image(file, size=(width + 1, height)))


@pytest.mark.parametrize('name', UNUSABLE)
def test_images_that_training_cannot_use(name, tmp_path):
    content, kind = UNUSABLE[name]
    file = write(tmp_path, name, content)
    (finding,) = check_image(file, size=(96, 64))
    assert (finding.kind, finding.severity, finding.file) == (kind, 'error', str(file))
    assert '\n' not in str(finding)


def test_annotations_of_a_photograph_before_it_was_turned(tmp_path):
    file = write(tmp_path, 'turned.jpg', USABLE['turned.jpg'][0])
    (finding,) = check_image(file, size=(96, 64))
    assert str(finding) == f'{file}: 64 x 96 pixels, upright, but annotated as 96 x 64'
    assert not check_image(file, size=(64, 96))
    as_it_lies = ReadOptions(color_type='color_ignore_orientation')
    assert not check_image(file, size=(96, 64), options=as_it_lies)
    assert kinds(check_image(file, size=(64, 96), options=as_it_lies)) == ['another size']


def test_whoever_raises_the_limit_leaves_it_to_opencv(tmp_path, monkeypatch):
    file = write(tmp_path, 'bomb.png', bomb(20000, 10000))
    assert kinds(check_image(file)) == ['too many pixels']
    monkeypatch.setenv(check.PIXELS_VARIABLE, str(10**9))
    decoded = []
    monkeypatch.setattr(check.mmcv, 'imread', lambda *a, **k: decoded.append(a) or PIXELS)
    assert not check_image(file)
    assert decoded


LIMITED = """
import resource, sys
import mmdense.models
import cv2, mmcv
from mmdense.datasets.check import check_image, check_label_map

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

whole, *files = sys.argv[1:]
check_image(whole)
before = peak()
for file in files:
    try:
        trained = mmcv.imread(file) is not None
    except cv2.error:
        trained = 'refused'
    print(check_image(file)[0].kind, check_label_map(file)[0].kind, trained, sep=', ')
print(peak() - before)
# a label map, as mmseg reads it
try:
    mmcv.imread(files[-1], 'unchanged', backend='pillow')
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
    said = subprocess.run(
        [sys.executable, '-c', LIMITED, write(tmp_path, 'whole.jpg', WHOLE), *files],
        env=dict(os.environ, PATH=f'{tmp_path}:/usr/bin:/bin'),
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert said[:3] == ['too many pixels, too many pixels, refused'] * 3
    assert said[3:5] == ['no image, no image, False'] * 2
    assert float(said[5]) < 100  # MB
    assert said[6:] == ['refused']
    assert not (tmp_path / 'started').exists()


# Label maps


def label_map(folder, values, kind='PNG', mode='L'):
    values = np.asarray(values)
    file = io.BytesIO()
    image = Image.fromarray(values.astype(np.uint16 if values.max() > 255 else np.uint8))
    (image if mode is None else image.convert(mode)).save(file, kind)
    return write(folder, f'map.{kind.lower()}', file.getvalue())


MAP = np.arange(64 * 96).reshape(64, 96) % 3


def test_label_maps_that_fit(tmp_path):
    three = ReadOptions(classes=3)
    assert not check_label_map(label_map(tmp_path, MAP), size=(96, 64), options=three)
    assert not check_label_map(label_map(tmp_path, np.where(MAP == 1, 255, MAP)), options=three)
    palette = Image.fromarray(MAP.astype(np.uint8), 'P')
    palette.putpalette([9, 8, 7, 200, 100, 0, 1, 2, 3])
    palette.save(tmp_path / 'palette.png')
    assert not check_label_map(tmp_path / 'palette.png', options=three)
    by_opencv = ReadOptions(classes=3, label_backend='cv2')  # which sees the colours
    assert kinds(check_label_map(tmp_path / 'palette.png', options=by_opencv)) == ['label map']
    assert not check_label_map(label_map(tmp_path, MAP * 80), options=ReadOptions())  # nobody asks


@pytest.mark.parametrize(
    ('values', 'more', 'kind', 'text'),
    [
        (MAP + 1, {}, 'unknown label', '3 found, but the 3 classes are 0 to 2'),
        (MAP * 90, {}, 'unknown label', '90, 180 found'),
        (MAP + 2, dict(reduce_zero_label=True), 'unknown label', '4 found, but .* are 1 to 3'),
        (MAP * 0 + 255, {}, 'nothing labelled', 'no pixel has a class'),
        (MAP * 0, dict(reduce_zero_label=True), 'nothing labelled', 'no pixel has a class'),
        (MAP, dict(label_map={2: 7}), 'unknown label', '2 found'),
        (MAP[:, :90], {}, 'another size', '90 x 64 pixels, but its image has 96 x 64'),
        (MAP * 300, {}, 'label map', 'numbers up to 600, of which training keeps 8 bits'),
    ],
)
def test_label_maps_that_do_not_fit(values, more, kind, text, tmp_path):
    file = label_map(tmp_path, values, mode=None)
    options = ReadOptions(classes=3, **more)
    (finding,) = check_label_map(file, size=(96, 64), options=options)
    assert (finding.kind, finding.file) == (kind, str(file))
    assert re.search(text, finding.text), finding.text


def test_colours_and_jpeg_are_no_label_maps(tmp_path):
    three = ReadOptions(classes=3)
    for name, content, text in (
        ('colour.png', encode('PNG'), '3 numbers for each pixel'),
        ('map.jpg', encode(mode='L'), 'a JPEG, which changes the numbers'),
    ):
        (finding,) = check_label_map(write(tmp_path, name, content), options=three)
        assert (finding.kind, finding.text) == ('label map', text)
    for name, (content, kind) in UNUSABLE.items():
        assert kinds(check_label_map(write(tmp_path, name, content), options=three)) == [kind]


@pytest.mark.parametrize('reduce_zero_label', [False, True])
@pytest.mark.parametrize('replaced', [{}, {0: 3, 3: 255, 254: 1}])
def test_labels_are_those_of_mmseg(reduce_zero_label, replaced, tmp_path):
    numbers = np.arange(256, dtype=np.uint8).reshape(16, 16)
    file = write(tmp_path, 'map.png', png(numbers))
    info = dict(seg_map_path=str(file), reduce_zero_label=reduce_zero_label, seg_fields=[])
    theirs = LoadAnnotations()(dict(info, label_map=replaced))['gt_seg_map']
    options = ReadOptions(reduce_zero_label=reduce_zero_label, label_map=replaced)
    assert (map_labels(numbers, options) == theirs).all()


def test_a_sample_is_an_image_and_its_map(tmp_path):
    image = write(tmp_path, 'image.jpg', USABLE['turned.jpg'][0])
    lying, upright = label_map(tmp_path, MAP), write(tmp_path, 'u.png', png(MAP.T.astype(np.uint8)))
    assert not check_sample(Sample(str(image), label_map=str(upright)), ReadOptions(classes=3))
    (finding,) = check_sample(Sample(str(image), label_map=str(lying)), ReadOptions(classes=3))
    assert (finding.kind, finding.file) == ('another size', str(lying))
    (finding,) = check_sample(Sample(str(image), 7, (96, 64)), ReadOptions())
    assert (finding.kind, finding.id) == ('another size', 'image 7')


# Annotations


def found_in(tmp_path, held, **options):
    """Check an annotation file; return {kind: [part: text]} and the images' names."""
    file = tmp_path / 'a.json'
    file.write_text(held if isinstance(held, str) else json.dumps(held))
    options = dict(dict(classes=('a', 'b'), images=tmp_path / 'img'), **options)
    found, samples = check_coco(file, **options)
    said = {}
    for finding in found:
        said.setdefault(finding.kind, []).append(
            ': '.join(filter(None, (finding.id, finding.text)))
        )
    return said, samples


def test_annotations_that_are_right(tmp_path):
    held = coco(
        [(1, 'x.jpg', 96, 64), ('two', 'y.v2.jpg', 96, 64)],
        [
            box(1),
            box(2, 'two', 2),
            box(3, iscrowd=1, segmentation=dict(size=[64, 96], counts=[6144])),
        ],
    )
    said, samples = found_in(tmp_path, held, masks=True, label_maps=tmp_path / 'maps')
    assert not said
    assert samples == [
        Sample(str(tmp_path / 'img/x.jpg'), 1, (96, 64), str(tmp_path / 'maps/x.png')),
        Sample(str(tmp_path / 'img/y.v2.jpg'), 'two', (96, 64), str(tmp_path / 'maps/y.v2.png')),
    ]


WRONG = {
    'empty box': [
        dict(bbox=(8, 8, 0, 30)),
        dict(bbox=(8, 8, 40, 0.5)),
        dict(bbox=(8, 8, -4, 9), area=36),
        dict(area=0),
    ],
    'box outside': [dict(bbox=(96, 8, 40, 30)), dict(bbox=(-50, 8, 40, 30))],
    'box across the border': [dict(bbox=(80, 8, 40, 30)), dict(bbox=(-5, 8, 40, 30))],
    'fields': [
        dict(bbox=None),
        dict(bbox=[1, 2, 3]),
        dict(bbox=['1', 2, 3, 4]),
        dict(bbox=[1, 2, float('nan'), 4]),
        dict(area=None),
        dict(area=10**400),
        dict(image_id=[1]),
    ],
    'unknown image': [dict(image_id=5), dict(image_id=None)],
    'unknown category': [dict(category_id=9)],
    'mask': [
        dict(segmentation=[]),
        dict(segmentation=None),
        dict(segmentation='text'),
        dict(segmentation=[8, 8, 20, 8, 20, 30]),
        dict(segmentation=[[8, 8, 1e9, 8, 20, 30]]),
        dict(segmentation=[[8, 8, 10**400, 8, 20, 30]]),
        dict(segmentation=[[8, 8, float('nan'), 8, 20, 30]]),
        dict(segmentation=dict(size=[96, 64], counts=[6144])),
        dict(segmentation=dict(size=[64, 96], counts=[6143])),
        dict(segmentation=dict(size=[64, 96], counts='no')),
        dict(segmentation=dict(counts=[6144])),
    ],
    'polygon': [
        dict(segmentation=[[8, 8, 20, 8]]),
        dict(segmentation=[[8, 8, 20, 8], [8, 8, 20, 8, 20, 30]]),
        dict(segmentation=[[8, 8, 20, 8, 20, 30, 4]]),
    ],
}


@pytest.mark.parametrize('kind', WRONG)
def test_annotations_that_are_wrong(kind, tmp_path):
    parts = [box(10 + i) | more for i, more in enumerate(WRONG[kind])]
    said, samples = found_in(tmp_path, coco([(1, 'x.jpg', 96, 64)], [box(1), *parts]), masks=True)
    assert set(said) == {kind}
    assert len(said[kind]) == len(parts)
    for i, line in enumerate(said[kind]):
        assert f'annotation {10 + i}: ' in line
    assert len(samples) == 1
    if kind in ('mask', 'polygon'):  # nobody looks at masks
        assert not found_in(tmp_path, coco([(1, 'x.jpg', 96, 64)], [box(1), *parts]))[0]


def test_ids_and_fields(tmp_path):
    images = [
        (1, 'x.jpg', 96, 64),
        (1, 'y.jpg', 96, 64),
        (2, 'z.jpg', 0, 64),
        (3, 'z.jpg', 96, '64'),
        (4, '', 96, 64),
        dict(file_name='no id'),
        (6, 'same.jpg', 96, 64),
        (7, 'same.jpg', 96, 64),
    ]
    annotations = [box(1), box(1), dict(box(2), id=None), 'text', box(3, 6), box(4, 7)]
    said, samples = found_in(tmp_path, coco(images, annotations))
    assert said['duplicate id'] == [
        'image 1: images[1] has the id of another',
        'annotation 1: has the id of another',
    ]
    assert said['duplicate file'] == ['image 6: images 6, 7 are same.jpg']
    assert said['fields'] == [
        'image 2: width is 0',
        "image 3: height is '64'",
        "image 4: file_name is ''",
        'images[5]: no id',
        'annotations[2]: no id, or no segments_info',
        'annotations[3]: no id, or no segments_info',
    ]
    assert [sample.id for sample in samples] == [1, 6, 7]
    assert samples[0].image.endswith('y.jpg')  # the last, as in pycocotools


def test_classes(tmp_path):
    one = [(1, 'x.jpg', 96, 64)]
    # mmdet would number what it finds: b would be called a.
    said, _ = found_in(tmp_path, coco(one, [box(1)], ['b', 'c']), classes=('a', 'b'))
    assert said['classes'] == ['no category a (it has b, c)']
    said, _ = found_in(tmp_path, coco(one, [box(1)], ['b', 'a']))
    assert said == {'order of classes': ['categories come as b, a']}
    said, _ = found_in(tmp_path, coco(one, [box(1), box(2, category=3)], ['a', 'b', 'c']))
    assert said == {'unused category': ['category c: 1 annotations']}
    twice = [dict(id=1, name='a'), dict(id=2, name='b'), dict(id=3, name='a')]
    assert found_in(tmp_path, coco(one, [box(1)], twice))[0]['duplicate id'] == [
        'category a: 2 categories are named a'
    ]
    same = [dict(id=1, name='a'), dict(id=1, name='b')]
    assert 'duplicate id' in found_in(tmp_path, coco(one, [box(1)], same))[0]


def test_images_without_objects(tmp_path):
    images = [(1, 'x.jpg', 96, 64), (2, 'y.jpg', 96, 64), (3, 'z.jpg', 96, 20)]
    held = coco(images, [box(1), box(2, 3, bbox=(1, 1, 9, 9))])
    for options, left in (
        ({}, [1, 2, 3]),
        (dict(filter_empty=True), [1, 3]),
        (dict(filter_empty=True, min_size=32), [1]),
        (dict(filter_empty=True, min_size=32, training=False), [1, 2, 3]),
    ):
        said, samples = found_in(tmp_path, held, **options)
        assert said == {'no object': ['image 2: y.jpg']}
        assert [sample.id for sample in samples] == left
    said, samples = found_in(tmp_path, held, filter_empty=True, min_size=99)
    assert said['no images'] == ['no image is left']
    assert not samples


def test_evaluation_wants_other_things(tmp_path):
    images = [(1, 'x.jpg', 96, 64)]
    plain = box(1)
    del plain['iscrowd']
    assert not found_in(tmp_path, coco(images, [plain]))[0]
    said, _ = found_in(tmp_path, coco(images, [plain]), training=False)
    assert said == {
        'fields': ['image 1, annotation 1: no iscrowd, which evaluation asks for'],
    }
    unlabelled = coco(images)
    del unlabelled['annotations']
    assert not found_in(tmp_path, unlabelled, training=False)[0]
    assert found_in(tmp_path, unlabelled)[0] == {'annotation file': ['no list of annotations']}


@pytest.mark.parametrize(
    ('held', 'text'),
    [
        ('', 'JSONDecodeError'),
        ('{"images": [', 'JSONDecodeError'),
        ('[' * 100_000, 'RecursionError'),
        ('[]', 'holds a list'),
        ('{}', 'no list of images'),
        ('{"images": [], "annotations": []}', 'no list of categories'),
    ],
)
def test_no_annotation_file(held, text, tmp_path):
    said, samples = found_in(tmp_path, held)
    assert text in said['annotation file'][0]
    assert not samples
    (finding,), _ = check_coco(tmp_path / 'missing.json', classes=(), images='')
    assert (finding.kind, finding.text) == ('annotation file', 'no such file')


def test_panoptic_files(tmp_path):
    images = [(1, 'x.jpg', 96, 64), (2, 'y.jpg', 96, 64)]
    part = dict(id=5, category_id=1, bbox=[8, 8, 40, 30], area=900, iscrowd=0)
    wrong = [dict(part, category_id=9), dict(part, bbox=[1, 1, 0, 5]), dict(part, area=None)]
    annotations = [
        dict(image_id=1, file_name='x.png', segments_info=[part]),
        dict(image_id=2, file_name='y.png', segments_info=[part, *wrong]),  # an id is its image's
    ]
    options = dict(panoptic=True, label_maps=tmp_path)
    said, samples = found_in(tmp_path, coco(images, annotations), **options)
    assert set(said) == {'unknown category', 'empty box', 'fields'}
    assert all(line.startswith('image 2, annotation 5: ') for [line] in said.values())
    assert samples[1].label_map == str(tmp_path / 'y.png')
    said, _ = found_in(tmp_path, coco(images, [dict(image_id=1)]), **options)
    assert said['fields'] == ['annotations[0]: no id, or no segments_info']


def test_compressed_masks(tmp_path):
    mask = np.zeros((64, 96), np.uint8, order='F')
    mask[8:38, 8:48] = 1
    rle = coco_mask.encode(mask)
    rle['counts'] = rle['counts'].decode()
    held = coco([(1, 'x.jpg', 96, 64)], [box(1, segmentation=rle)])
    assert not found_in(tmp_path, held, masks=True)[0]


def test_a_line_of_text_for_names_with_codes():
    finding = Finding('no image', 'a\x1b[2J\nb.jpg', 'not an image', 'image 3')
    assert str(finding) == 'a\\x1b[2J\\nb.jpg: image 3: not an image'
