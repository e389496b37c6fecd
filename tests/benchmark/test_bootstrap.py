"""AP from matches against COCO's evaluation on images that count any number of times."""

import copy
import json

import numpy as np
import pytest
from pycocotools import mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mmdense.benchmark.bootstrap import average_precision, read_matches

CLASSES = ('cat', 'dog', 'never', 'unlabelled')
SIZE = dict(height=60, width=80)


def as_object(box, **keys):
    x, y, w, h = map(float, box)
    polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
    rle = mask.frPyObjects([polygon], SIZE['height'], SIZE['width'])[0]
    rle['counts'] = rle['counts'].decode()
    return dict(bbox=[x, y, w, h], segmentation=rle, area=w * h, **keys)


def make_data(images=12):
    """Return annotations and predictions with crowds, equal scores and images without objects."""
    rng = np.random.default_rng(0)
    truth, predictions = [], []
    for image in range(3, images):
        boxes = np.c_[rng.integers(1, 30, (5, 2)), rng.integers(8, 30, (5, 2))]
        labels = rng.integers(1, 3, 5)
        scores = iter(rng.permutation(16) / 16)  # equal in different images
        for box, label in zip(boxes, labels, strict=True):
            common = dict(image_id=image, category_id=int(label))
            crowd = int(rng.random() < 0.2)
            truth.append(as_object(box, id=len(truth) + 1, iscrowd=crowd, **common))
            for shift in rng.integers(0, 6, 2):
                moved = as_object(box + [shift, 0, 0, 0], score=float(next(scores)), **common)
                predictions.append(moved)
    predictions.append(as_object((1, 1, 9, 9), image_id=0, category_id=4, score=1.0))
    content = dict(
        images=[dict(id=i, file_name=f'{i}.jpg', **SIZE) for i in range(images)],
        annotations=truth,
        categories=[dict(id=i + 1, name=name) for i, name in enumerate(CLASSES)],
    )
    return content, predictions


def repeat(entries, key, counts):
    """Return the entries of image i ``counts[i]`` times, as those of further images."""
    ids = np.cumsum([0, *counts])
    return [
        {**entry, key: int(ids[entry[key]] + n)}
        for entry in copy.deepcopy(entries)
        for n in range(counts[entry[key]])
    ]


@pytest.mark.parametrize('kind', ['bbox', 'segm'])
def test_ap_is_cocos(tmp_path, kind):
    content, predictions = make_data()
    (tmp_path / 'a.json').write_text(json.dumps(content))
    matches = read_matches(str(tmp_path / 'a.json'), predictions, kind, CLASSES)
    assert matches['ignored'].any()
    rng = np.random.default_rng(1)
    weights = np.stack([np.ones(12, int), *rng.integers(0, 4, (5, 12))], 1)
    expected = []
    for counts in weights.T:
        coco, found = COCO(), COCO()
        coco.dataset = dict(content, images=repeat(content['images'], 'id', counts))
        coco.dataset['annotations'] = repeat(content['annotations'], 'image_id', counts)
        found.dataset = dict(coco.dataset, annotations=repeat(predictions, 'image_id', counts))
        for data in (coco, found):
            for number, annotation in enumerate(data.dataset['annotations'], 1):
                annotation['id'] = number
            data.createIndex()
        run = COCOeval(coco, found, kind)
        run.evaluate()
        run.accumulate()
        run.summarize()
        expected.append(run.stats[0])
    assert average_precision(matches, weights) == pytest.approx(expected, abs=1e-12)
    assert np.isnan(average_precision(matches, np.zeros((12, 1), int)))
