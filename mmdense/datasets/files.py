"""The data sets of a config: what is wrong with their files, before training and during it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import cv2
from mmcv.transforms import LoadImageFromFile
from mmengine.config import Config, ConfigDict
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS, DefaultScope

from mmdense.datasets.check import Finding, ReadOptions, Sample, check_coco, check_sample
from mmdense.errors import UserError, one_line

__all__ = ['check_files', 'iter_dataset_configs', 'list_files']

CHUNK = 64  # samples that go to a worker at once


def iter_dataset_configs(node: Any, where: str) -> Iterator[tuple[str, ConfigDict]]:
    """Yield every data set config below ``node`` that reads files, with its place."""
    if isinstance(node, dict):
        if node.get('ann_file') or node.get('data_prefix'):
            yield where, node
        for key in ('dataset', 'datasets'):
            if key in node:
                yield from iter_dataset_configs(node[key], f'{where}.{key}')
    elif isinstance(node, list | tuple):
        for i, child in enumerate(node):
            yield from iter_dataset_configs(child, f'{where}[{i}]')


# Before training


def list_files(
    cfg: Config, loaders: Sequence[str]
) -> tuple[list[Finding], list[tuple[Sample, ReadOptions]]]:
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
        for where, node in iter_dataset_configs(cfg.get(place), place):
            if node in known:  # the test set is the validation set in most configs
                continue
            known.append(node)
            with DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
                dataset = build_dataset(node, where)
            options = read_options_of(dataset)
            wrong, files = check_annotations(dataset, options)
            found.update(dict.fromkeys(wrong))
            samples.update({sample: (sample, options) for sample in files})
    if not known:
        raise UserError(f'{cfg.filename} has no data set for {", ".join(loaders)}')
    return list(found), list(samples.values())


def build_dataset(node: Mapping[str, Any], where: str) -> BaseDataset:
    """Build a data set without options its annotations."""
    paths = [node.get('data_root'), node.get('ann_file'), *(node.get('data_prefix') or {}).values()]
    if node.get('backend_args') or any('://' in str(path) for path in paths):
        raise UserError(f'{where} is not on this machine: copy it here to check it')
    try:
        dataset = DATASETS.build({**node, 'lazy_init': True})
    except Exception as error:  # data sets and transforms each raise their own
        raise UserError(f'{where} cannot be built ({one_line(error)})') from error
    if not isinstance(dataset, BaseDataset):
        raise UserError(f'{where} is a {type(dataset).__name__}, no data set of mmengine')
    return dataset


def read_options_of(dataset: BaseDataset) -> ReadOptions:
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
    return ReadOptions(**known)


def _transforms(node: Any) -> Iterator[Any]:
    """Yield a pipeline's transforms, inside others too."""
    yield node
    inner = getattr(node, 'transforms', node if isinstance(node, list | tuple) else ())
    for child in inner if isinstance(inner, list | tuple) else [inner]:
        yield from _transforms(child)


def is_coco_dataset(dataset: BaseDataset) -> bool:
    return type(dataset).load_data_list.__module__ == 'mmdet.datasets.coco'


def check_annotations(
    dataset: BaseDataset, options: ReadOptions
) -> tuple[list[Finding], list[Sample]]:
    """Return what is wrong with a data set's annotations, and the files that it reads."""
    if is_coco_dataset(dataset):
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
            return [Finding('annotation file', where, one_line(error))], []
        found, samples = [], [to_sample(info) for info in listed]
        if not samples:
            found.append(Finding('no images', where, 'no image found'))
    if dataset._indices is not None:
        dataset.data_list = samples
        samples = dataset._get_unserialized_subset(dataset._indices)
    return found, samples


def to_sample(info: Mapping[str, Any]) -> Sample:
    size = (info['width'], info['height']) if 'width' in info and 'height' in info else None
    return Sample(info['img_path'], info.get('img_id'), size, info.get('seg_map_path'))


def check_files(
    files: Sequence[tuple[Sample, ReadOptions]], workers: int
) -> Iterator[list[Finding]]:
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
