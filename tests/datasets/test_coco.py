"""Checks of COCO annotation files, one fault at a time."""

import json

import pytest

from bad_data import box, coco
from mmdense.datasets.check import Sample
from mmdense.datasets.coco import CocoCheck

ONE = [(1, 'x.jpg', 96, 64)]


@pytest.fixture
def check(tmp_path):
    """Check an annotation file; return ({kind: [part: text]}, samples)."""

    def run(content, **options):
        file = tmp_path / 'a.json'
        file.write_text(content if isinstance(content, str) else json.dumps(content))
        options = dict(dict(classes=('a', 'b'), images=str(tmp_path / 'img')), **options)
        findings, samples, _ = CocoCheck(str(file), **options).run()
        lines = {}
        for finding in findings:
            if finding.kind in ('absent class', 'nothing to learn'):  # those of complete files
                continue
            line = ': '.join(filter(None, (finding.id, finding.text)))
            lines.setdefault(finding.kind, []).append(line)
        return lines, samples

    return run


def test_intact_annotations(check, tmp_path):
    content = coco(
        [(1, 'x.jpg', 96, 64), ('two', 'y.v2.jpg', 96, 64)],
        [
            box(1),
            box(2, 'two', 2),
            box(3, iscrowd=1, segmentation=dict(size=[64, 96], counts=[6144])),
        ],
    )
    lines, samples = check(content, masks=True, label_maps=str(tmp_path / 'maps'))
    assert not lines
    assert samples == [
        Sample(str(tmp_path / 'img/x.jpg'), 1, (96, 64), str(tmp_path / 'maps/x.png')),
        Sample(str(tmp_path / 'img/y.v2.jpg'), 'two', (96, 64), str(tmp_path / 'maps/y.v2.png')),
    ]


FAULTS = {
    'empty box': [
        dict(bbox=(8, 8, 0, 30)),
        dict(bbox=(8, 8, 40, 0.5)),
        dict(bbox=(8, 8, -4, 9), area=36),
        dict(area=0),
    ],
    'box outside': [dict(bbox=(96, 8, 40, 30)), dict(bbox=(-50, 8, 40, 30))],
    'box crosses border': [dict(bbox=(80, 8, 40, 30)), dict(bbox=(-5, 8, 40, 30))],
    'invalid field': [
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
    'invalid mask': [
        dict(segmentation=[]),
        dict(segmentation=None),
        dict(segmentation='text'),
        dict(segmentation=[8, 8, 20, 8, 20, 30]),
        dict(segmentation=[[[8, 8], [20, 8], [20, 30]]]),
        dict(segmentation=[[8, 8, 1e9, 8, 20, 30]]),
        dict(segmentation=[[8, 8, 10**400, 8, 20, 30]]),
        dict(segmentation=[[8, 8, float('nan'), 8, 20, 30]]),
        dict(segmentation=dict(size=[96, 64], counts=[6144])),
        dict(segmentation=dict(counts=[6144])),
    ],
    'short polygon': [
        dict(segmentation=[[8, 8, 20, 8]]),
        dict(segmentation=[[8, 8, 20, 8], [8, 8, 20, 8, 20, 30]]),
        dict(segmentation=[[8, 8, 20, 8, 20, 30, 4]]),
    ],
}


@pytest.mark.parametrize('kind', FAULTS)
def test_annotations_with_a_fault(kind, check):
    faulty = [box(10 + i) | fault for i, fault in enumerate(FAULTS[kind])]
    lines, samples = check(coco(ONE, [box(1), *faulty]), masks=True)
    assert set(lines) == {kind}
    assert len(lines[kind]) == len(faulty)
    for i, line in enumerate(lines[kind]):
        assert f'annotation {10 + i}: ' in line
    assert len(samples) == 1
    if kind in ('invalid mask', 'short polygon'):  # boxes alone need no masks
        assert not check(coco(ONE, [box(1), *faulty]))[0]


def test_whole_numbers_written_by_pandas(check):
    images = [(1.0, 'x.jpg', 96.0, 64.0), (float('nan'), 'y.jpg', 96, 64), (2.5, 'z.jpg', 96, 64)]
    floats = dict(id=1.0, image_id=1.0, category_id=1.0, iscrowd=0.0)
    lines, samples = check(coco(images, [box(1) | floats, box(2, image='1')]))
    assert lines == {
        'invalid field': ['images[1]: no id', 'images[2]: no id'],
        'unknown image': ["annotation 2: no image '1'"],
    }
    assert [sample.id for sample in samples] == [1]


def test_ids_and_fields(check):
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
    lines, samples = check(coco(images, annotations))
    assert lines['duplicate id'] == [
        'image 1: images[1] has the same id',
        'annotation 1: annotations[1] has the same id',
    ]
    assert lines['duplicate file'] == ['2 images are same.jpg']
    assert lines['invalid field'] == [
        'image 2: width is 0',
        "image 3: height is '64'",
        "image 4: file_name is ''",
        'images[5]: no id',
        'annotations[2]: no id',
        'annotations[3]: no id',
    ]
    assert [sample.id for sample in samples] == [1, 6, 7]
    assert samples[0].image.endswith('y.jpg')  # the last one, as in pycocotools


def test_classes(check):
    # mmdet numbers the classes that it finds: b would be called a.
    lines, _ = check(coco(ONE, [box(1)], ['b', 'c']))
    assert lines['missing class'] == ['no category a (it has b, c)']
    lines, _ = check(coco(ONE, [box(1), box(2, category=3)], ['a', 'b', 'c']))
    assert lines == {'unused category': ['category c: 1 annotations']}
    twice = [dict(id=1, name='a'), dict(id=2, name='b'), dict(id=3, name='a')]
    lines, _ = check(coco(ONE, [box(1)], twice))
    assert lines == {'same name': ["2 categories are 'a', and mmdet gives each its own label"]}
    assert not check(coco(ONE, [box(1)], [*twice[:2], *[dict(id=i, name='c') for i in (3, 4)]]))[0]
    same = [dict(id=1, name='a'), dict(id=1, name='b')]
    assert 'duplicate id' in check(coco(ONE, [box(1)], same))[0]


def test_images_without_objects(check):
    images = [(1, 'x.jpg', 96, 64), (2, 'y.jpg', 96, 64), (3, 'z.jpg', 96, 20)]
    content = coco(images, [box(1), box(2, 3, bbox=(1, 1, 9, 9))])
    for options, ids in (
        ({}, [1, 2, 3]),
        (dict(filter_empty=True), [1, 3]),
        (dict(filter_empty=True, min_size=32), [1]),
        (dict(filter_empty=True, min_size=32, training=False), [1, 2, 3]),
    ):
        lines, samples = check(content, **options)
        assert lines == {'no objects': ['image 2: y.jpg']}
        assert [sample.id for sample in samples] == ids
    lines, samples = check(content, filter_empty=True, min_size=99)
    assert lines['no images'] == ['no image is left']
    assert not samples


def test_evaluation_has_other_requirements(check):
    annotation = box(1)
    del annotation['iscrowd']
    assert not check(coco(ONE, [annotation]))[0]
    lines, _ = check(coco(ONE, [annotation]), training=False)
    assert lines == {
        'invalid field': ['image 1, annotation 1: no iscrowd, which evaluation needs'],
    }
    unlabelled = coco(ONE)
    del unlabelled['annotations']
    assert not check(unlabelled, training=False)[0]
    assert check(unlabelled)[0] == {'unreadable annotations': ['no list of annotations']}


@pytest.mark.parametrize(
    ('content', 'text'),
    [
        ('', 'JSONDecodeError'),
        ('{"images": [', 'JSONDecodeError'),
        ('[' * 100_000, 'RecursionError'),
        ('[]', 'is a list'),
        ('{}', 'no list of images'),
        ('{"images": [], "annotations": []}', 'no list of categories'),
    ],
)
def test_unreadable_annotation_files(content, text, check):
    lines, samples = check(content)
    assert text in lines['unreadable annotations'][0]
    assert not samples
    (finding,), *_ = CocoCheck('missing.json', (), '').run()
    assert (finding.kind, finding.text) == ('unreadable annotations', 'no such file')
