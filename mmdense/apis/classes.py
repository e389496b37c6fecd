"""The names, colours and COCO category ids of the classes that a model predicts."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.registry import DATASETS
from torch import nn

from mmdense.config.evaluators import iter_metrics
from mmdense.errors import first_of, warn
from mmdense.export.metadata import inner_dataset
from mmdense.visualization.draw import make_palette

COCO_IDS = sorted({*range(1, 91)} - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83})


def num_classes_of(model: nn.Module) -> int | None:
    """Return the number of classes of a model's head, if it has one."""
    names = ('decode_head', 'bbox_head', 'head')
    head = next((getattr(model, name) for name in names if getattr(model, name, None)), None)
    if head is None:
        head = getattr(getattr(model, 'roi_head', None), 'bbox_head', None)
    if isinstance(head, nn.ModuleList):  # cascades
        head = head[-1]
    return getattr(head, 'num_classes', None)


def describe_classes(
    model: nn.Module, cfg: Config, meta: Mapping[str, Any]
) -> tuple[list[str], list[tuple[int, ...]], list[dict[str, Any]]]:
    """Return the names, colours and COCO categories of a model's classes, by label.

    ``meta`` is a checkpoint's metadata; see :func:`class_names` and :func:`coco_categories`.
    """
    segments = hasattr(model, 'decode_head')
    scope = cfg.get('default_scope') or ('mmseg' if segments else 'mmdet')
    classes, palette = class_names(inner_dataset(cfg), scope, meta, num_classes_of(model))
    if segments or scope == 'mmpretrain':
        categories = [dict(id=i, name=name) for i, name in enumerate(classes, start=1)]
    else:
        trained = bool(meta.get('dataset_meta') or meta.get('CLASSES'))
        categories = coco_categories(cfg, classes, trained)
    return [category['name'] for category in categories], palette, categories


def class_names(
    dataset: ConfigDict, scope: str, meta: Mapping[str, Any], count: int | None
) -> tuple[tuple[str, ...], list[tuple[int, ...]]]:
    """Return the names and colours of classes from the first source that has as many.

    These are ``meta`` of the checkpoint, the ``metainfo`` of the data set's config, and its type.
    ``count`` is the number of classes, None if unknown.
    """
    with DATASETS.switch_scope_and_registry(scope) as registry:
        kind = registry.get(dataset.type) if isinstance(dataset.type, str) else dataset.type
    # Before mmdet 3 and mmseg 1, checkpoints had the metainfo at the top level, in capitals.
    first = meta.get('dataset_meta') or meta
    sources = [first, dataset.get('metainfo'), getattr(kind, 'METAINFO', None)]
    sources = [{str(k).lower(): v for k, v in dict(s or {}).items()} for s in sources]
    named = [s for s in sources if s.get('classes') and count in (None, len(s['classes']))]
    if named:
        classes = tuple(map(str, named[0]['classes']))
        other = sources[1].get('classes')
        if named[0] is sources[0] and other and classes != tuple(map(str, other)):
            names = f'{first_of(classes)}, not {first_of(other)} as in the config'
            warn(f'the classes are those of the checkpoint: {names}')
    else:
        classes = tuple(f'class {i}' for i in range(count or 0))
        warn(f'neither the checkpoint nor the config names {count} classes')
    for source in named[:1] + sources:  # a palette of another source is better than none
        palette = source.get('palette')
        if isinstance(palette, list | tuple) and len(palette) >= len(classes):
            return classes, [tuple(map(int, colour)) for colour in palette]
    return classes, make_palette(len(classes))


def coco_categories(
    cfg: Config, classes: tuple[str, ...], trained: bool = False
) -> list[dict[str, Any]]:
    """Return a detector's COCO categories, ``dict(id=..., name=...)``, by label.

    They are those of the annotation file of the config's test metric if it has these classes,
    COCO's if the classes are COCO's, and otherwise numbered from 1. If the file has another order,
    there is a warning: ``trained`` classes of a checkpoint keep the order of its labels, those of a
    config are sorted as in the file, by which mmdet numbers labels.
    """
    categories = [
        dict(id=category['id'], name=category['name'])
        for category in _annotated_categories(cfg)
        if category['name'] in classes
    ]
    names = tuple(category['name'] for category in categories)
    if sorted(names) == sorted(classes):
        if names != classes:
            orders = ('checkpoint', 'annotation file') if trained else ('annotation file', 'config')
            warn('the classes are in the order of the {}, not of the {}'.format(*orders))
        if trained:
            categories.sort(key=lambda category: classes.index(category['name']))
        return categories
    from mmdet.datasets import CocoDataset

    is_coco = classes == CocoDataset.METAINFO['classes']
    ids = COCO_IDS if is_coco else range(1, len(classes) + 1)
    return [dict(id=i, name=name) for i, name in zip(ids, classes, strict=True)]


def _annotated_categories(cfg: Config) -> Sequence[Mapping[str, Any]]:
    """Return the categories of the test metric's annotation file, if it can be read."""
    for _, metric in iter_metrics(cfg.get('test_evaluator')):
        file = Path(metric.get('ann_file') or '')
        if file.suffix == '.json' and file.is_file():
            try:
                return json.loads(file.read_bytes())['categories']
            except (OSError, ValueError, LookupError, TypeError):  # damaged, or another format
                break
    return []
