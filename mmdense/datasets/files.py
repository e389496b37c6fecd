"""The files of a config's datasets, and their checks before and during training."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import cv2
from mmcv.transforms import LoadImageFromFile
from mmengine.config import Config, ConfigDict
from mmengine.dataset import BaseDataset
from mmengine.registry import DATASETS, DefaultScope

from mmdense.datasets.check import Finding, ReadOptions, Sample, check_sample
from mmdense.datasets.coco import CocoCheck
from mmdense.errors import UserError, one_line

__all__ = [
    'build_dataset',
    'check_annotations',
    'check_files',
    'is_coco_dataset',
    'iter_dataset_configs',
    'list_files',
    'read_options_of',
    'to_sample',
]

CHUNK = 64  # samples per task of a worker


def iter_dataset_configs(node: Any, where: str) -> Iterator[tuple[str, ConfigDict]]:
    """Yield every dataset config below ``node`` that reads files, with its place in the config."""
    if isinstance(node, dict):
        if node.get('ann_file') or node.get('data_prefix'):
            yield where, node
        for key in ('dataset', 'datasets'):
            if key in node:
                yield from iter_dataset_configs(node[key], f'{where}.{key}')
    elif isinstance(node, list | tuple):
        for i, child in enumerate(node):
            yield from iter_dataset_configs(child, f'{where}[{i}]')


def list_files(
    cfg: Config, loaders: Sequence[str]
) -> tuple[list[Finding], list[tuple[Sample, ReadOptions]]]:
    """Check the annotations of a config's datasets, also inside wrappers, and list their files.

    Returns:
        The findings in the annotations of the ``loaders`` ('train', 'val', 'test') that the config
        has, and the files to check, each once.

    Raises:
        UserError: A dataset is remote or cannot be built, or there is none.
    """
    findings, samples, known = {}, {}, []
    for loader in loaders:
        place = f'{loader}_dataloader'
        for where, node in iter_dataset_configs(cfg.get(place), place):
            if node in known:  # the test set is the validation set in most configs
                continue
            known.append(node)
            with DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
                dataset = build_dataset(node, where)
            options = read_options_of(dataset)
            more, files = check_annotations(dataset)
            findings.update(dict.fromkeys(more))
            samples.update({sample: (sample, options) for sample in files})
    if not known:
        raise UserError(f'{cfg.filename} has no dataset for {", ".join(loaders)}')
    return list(findings), list(samples.values())


def build_dataset(node: Mapping[str, Any], where: str) -> BaseDataset:
    """Build a dataset without reading its annotations; ``where`` is its place in the config.

    Raises:
        UserError: It is remote, cannot be built, or is not a dataset of mmengine.
    """
    paths = [node.get('data_root'), node.get('ann_file'), *(node.get('data_prefix') or {}).values()]
    if node.get('backend_args') or any('://' in str(path) for path in paths):
        raise UserError(f'{where} is not on this machine: copy it here to check it')
    try:
        dataset = DATASETS.build({**node, 'lazy_init': True})
    except Exception as error:  # datasets and transforms each raise their own
        raise UserError(f'{where} cannot be built ({one_line(error)})') from error
    if not isinstance(dataset, BaseDataset):
        raise UserError(f'{where} is a {type(dataset).__name__}, not a dataset of mmengine')
    return dataset


def read_options_of(dataset: BaseDataset) -> ReadOptions:
    """Return how a dataset's pipeline reads files."""
    options: dict[str, Any] = {}
    for transform in _transforms(dataset.pipeline):
        if isinstance(transform, LoadImageFromFile):
            options.update(backend=transform.imdecode_backend, color_type=transform.color_type)
        elif getattr(transform, 'with_seg', False):
            options.update(label_backend=transform.imdecode_backend)
    if hasattr(dataset, 'reduce_zero_label'):  # mmseg's
        options.update(
            classes=len(dataset.metainfo.get('classes') or ()) or None,
            ignored=dataset.ignore_index,
            reduce_zero_label=dataset.reduce_zero_label,
            label_map=dataset.label_map or {},
        )
    return ReadOptions(**options)


def _transforms(node: Any) -> Iterator[Any]:
    """Yield the transforms of a pipeline, also those inside other transforms."""
    yield node
    inner = getattr(node, 'transforms', node if isinstance(node, list | tuple) else ())
    for child in inner if isinstance(inner, list | tuple) else [inner]:
        yield from _transforms(child)


def is_coco_dataset(dataset: BaseDataset) -> bool:
    """Return whether a dataset reads instances from a COCO file by mmdet's own methods."""
    methods = type(dataset).load_data_list, type(dataset).parse_data_info
    return all(method.__module__ == 'mmdet.datasets.coco' for method in methods)


def check_annotations(dataset: BaseDataset) -> tuple[list[Finding], list[Sample]]:
    """Return the findings in a dataset's annotations, and the files that it reads."""
    if is_coco_dataset(dataset):
        filters = dataset.filter_cfg or {}
        transforms = _transforms(dataset.pipeline)
        findings, samples = CocoCheck(
            dataset.ann_file,
            classes=dataset.metainfo['classes'],
            images=dataset.data_prefix['img'],
            label_maps=dataset.data_prefix.get('seg'),
            map_suffix=dataset.seg_map_suffix,
            masks=any(getattr(transform, 'with_mask', False) for transform in transforms),
            training=not dataset.test_mode,
            filter_empty=bool(filters.get('filter_empty_gt')),
            min_size=filters.get('min_size', 0),
        ).run()
    else:
        place = str(dataset.ann_file or dataset.data_prefix.get('img_path') or dataset.data_root)
        try:
            infos = dataset.load_data_list()
        except Exception as error:  # each dataset raises its own
            return [Finding('unreadable annotations', place, one_line(error))], []
        findings, samples = [], [to_sample(info) for info in infos]
        if not samples:
            findings.append(Finding('no images', place, 'no image found'))
    return findings, samples


def to_sample(info: Mapping[str, Any]) -> Sample:
    """Return the files of a dataset's ``get_data_info()``."""
    size = (info['width'], info['height']) if 'width' in info and 'height' in info else None
    return Sample(info['img_path'], info.get('img_id'), size, info.get('seg_map_path'))


def check_files(
    files: Sequence[tuple[Sample, ReadOptions]], workers: int
) -> Iterator[list[Finding]]:
    """Decode images and label maps in several processes; yield each one's findings, in order.

    Raises:
        UserError: A process was killed, usually because memory ran out.
    """
    threads = cv2.getNumThreads()
    cv2.setNumThreads(0)  # a forked process hangs on OpenCV's threads, which do not exist there
    try:
        # On Ctrl-C this process ends the others.
        ignore = dict(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
        with ProcessPoolExecutor(workers, **ignore) as pool:
            yield from pool.map(check_sample, *zip(*files, strict=True), chunksize=CHUNK)
    except BrokenProcessPool as error:
        raise UserError(
            'a process that decodes images was killed, usually because memory ran out: reduce '
            '--workers'
        ) from error
    finally:
        cv2.setNumThreads(threads)
