"""The files of a config's datasets, and their checks before and during training."""

import math
import os
import signal
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from dataclasses import replace
from itertools import groupby
from os.path import isfile
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from mmcv.transforms import LoadImageFromFile
from mmengine.config import Config, ConfigDict
from mmengine.dataset import BaseDataset
from mmengine.fileio import list_dir_or_file
from mmengine.registry import DATASETS, DefaultScope
from PIL import Image

from mmdense.datasets.check import ERROR, Finding, ReadOptions, Sample, check_sample
from mmdense.datasets.coco import CocoCheck
from mmdense.datasets.content import (
    check_agreement,
    check_labels,
    check_objects,
    check_pixels,
    class_pixels,
    compare_labels,
    count_suffixes,
)
from mmdense.errors import UserError, explain, one_line, warn

CHUNK = 64  # samples per task of a worker
FEW, MANY = 16, 500  # samples of a data set that are read before training
SMALL = 5000  # images that are compared by content before training
HINT = 'tools/check_dataset.py CONFIG finds all that is wrong'


def iter_dataset_configs(node: Any, where: str) -> Iterator[tuple[str, ConfigDict]]:
    """Yield every dataset config below ``node`` that reads files, with its place in the config."""
    if isinstance(node, dict):
        if any(node.get(key) for key in ('ann_file', 'data_prefix', 'split')):
            yield where, node
        for key in ('dataset', 'datasets'):
            if key in node:
                yield from iter_dataset_configs(node[key], f'{where}.{key}')
    elif isinstance(node, list | tuple):
        for i, child in enumerate(node):
            yield from iter_dataset_configs(child, f'{where}[{i}]')


def list_files(
    cfg: Config, loaders: Sequence[str], most: float = math.inf
) -> tuple[list[Finding], list[tuple[Sample, ReadOptions]]]:
    """Return the findings in the annotations of a config's datasets, and their files, each once.

    Datasets inside wrappers count too, and loaders that the config hasn't are left out. Up to
    ``most`` images are compared by content, to find those in several loaders. UserError if a
    dataset is remote or cannot be built, or there is none.
    """
    findings, files, datasets, known = [], {}, [], []
    for loader in loaders:
        place = f'{loader}_dataloader'
        for where, node in iter_dataset_configs(cfg.get(place), place):
            if node in known:  # the test set is the validation set in most configs
                continue
            known.append(node)
            with DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
                dataset = build_dataset(node, where)
                more, samples, names = check_annotations(dataset)
            if loader == 'test':  # which may have no annotations
                more = [f for f in more if f.kind != 'nothing to learn']
            findings += more
            options = replace(read_options_of(dataset), where=where, names=names)
            datasets.append((options, dataset, [sample.image for sample in samples]))
            for part in _transforms(dataset.pipeline):
                value = getattr(part, 'reduce_zero_label', None)
                if value not in (None, options.reduce_zero_label):  # an assertion of mmseg
                    text = f'reduce_zero_label is {not value}, but {value} in the pipeline'
                    findings.append(Finding('other labels', where, text))
            transforms = {type(part) for part in _transforms(dataset.pipeline)}
            if not all(kind.__module__.startswith(('builtins', 'mm')) for kind in transforms):
                options = replace(options, classes=None)  # it may change labels
            kinds = {kind.__name__ for kind in transforms}
            if LoadImageFromFile in transforms or kinds <= {'Compose', 'list', 'LoadAnnotations'}:
                findings += check_existence(dataset, samples)
                for sample in samples:
                    files.setdefault(sample, (sample, options))
    if not known:
        raise UserError(f'{cfg.filename} has no dataset for {", ".join(loaders)}')
    findings += check_agreement(datasets, content=len(files) <= most)
    return list(dict.fromkeys(findings)), list(files.values())


def check_data(cfg: Config, loaders: Sequence[str]) -> None:
    """Check what can be seen quickly, before anything is built, and log warnings by kind.

    Annotations and names of files are read completely, of images and label maps a few. The first
    error is a UserError.
    """
    findings, files = _list_known(cfg, loaders, SMALL)
    raise_first(findings)
    for _, group in groupby(files, lambda file: file[1].where):
        findings += _check_some(*zip(*group, strict=True))
    raise_first(findings)
    kinds = defaultdict(list)
    for finding in findings:
        kinds[finding.kind].append(finding)
    for first, *more in kinds.values():
        text = f' ({len(more)} more: {HINT})' if more else ''
        warn(f'{first}: {first.fix}{text}')


def _list_known(cfg: Config, loaders: Sequence[str], most: int) -> tuple[list, list]:
    try:
        return list_files(cfg, loaders, most)
    except UserError:  # remote, or the runner explains the error when it builds the data set
        return [], []


def _check_some(samples: Sequence[Sample], options: Sequence[ReadOptions]) -> list[Finding]:
    """Check samples from all over a data set: the first few, and more until two classes occur."""
    findings, counts, step = [], np.zeros(256, int), -(-len(samples) // FEW)
    order = [sample for start in range(step) for sample in samples[start::step]]
    for number, sample in enumerate(order):
        seen = np.count_nonzero(class_pixels(counts, options[0]))
        labelled = options[0].classes and sample.label_map
        if number >= (MANY if labelled and seen < 2 else FEW):
            return findings + check_pixels(counts, options[0], complete=False)
        findings += check_sample(sample, options[0], counts)
    return findings + check_pixels(counts, options[0])


def raise_first(findings: Iterable[Finding], error: Exception | None = None) -> None:
    """Raise the first error as a UserError; if a transform failed, also an extreme shape."""
    for finding in findings:
        if finding.severity == ERROR or (error and finding.kind == 'extreme shape'):
            raise UserError(f'{finding}: {finding.fix} ({HINT})') from error


def check_trained_labels(cfg: Config, meta: Mapping[str, Any]) -> None:
    """Compare the labels of the test data with those of a checkpoint's metadata.

    UserError if a class has another label: the metrics would be those of exchanged classes.
    """
    trained = (meta.get('dataset_meta') or {}).get('classes') or ()
    _, files = _list_known(cfg, ('test',), 0)
    for options in {options.where: options for _, options in files}.values():
        if trained and options.names:
            findings = compare_labels(options.names, trained, 'the checkpoint', options.where)
            if {*options.names} & {*trained}:
                raise_first(findings)
            for finding in findings:
                warn(f'{finding}: names differ')


def check_existence(dataset: BaseDataset, samples: Sequence[Sample]) -> Iterator[Finding]:
    """Report files that are missing or left out, with the suffixes of those that are there."""
    stems = {Path(sample.image).stem for sample in samples}
    for key, setting in (('image', 'img_suffix'), ('label_map', 'seg_map_suffix')):
        files = [file for sample in samples if (file := getattr(sample, key))]
        folders = {*map(os.path.dirname, files)}  # listing is faster than asking for each file
        names = {f: {*os.listdir(f)} if os.path.isdir(f) else set() for f in folders}
        paths = ((file, *os.path.split(file)) for file in files)
        missing = [f for f, folder, name in paths if name not in names[folder] and not isfile(f)]
        if missing:
            folder, name = os.path.split(missing[0])
            text = f'{len(missing)} of {len(files)} files are missing, such as {name}; the folder '
            text += f'has {count_suffixes(names[folder], stems)}'
            if hasattr(dataset, setting):
                text += f', and {setting} is {getattr(dataset, setting)!r}'
            yield Finding('missing files', folder, text)
    folder = hasattr(dataset, 'img_suffix') and dataset.data_prefix.get('img_path')
    if folder and os.path.isdir(dataset.ann_file or folder):
        known = {os.path.normpath(file) for s in samples for file in (s.image, s.label_map or '')}
        files = list_dir_or_file(folder, list_dir=False, recursive=True)
        files = [f for f in files if Path(f).suffix.lower() in Image.registered_extensions()]
        if left := [f for f in files if os.path.normpath(os.path.join(folder, f)) not in known]:
            text = f'img_suffix={dataset.img_suffix!r} leaves out {count_suffixes(left)}'
            yield Finding('other suffix', folder, text)


def build_dataset(node: Mapping[str, Any], where: str) -> BaseDataset:
    """Build a dataset without reading its annotations; ``where`` is its place in the config.

    UserError if it is remote, cannot be built, or is not a dataset of mmengine.
    """
    readers = [node, *(part for part in node.get('pipeline') or () if isinstance(part, dict))]
    paths = [node.get(key) for key in ('data_root', 'ann_file', 'data_prefix')]
    if '://' in str(paths) or any(part.get('backend_args') for part in readers):
        raise UserError(f'{where} is not on this machine: copy it here to check it')
    with explain(f'{where} cannot be built'):
        dataset = DATASETS.build({**node, 'lazy_init': True})
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


def check_annotations(
    dataset: BaseDataset,
) -> tuple[list[Finding], list[Sample], Sequence[str]]:
    """Return the findings in a dataset's annotations, its files, and its class names by label.

    Names that are unknown or ambiguous are ().
    """
    classes = dataset.metainfo.get('classes') or ()
    methods = type(dataset).load_data_list, type(dataset).parse_data_info
    if all(method.__module__ == 'mmdet.datasets.coco' for method in methods):
        filters = dataset.filter_cfg or {}
        transforms = list(_transforms(dataset.pipeline))
        return CocoCheck(
            dataset.ann_file,
            classes=classes,
            images=dataset.data_prefix['img'],
            label_maps=dataset.data_prefix.get('seg'),
            map_suffix=dataset.seg_map_suffix,
            masks=any(getattr(transform, 'with_mask', False) for transform in transforms),
            training=not dataset.test_mode,
            filter_empty=bool(filters.get('filter_empty_gt')),
            min_size=filters.get('min_size', 0),
            labelled=all(type(t).__name__ != 'LoadEmptyAnnotations' for t in transforms),
        ).run()
    place = str(dataset.ann_file or dataset.data_prefix.get('img_path') or dataset.data_root)
    try:
        dataset.data_list = dataset.load_data_list()
        infos = dataset.filter_data()
    except Exception as error:  # each dataset raises its own
        return [Finding('unreadable annotations', place, one_line(error))], [], ()
    classes = dataset.metainfo.get('classes') or ()  # mmpretrain's are those of the folders
    findings, samples = [], [to_sample(info) for info in infos if 'img_path' in info]
    if not samples and any('img' in info for info in infos):  # CIFAR's, in one file
        return [], [], classes
    if not samples:
        findings.append(Finding('no images', place, f'none left of {len(dataset.data_list)}'))
    else:
        with suppress(LookupError, TypeError):  # not of objects
            findings += check_objects(place, *_count_objects(infos, classes), classes)
        with suppress(LookupError, TypeError):  # not of single labels
            findings += check_labels(place, Counter(info['gt_label'] for info in infos), classes)
    # Of ImageNet's classes, two are named crane.
    names = () if infos and 'gt_label' in infos[0] else classes
    if twice := [name for name, count in Counter(names).items() if count > 1]:
        findings.append(Finding('same name', place, f'metainfo.classes repeats {twice}'))
    return findings, samples, () if twice else classes


def _count_objects(
    infos: Sequence[Mapping[str, Any]], classes: Sequence[str]
) -> tuple[list[tuple], Counter]:
    boxes, objects = [], Counter()
    for info in infos:
        for instance in info['instances']:
            x1, y1, x2, y2 = instance['bbox']
            boxes.append((x1, y1, x2 - x1, y2 - y1, info['width'], info['height']))
            if min(x2 - x1, y2 - y1) >= 1 and not instance.get('ignore_flag'):
                objects[classes[instance['bbox_label']]] += 1
    return boxes, objects


def to_sample(info: Mapping[str, Any]) -> Sample:
    """Return the files of a dataset's ``get_data_info()``."""
    size = info.get('width'), info.get('height')
    size = size if all(size) else None  # some tools write 0 into XML
    return Sample(info['img_path'], info.get('img_id'), size, info.get('seg_map_path'))


def _check_and_count(sample: Sample, options: ReadOptions) -> tuple[list[Finding], np.ndarray]:
    counts = np.zeros(256, int)
    return check_sample(sample, options, counts), counts


def check_files(
    files: Sequence[tuple[Sample, ReadOptions]], workers: int
) -> Iterator[list[Finding]]:
    """Decode images and label maps in several processes; yield each one's findings, in order.

    The last are those of all label maps of a data set, for each data set. UserError if a process
    was killed, usually because memory ran out.
    """
    totals, threads = {}, cv2.getNumThreads()
    cv2.setNumThreads(0)  # a forked process hangs on OpenCV's threads, which do not exist there
    try:
        # On Ctrl-C this process ends the others.
        ignore = dict(initializer=signal.signal, initargs=(signal.SIGINT, signal.SIG_IGN))
        with ProcessPoolExecutor(workers, **ignore) as pool:
            results = pool.map(_check_and_count, *zip(*files, strict=True), chunksize=CHUNK)
            for (findings, numbers), (_, options) in zip(results, files, strict=True):
                _, counts = totals.setdefault(options.where, (options, np.zeros(256, int)))
                counts += numbers
                yield findings
            yield from (check_pixels(counts, options) for options, counts in totals.values())
    except BrokenProcessPool as error:
        raise UserError(
            'a process that decodes images was killed, usually because memory ran out: reduce '
            '--workers'
        ) from error
    finally:
        cv2.setNumThreads(threads)
