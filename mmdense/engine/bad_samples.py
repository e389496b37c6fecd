"""Runners that name the image or annotation file that stops them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import mmengine.runner
from mmengine.dataset import BaseDataset, Compose
from mmengine.structures import BaseDataElement
from torch.utils.data import DataLoader

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

__all__ = ['FlexibleRunner', 'Runner']

EXTREME = 'extreme shape'  # an error only if a transform fails
HINT = 'tools/check_dataset.py CONFIG finds all that is wrong'


class NamedPipeline(Compose):
    """A data set's pipeline that names the sample it fails on, in worker processes too.

    When a transform fails, :mod:`mmdense.datasets.check` looks at the sample: its first error is
    raised in one line, a UserError. If it finds none, the transform's error is raised with the
    image's name. A label outside the classes is an error here, because on the device it would have
    no name.
    """

    def __init__(self, pipeline: Compose, options: ReadOptions) -> None:
        super().__init__(None)
        self.transforms = pipeline.transforms
        self.options = options

    def __call__(self, info: dict) -> dict | None:
        """Run the transforms on a sample, as the data set lists it."""
        if 'img_path' not in info:  # not one image
            return super().__call__(info)
        sample = to_sample(info)
        try:
            data = super().__call__(info)
        except UserError:
            raise
        except Exception as error:  # each transform raises its own
            _raise_first(check_sample(sample, self.options), error)
            raise RuntimeError(f'{sample.image}: a transform failed ({one_line(error)})') from error
        packed = data.get('data_samples') if isinstance(data, dict) else None
        if self.options.classes and isinstance(packed, BaseDataElement) and 'gt_sem_seg' in packed:
            self._check_labels(packed, sample)
        return data

    def _check_labels(self, packed: BaseDataElement, sample: Sample) -> None:
        """Refuse labels outside the classes, and a label map of another size than its image."""
        labels = packed.gt_sem_seg.data
        classes = self.options.classes
        unknown = ((labels < 0) | (labels >= classes)) & (labels != self.options.ignored)
        # Resized with the image, or not.
        shapes = [tuple(packed.get(key, ()))[:2] for key in ('img_shape', 'ori_shape')]
        if unknown.any() or tuple(labels.shape[-2:]) not in shapes:
            _raise_first(check_sample(sample, self.options))
        if unknown.any():
            raise UserError(
                f'{sample.label_map}: after the pipeline it has labels outside the {classes} '
                'classes'
            )


class _NamingRunner:
    @staticmethod
    def build_dataloader(dataloader: DataLoader | dict, *args: Any, **kwargs: Any) -> DataLoader:
        """Build a data loader; annotation files and samples at fault raise UserError."""
        try:
            loader = mmengine.runner.Runner.build_dataloader(dataloader, *args, **kwargs)
        except Exception as error:  # pycocotools, mmdet and numpy each raise their own
            _check_annotations(dataloader, error)
            raise
        for dataset in _leaves(loader.dataset):
            classes = dataset.metainfo.get('classes')
            if is_coco_dataset(dataset) and len(dataset.cat_ids) != len(classes):
                _check_annotations(dataloader)
            if type(dataset.pipeline) is Compose:
                dataset.pipeline = NamedPipeline(dataset.pipeline, read_options_of(dataset))
        return loader


class Runner(_NamingRunner, mmengine.runner.Runner):
    """mmengine's runner; an error while reading data names the file."""


class FlexibleRunner(_NamingRunner, mmengine.runner.FlexibleRunner):
    """mmengine's runner with strategies; an error while reading data names the file."""


def _leaves(dataset: Any) -> Iterator[BaseDataset]:
    """Yield the data sets inside wrappers."""
    if isinstance(dataset, BaseDataset):
        yield dataset
    for name in ('dataset', '_dataset', 'datasets'):
        inner = getattr(dataset, name, ())
        for child in inner if isinstance(inner, list | tuple) else [inner]:
            yield from _leaves(child)


def _check_annotations(dataloader: Any, error: Exception | None = None) -> None:
    for where, node in iter_dataset_configs(dataloader, 'dataloader'):
        try:
            dataset = build_dataset(node, where)
        except UserError:  # not because of its annotations
            continue
        _raise_first(check_annotations(dataset)[0], error)


def _raise_first(findings: Sequence[Finding], error: Exception | None = None) -> None:
    for finding in findings:
        if finding.severity == ERROR or (error and finding.kind == EXTREME):
            raise UserError(f'{finding}: {finding.fix} ({HINT})') from error
