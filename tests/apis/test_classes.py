"""Names, colours and COCO ids of classes, from checkpoints, configs and annotation files."""

import json

import pytest
from mmengine.config import ConfigDict

from mmdense.apis.classes import class_names, coco_categories
from mmdense.models import RDNet  # noqa: F401  (registers the scopes)

DIGITS = tuple('0123456789')
LETTERS = tuple('abcdefghij')
COLOURS = [(i, i, i) for i in range(10)]
DIGIT_COLOURS = [(0, i, 0) for i in range(10)]


@pytest.mark.parametrize(
    ('meta', 'expected'),
    [
        (dict(dataset_meta=dict(classes=LETTERS, palette=COLOURS)), (LETTERS, COLOURS)),
        (dict(dataset_meta=dict(CLASSES=LETTERS)), (LETTERS, DIGIT_COLOURS)),
        (dict(CLASSES=LETTERS, PALETTE=COLOURS, epoch=3), (LETTERS, COLOURS)),
        (dict(dataset_meta=dict(classes=LETTERS, palette='random')), (LETTERS, DIGIT_COLOURS)),
        ({}, (DIGITS, DIGIT_COLOURS)),
        (dict(dataset_meta=dict(classes=('cat', 'dog'))), (DIGITS, DIGIT_COLOURS)),
    ],
)
def test_names_of_the_checkpoint_come_first(meta, expected, log):
    metainfo = dict(classes=DIGITS, palette=DIGIT_COLOURS)
    dataset = ConfigDict(type='CocoDataset', metainfo=metainfo)
    assert class_names(dataset, 'mmdet', meta, 10) == expected
    letters = 'a, b, c, d, e and 5 more, not 0, 1, 2, 3, 4 and 5 more as in the config'
    assert log == [f'the classes are those of the checkpoint: {letters}'] * (expected[0] == LETTERS)


def test_names_of_the_data_set_or_numbers(log):
    dataset = ConfigDict(type='mmdet.VOCDataset')
    assert class_names(dataset, 'mmdet', {}, 20)[0][:2] == ('aeroplane', 'bicycle')
    assert not log
    names, palette = class_names(dataset, 'mmdet', {}, 10)
    assert names == tuple(f'class {i}' for i in range(10))
    assert len(palette) >= 10
    assert log == ['neither the checkpoint nor the config names 10 classes']


def test_category_ids_of_the_annotation_file(tmp_path, log):
    def categories(names=DIGITS):
        values = coco_categories(ConfigDict(test_evaluator=dict(ann_file=str(file))), names)
        return [c['id'] for c in values], tuple(c['name'] for c in values)

    file = tmp_path / 'truth.json'
    known = [dict(id=3 * i + 2, name=name) for i, name in enumerate(('sky', *DIGITS))]
    ids = [3 * i + 2 for i in range(1, 11)]
    file.write_text(json.dumps(dict(categories=known)))
    assert categories() == (ids, DIGITS)
    assert not log
    file.write_text(json.dumps(dict(categories=known[::-1])))
    assert categories() == (ids[::-1], DIGITS[::-1])  # the order of mmdet's labels
    assert log == ['the classes are in the order of the annotation file, not of the config']
    trained = coco_categories(ConfigDict(test_evaluator=dict(ann_file=str(file))), DIGITS, True)
    assert trained == [dict(id=i, name=name) for i, name in zip(ids, DIGITS, strict=True)]
    assert log[1:] == ['the classes are in the order of the checkpoint, not of the annotation file']
    # Of another data set, damaged, or missing.
    for content in (json.dumps(dict(categories=known[:-1])), '[{'):
        file.write_text(content)
        assert categories() == ([*range(1, 11)], DIGITS)
    file.unlink()
    assert categories() == ([*range(1, 11)], DIGITS)


def test_category_ids_of_coco():
    from mmdet.datasets import CocoDataset

    categories = coco_categories(ConfigDict(), CocoDataset.METAINFO['classes'])
    names = {category['id']: category['name'] for category in categories}
    assert (names[1], names[13], names[90]) == ('person', 'stop sign', 'toothbrush')
    assert len(names) == 80
