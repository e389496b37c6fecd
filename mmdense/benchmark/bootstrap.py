"""Is one backbone better than another? A paired bootstrap over the images of the validation.

Predictions become matches: which detections hit an object, at each IoU. They give AP on resampled
images, the same ones for every training, and the interval of the difference of two backbones.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from io import StringIO
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope

from mmdense.config.evaluators import iter_metrics

RESAMPLES, CHUNK = 1000, 16  # images are drawn so often, and so many draws evaluated at a time
INTERVAL = (2.5, 97.5)  # percentiles
KINDS = dict(bbox='box AP', segm='mask AP')  # in names of files, and of metrics
RECALLS = np.linspace(0, 1, 101)
MATCHES = 'matches.npz'  # in a work dir


def keep_predictions(cfg: Config) -> Iterator[dict[str, Any]]:
    """Make COCO metrics write their predictions to the work dir, and yield those metrics."""
    for _, metric in iter_metrics([cfg.get('val_evaluator'), cfg.get('test_evaluator')]):
        if metric.get('type') in ('CocoMetric', 'mmdet.CocoMetric') and metric.get('ann_file'):
            metric['outfile_prefix'] = f'{cfg.work_dir}/predictions'
            yield metric


def keep_matches(cfg: Config) -> None:
    """Replace the predictions in a work dir by matches, and AP on resampled images."""
    arrays = {}
    for metric in keep_predictions(cfg):
        for kind, title in KINDS.items():
            predictions = Path(f'{metric["outfile_prefix"]}.{kind}.json')
            if predictions.exists() and (content := json.loads(predictions.read_bytes())):
                with DefaultScope.overwrite_default_scope(cfg.default_scope):
                    classes = DATASETS.build(cfg.val_dataloader.dataset).metainfo['classes']
                matches = read_matches(metric['ann_file'], content, kind, classes)
                matches['ap'] = resampled_ap(matches)
                arrays |= {f'{title}/{key}': array for key, array in matches.items()}
            predictions.unlink(missing_ok=True)
    if arrays:
        np.savez_compressed(Path(cfg.work_dir, MATCHES), **arrays)


def read_matches(
    annotations: str, predictions: Sequence[dict], kind: str, classes: Sequence[str]
) -> dict[str, np.ndarray]:
    """Return how COCO's evaluation matches predictions with objects.

    Of D detections, by class and falling score, these are ``image`` [D], ``label`` [D], and ``hit``
    and ``ignored`` [D, T] at T IoU thresholds; of the objects ``object_image`` and
    ``object_label`` [G]; and ``images`` [N], their ids. ``kind`` is 'bbox' or 'segm'.
    """
    from mmdet.datasets.api_wrappers import COCO, COCOeval

    with contextlib.redirect_stdout(StringIO()):
        coco = COCO(annotations)
        run = COCOeval(coco, coco.loadRes(list(predictions)), kind)
        params = run.params
        params.catIds = coco.get_cat_ids(cat_names=classes)
        params.areaRng, params.maxDets = params.areaRng[:1], params.maxDets[-1:]
        run.evaluate()
    pairs = enumerate(run.evalImgs)
    pairs = [(divmod(i, len(params.imgIds)), entry) for i, entry in pairs if entry]
    places, entries = zip(*pairs, strict=True)  # (label, image)
    counted = [(entry['gtIgnore'] == 0).sum() for entry in entries]
    detected = [len(entry['dtScores']) for entry in entries]
    label, image = np.repeat(places, detected, 0).T
    ignored = np.concatenate([entry['dtIgnore'] for entry in entries], 1).T.astype(bool)
    hit = np.concatenate([entry['dtMatches'] for entry in entries], 1).T > 0
    scores = np.concatenate([entry['dtScores'] for entry in entries])
    order = np.lexsort((-scores, label))  # of equal scores the first image, as in COCO's evaluation
    arrays = dict(image=image, label=label, hit=hit & ~ignored, ignored=ignored)
    label, image = np.repeat(places, counted, 0).T
    objects = dict(object_image=image, object_label=label, images=np.array(params.imgIds))
    return {key: array[order] for key, array in arrays.items()} | objects


def resampled_ap(matches: Mapping[str, np.ndarray], resamples: int = RESAMPLES) -> np.ndarray:
    """Return AP on the images, and on each of so many resamples of them, the same in each call."""
    count = len(matches['images'])
    draws = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), resamples)
    weights = np.concatenate((np.ones((1, count), int), draws)).T.astype(np.int32)
    parts = np.split(weights, range(CHUNK, resamples + 1, CHUNK), 1)
    return np.concatenate([average_precision(matches, np.ascontiguousarray(w)) for w in parts])


def average_precision(matches: Mapping[str, np.ndarray], weights: np.ndarray) -> np.ndarray:
    """Return COCO's AP [B], where image i of N counts ``weights[i, b]`` times; NaN of no objects.

    Precision is computed at the hits alone: between them it falls.
    """
    total, classes = np.zeros((2, weights.shape[1]))
    for label in np.unique(matches['object_label']):
        objects = weights[matches['object_image'][matches['object_label'] == label]].sum(0)
        classes += objects > 0
        rows = slice(*np.searchsorted(matches['label'], (label, label + 1)))
        counts = weights[matches['image'][rows]]
        seen = np.cumsum(counts, 0, counts.dtype)
        for hit, ignored in zip(matches['hit'][rows].T, matches['ignored'][rows].T, strict=True):
            at, skipped = np.flatnonzero(hit), np.flatnonzero(ignored)
            if not len(at):
                continue
            found, taken = np.cumsum(counts[at], 0, counts.dtype), seen[at]
            if len(skipped):
                before = np.cumsum(counts[skipped], 0, counts.dtype)
                before = np.concatenate((np.zeros_like(before[:1]), before))
                taken = taken - before[np.searchsorted(skipped, at)]
            precision = found / (taken + np.spacing(1))
            precision = np.maximum.accumulate(precision[::-1], 0)[::-1]
            # Each hit stands for the recall levels that it reaches first.
            levels = np.searchsorted(RECALLS, found / np.maximum(objects, 1), 'right')
            reached = np.diff(levels, axis=0, prepend=0)
            total += (precision * reached).sum(0) / len(RECALLS) / matches['hit'].shape[1]
    with np.errstate(invalid='ignore'):
        return total / classes


def compare_rows(
    folder: Path, rows: Sequence[Mapping[str, Any] | None], metric: str, ranked: Sequence[int]
) -> dict[tuple[int, int], tuple[float, float, float]]:
    """Return the difference of each row in rank order to those behind it, in a metric of KINDS.

    By the numbers of the two rows, it is the difference and the ends of its interval.

    Rows take part if all their seeds have matches, with the same images. A resample also draws a
    row's seeds, one less than there are, so that their mean varies as it does (Rao and Wu 1988).
    """
    means, images = {}, {}
    for i in ranked:
        seeds = (rows[i] or {}).get('seeds', ())
        files = [folder / (seed.get('matches') or '') for seed in seeds]
        arrays = [np.load(file) for file in files if file.is_file()]
        values = [array[f'{metric}/ap'] for array in arrays if f'{metric}/ap' in array]
        if not values or len(values) < len(files):
            continue
        values, images[i] = np.stack(values), arrays[0][f'{metric}/images'].tobytes()
        shape = max(len(values) - 1, 1), values.shape[1]
        draws = np.random.default_rng((1, i)).integers(len(values), size=shape)
        means[i] = np.take_along_axis(values, draws, 0).mean(0)
        means[i][0] = values[:, 0].mean()
    differences = {(i, j): means[i] - means[j] for i, j in combinations(means, 2)}
    return {
        (i, j): (d[0], *np.nanpercentile(d[1:], INTERVAL))
        for (i, j), d in differences.items()
        if images[i] == images[j]
    }
