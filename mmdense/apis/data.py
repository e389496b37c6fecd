"""The data sets of a config: what is wrong with their files, before training and during it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any

import cv2
from mmcv.transforms import LoadImageFromFile
from mmengine.config import Config, ConfigDict
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS, DefaultScope
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from PIL import EpsImagePlugin

from mmdense.datasets.check import (
    ERROR,
    Finding,
    Reading,
    Sample,
    check_coco,
    check_sample,
)
from mmdense.engine.files import reason_of
from mmdense.errors import UserError

__all__ = ['check_files', 'data_sets', 'list_files', 'name_bad_samples']

# Pillow would start Ghostscript for a label map that is PostScript.
EpsImagePlugin.gs_binary = False
EXTREME = 'extreme shape'  # which transforms may fail at
CHUNK = 64  # samples that go to a worker at once
WAY_OUT = 'tools/check_dataset.py CONFIG finds all that is wrong'


def data_sets(node: Any, where: str) -> Iterator[tuple[str, ConfigDict]]:
    """Yield every data set config below ``node`` that reads files, with its place."""
    if isinstance(node, dict):
        if node.get('ann_file') or node.get('data_prefix'):
            yield where, node
        for key in ('dataset', 'datasets'):
            if key in node:
                yield from data_sets(node[key], f'{where}.{key}')
    elif isinstance(node, list | tuple):
        for i, child in enumerate(node):
            yield from data_sets(child, f'{where}[{i}]')


# Before training


def list_files(
    cfg: Config, loaders: Sequence[str]
) -> tuple[list[Finding], list[tuple[Sample, Reading]]]:
    """Read the annotations of a config's data sets, inside wrappers too.

    Args:
        cfg: The config.
        loaders: Of 'train', 'val' and 'test'; those that the config doesn't have are left out.

    Returns:
        What is wrong with the annotations, and the files to be checked, each once.

    Raises:
        UserError: A data set that is not of files on this machine, or that cannot be built; or
            none at all.
    """
    found, samples, known = {}, {}, []
    for loader in loaders:
        place = f'{loader}_dataloader'
        for where, node in data_sets(cfg.get(place), place):
            if node in known:  # the test set is the validation set in most configs
                continue
            known.append(node)
            with DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
                dataset = _build(node, where)
            reading = _reading(dataset)
            wrong, files = _annotations(dataset, reading)
            found.update(dict.fromkeys(wrong))
            samples.update({sample: (sample, reading) for sample in files})
    if not known:
        raise UserError(f'{cfg.filename} has no data set for {", ".join(loaders)}')
    return list(found), list(samples.values())


def _build(node: Mapping[str, Any], where: str) -> BaseDataset:
    """Build a data set without reading its annotations."""
    paths = [node.get('data_root'), node.get('ann_file'), *(node.get('data_prefix') or {}).values()]
    if node.get('backend_args') or any('://' in str(path) for path in paths):
        raise UserError(f'{where} is not on this machine: copy it here to check it')
    try:
        dataset = DATASETS.build({**node, 'lazy_init': True})
    except Exception as error:  # data sets and transforms each raise their own
        raise UserError(f'{where} cannot be built ({reason_of(error)})') from error
    if not isinstance(dataset, BaseDataset):
        raise UserError(f'{where} is a {type(dataset).__name__}, no data set of mmengine')
    return dataset


def _reading(dataset: BaseDataset) -> Reading:
    """Return how a data set's pipeline reads files."""
    known: dict[str, Any] = {}
    for transform in _transforms(dataset.pipeline):
        if isinstance(transform, LoadImageFromFile):
            known.update(backend=transform.imdecode_backend, color_type=transform.color_type)
        elif getattr(transform, 'with_seg', False):
            known.update(label_backend=transform.imdecode_backend)
    if hasattr(dataset, 'reduce_zero_label'):  # mmseg's
        known.update(
            classes=len(dataset.metainfo.get('classes') or ()) or None,
            ignored=dataset.ignore_index,
            reduce_zero_label=dataset.reduce_zero_label,
            label_map=dataset.label_map or {},
        )
    return Reading(**known)


def _transforms(node: Any) -> Iterator[Any]:
    """Yield a pipeline's transforms, inside others too."""
    yield node
    inner = getattr(node, 'transforms', node if isinstance(node, list | tuple) else ())
    for child in inner if isinstance(inner, list | tuple) else [inner]:
        yield from _transforms(child)


def _reads_coco(dataset: BaseDataset) -> bool:
    return type(dataset).load_data_list.__module__ == 'mmdet.datasets.coco'


def _annotations(dataset: BaseDataset, reading: Reading) -> tuple[list[Finding], list[Sample]]:
    """Return what is wrong with a data set's annotations, and the files that it reads."""
    if _reads_coco(dataset):
        transforms = list(_transforms(dataset.pipeline))
        filters = dataset.filter_cfg or {}
        found, samples = check_coco(
            dataset.ann_file,
            classes=dataset.metainfo['classes'],
            images=dataset.data_prefix['img'],
            label_maps=dataset.data_prefix.get('seg'),
            map_suffix=dataset.seg_map_suffix,
            masks=any(getattr(transform, 'with_mask', False) for transform in transforms),
            panoptic=type(dataset).parse_data_info.__module__ == 'mmdet.datasets.coco_panoptic',
            training=not dataset.test_mode,
            filter_empty=bool(filters.get('filter_empty_gt')),
            min_size=filters.get('min_size', 0),
        )
    else:
        where = str(dataset.ann_file or dataset.data_prefix.get('img_path') or dataset.data_root)
        try:
            listed = dataset.load_data_list()
        except Exception as error:  # each data set raises its own
            return [Finding('annotation file', where, reason_of(error))], []
        found, samples = [], [_sample(info) for info in listed]
        if not samples:
            found.append(Finding('no images', where, 'no image found'))
    if dataset._indices is not None:
        dataset.data_list = samples
        samples = dataset._get_unserialized_subset(dataset._indices)
    return found, samples


def _sample(info: Mapping[str, Any]) -> Sample:
    size = (info['width'], info['height']) if 'width' in info and 'height' in info else None
    return Sample(info['img_path'], info.get('img_id'), size, info.get('seg_map_path'))


def check_files(files: Sequence[tuple[Sample, Reading]], workers: int) -> Iterator[list[Finding]]:
    """Decode images and label maps in several processes; yield what is wrong with each, in order.

    Raises:
        UserError: A process was killed, by the system or by a file.
    """
    threads = cv2.getNumThreads()
    cv2.setNumThreads(0)  # before the fork, which takes OpenCV's threads for alive
    try:
        with ProcessPoolExecutor(workers) as pool:
            yield from pool.map(check_sample, *zip(*files, strict=True), chunksize=CHUNK)
    except BrokenProcessPool as error:
        raise UserError(
            'a process that decodes images was killed, for want of memory in most cases: take '
            'fewer with --workers'
        ) from error
    finally:
        cv2.setNumThreads(threads)


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
            if _reads_coco(dataset) and len(dataset.cat_ids) != len(dataset.metainfo['classes']):
                _blame_annotations(dataloader)
            dataset.prepare_data = partial(_prepare, dataset, _reading(dataset))
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
    for where, node in data_sets(dataloader, 'dataloader'):
        try:
            dataset = _build(node, where)
        except UserError:  # then it isn't the annotations
            continue
        _blame(_annotations(dataset, _reading(dataset))[0], error)


def _blame(found: Sequence[Finding], error: Exception | None = None) -> None:
    for finding in found:
        if finding.severity == ERROR or (error and finding.kind == EXTREME):
            raise UserError(f'{finding}: {finding.mend} ({WAY_OUT})') from error


def _prepare(dataset: BaseDataset, reading: Reading, index: int) -> Any:
    """Do what the data set's ``prepare_data`` does."""
    info = dataset.get_data_info(index)
    sample = _sample(info)
    try:
        data = dataset.pipeline(info)
    except UserError:
        raise
    except Exception as error:  # each transform raises its own
        _blame(check_sample(sample, reading), error)
        raise RuntimeError(f'{sample.image}: cannot be prepared ({reason_of(error)})') from error
    packed = data.get('data_samples') if isinstance(data, dict) else None
    if reading.classes and isinstance(packed, BaseDataElement) and 'gt_sem_seg' in packed:
        _check_labels(packed, sample, reading)
    return data


def _check_labels(packed: BaseDataElement, sample: Sample, reading: Reading) -> None:
    """Refuse labels that are no class, and a map that is laid over another image's pixels."""
    labels = packed.gt_sem_seg.data
    unknown = ((labels < 0) | (labels >= reading.classes)) & (labels != reading.ignored)
    # Resized with the image, or not.
    shapes = [tuple(packed.get(key, ()))[:2] for key in ('img_shape', 'ori_shape')]
    if unknown.any() or tuple(labels.shape[-2:]) not in shapes:
        _blame(check_sample(sample, reading))
    if unknown.any():
        raise UserError(
            f'{sample.label_map}: the pipeline makes labels of it that are none of the '
            f'{reading.classes} classes'
        )
