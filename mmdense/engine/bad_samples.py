"""Naming the image or annotation file that stopped a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

from mmengine.dataset import BaseDataset
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement

from mmdense.datasets.check import ERROR, Finding, ReadOptions, Sample, check_sample
from mmdense.datasets.files import (
    build_dataset,
    check_annotations,
    is_coco_dataset,
    iter_dataset_configs,
    read_options_of,
    to_sample,
)
from mmdense.errors import UserError, one_line

__all__ = ['name_bad_samples']

EXTREME = 'extreme shape'  # which transforms may fail at
WAY_OUT = 'tools/check_dataset.py CONFIG finds all that is wrong'


# During training


def name_bad_samples(runner: Runner) -> None:
    """Make a runner say which file is to blame when it cannot build or read a data set.

    An error in a sample's pipeline, in a worker or not, is looked into by the checks of
    :mod:`mmdense.datasets.check`. If they find something wrong, one line says it; otherwise the
    error and its traceback stay, with the sample's name. A label that is no class is an error in
    place of one of the device, which wouldn't name it.
    """
    build = runner.build_dataloader

    def build_named(dataloader: Any, *args: Any, **options: Any) -> Any:
        try:
            loader = build(dataloader, *args, **options)
        except Exception as error:  # pycocotools, mmdet and numpy each raise their own
            _blame_annotations(dataloader, error)
            raise
        for dataset in _leaves(loader.dataset):
            if is_coco_dataset(dataset) and len(dataset.cat_ids) != len(
                dataset.metainfo['classes']
            ):
                _blame_annotations(dataloader)
            dataset.prepare_data = partial(_prepare, dataset, read_options_of(dataset))
        return loader

    runner.build_dataloader = build_named


def _leaves(dataset: Any) -> Iterator[BaseDataset]:
    """Yield the data sets inside of wrappers."""
    if isinstance(dataset, BaseDataset):
        yield dataset
    for name in ('dataset', '_dataset', 'datasets'):
        inner = getattr(dataset, name, ())
        for child in inner if isinstance(inner, list | tuple) else [inner]:
            yield from _leaves(child)


def _blame_annotations(dataloader: Any, error: Exception | None = None) -> None:
    """Raise the first error that a loader's annotations have."""
    for where, node in iter_dataset_configs(dataloader, 'dataloader'):
        try:
            dataset = build_dataset(node, where)
        except UserError:  # then it isn't the annotations
            continue
        _blame(check_annotations(dataset)[0], error)


def _blame(found: Sequence[Finding], error: Exception | None = None) -> None:
    for finding in found:
        if finding.severity == ERROR or (error and finding.kind == EXTREME):
            raise UserError(f'{finding}: {finding.fix} ({WAY_OUT})') from error


def _prepare(dataset: BaseDataset, options: ReadOptions, index: int) -> Any:
    """Do what the data set's ``prepare_data`` does."""
    info = dataset.get_data_info(index)
    sample = to_sample(info)
    try:
        data = dataset.pipeline(info)
    except UserError:
        raise
    except Exception as error:  # each transform raises its own
        _blame(check_sample(sample, options), error)
        raise RuntimeError(f'{sample.image}: cannot be prepared ({one_line(error)})') from error
    packed = data.get('data_samples') if isinstance(data, dict) else None
    if options.classes and isinstance(packed, BaseDataElement) and 'gt_sem_seg' in packed:
        _check_labels(packed, sample, options)
    return data


def _check_labels(packed: BaseDataElement, sample: Sample, options: ReadOptions) -> None:
    """Refuse labels that are no class, and a map that is laid over another image's pixels."""
    labels = packed.gt_sem_seg.data
    unknown = ((labels < 0) | (labels >= options.classes)) & (labels != options.ignored)
    # Resized with the image, or not.
    shapes = [tuple(packed.get(key, ()))[:2] for key in ('img_shape', 'ori_shape')]
    if unknown.any() or tuple(labels.shape[-2:]) not in shapes:
        _blame(check_sample(sample, options))
    if unknown.any():
        raise UserError(
            f'{sample.label_map}: the pipeline makes labels of it that are none of the '
            f'{options.classes} classes'
        )
