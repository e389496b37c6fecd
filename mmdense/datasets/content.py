"""Checks of complete data sets: what is left to learn of each class, and do they agree?"""

import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import zip_longest

import numpy as np
from mmengine.dataset import BaseDataset

from mmdense.datasets.check import Finding, ReadOptions, map_labels
from mmdense.errors import first_of
from mmdense.files import sha256_of

SLACK = 1  # pixels by which rounding may put a box outside
# What boxes may be in place of x, y, width, height -> their corners.
BOX_FORMATS = {
    'x1, y1, x2, y2': lambda a, b, c, d: (a, b, c, d),
    'y1, x1, y2, x2': lambda a, b, c, d: (b, a, d, c),
    'centre, width, height': lambda a, b, c, d: (a - c / 2, b - d / 2, a + c / 2, b + d / 2),
}


def check_objects(
    file: str, boxes: Sequence, objects: Mapping[str, int], classes: Sequence[str]
) -> list[Finding]:
    """Check an annotation file's boxes, and the number of objects that training has of each class.

    ``boxes`` are x, y, width and height, and the width and height of their images, [N, 6].
    """
    findings, boxes = [], np.array(boxes, float).reshape(-1, 6)
    a, b, c, d, width, height = boxes.T
    largest = np.abs(boxes[:, :4]).max(1, initial=0)
    small = (largest > 0) & (largest <= 1)
    beyond = (a + c > width + SLACK) | (b + d > height + SLACK)
    if small.sum() > len(boxes) / 2:
        first = boxes[small][0, :4].round(3).tolist()
        text = f'{small.sum()} of {len(boxes)} boxes lie between 0 and 1, such as {first}'
        findings.append(Finding('relative boxes', file, text))
    elif beyond.sum() > max(2, len(boxes) / 20):
        for name, corners in BOX_FORMATS.items():
            x1, y1, x2, y2 = corners(a, b, c, d)
            inside = (np.minimum(x1, y1) >= -SLACK) & (x2 <= width + SLACK)
            if np.mean(inside & (y2 <= height + SLACK) & (x1 < x2) & (y1 < y2)) > 0.98:
                text = f'{beyond.sum()} of {len(boxes)} boxes cross the border, such as '
                text += f'{boxes[beyond][0, :4].tolist()}, and none would as {name}'
                findings.append(Finding('box format', file, text))
                break
    if absent := [name for name in classes if not objects.get(name)]:
        kind = 'absent class' if len(absent) < len(classes) else 'nothing to learn'
        text = f'no object of {first_of(absent)} is left of {len(boxes)} annotations'
        findings.append(Finding(kind, file, text))
    return findings


def check_labels(where: str, images: Mapping[int, int], classes: Sequence[str]) -> list[Finding]:
    """Check the labels of a classifier's data set: its number of images by label."""
    absent = [name for i, name in enumerate(classes) if not images[i]]
    unknown = sorted(label for label in images if not 0 <= label < (len(classes) or label + 1))
    kinds = {'absent class': ('no image of', absent), 'unknown label': ('label', unknown)}
    return [Finding(k, where, f'{text} {first_of(x)}') for k, (text, x) in kinds.items() if x]


def class_pixels(counts: np.ndarray, options: ReadOptions) -> np.ndarray:
    """Return the pixels of each class from the pixels of each number in label maps, [256]."""
    labels = map_labels(np.arange(256), options)
    used = (labels < (options.classes or 0)) & (labels != options.ignored)
    return np.bincount(labels[used], counts[used], options.classes or 0)


def check_pixels(counts: np.ndarray, options: ReadOptions, complete: bool = True) -> list[Finding]:
    """Check the pixels of each number, [256], in all or some label maps of a data set."""
    if not counts.any() or not options.classes:
        return []
    findings, pixels = [], class_pixels(counts, options)
    absent = [name for name, number in zip(options.names, pixels, strict=False) if not number]
    if np.count_nonzero(pixels) < 2:
        numbers = np.flatnonzero(counts).tolist()
        learns = complete and options.where.startswith('train')
        kind = 'nothing to learn' if learns else 'one class'
        text = f'the label maps contain only {first_of(numbers)}: no pixel of {first_of(absent)}'
        if options.reduce_zero_label:
            text += ' (reduce_zero_label=True ignores 0, and 1 is the first class)'
        kind = 'binary masks' if numbers == [0, 255] else kind
        findings.append(Finding(kind, options.where, text))
    elif absent and complete:
        findings.append(Finding('absent class', options.where, f'no pixel of {first_of(absent)}'))
    if (ignored := 1 - pixels.sum() / counts.sum()) > 0.5:
        findings.append(Finding('mostly ignored', options.where, f'{ignored:.0%} of all pixels'))
    return findings


def check_agreement(
    datasets: Sequence[tuple[ReadOptions, BaseDataset, Sequence[str]]], content: bool
) -> list[Finding]:
    """Compare the labels and images of data sets, the training set first.

    Images are compared by path, and by ``content`` if that is true.
    """
    findings, images = [], defaultdict(list)
    for options, _, files in datasets:
        images[options.where.partition('.')[0]] += files
    known = [(options, dataset) for options, dataset, _ in datasets if options.names]
    for options, dataset in known[:1]:
        classes = dataset.metainfo['classes']
        order = compare_labels(options.names, classes, 'metainfo.classes', options.where)
        findings += [replace(finding, kind='class order') for finding in order]
    for options, dataset in known[1:]:
        first, other = known[0]
        findings += compare_labels(options.names, first.names, first.where, options.where)
        for key in ('reduce_zero_label', 'label_map') if type(dataset) is type(other) else ():
            value, expected = getattr(options, key), getattr(first, key)
            if value != expected:
                text = f'{key} is {value}, but {expected} in {first.where}'
                findings.append(Finding('other labels', options.where, text))
    folders = [(o.where, [*getattr(dataset, 'folder_to_idx', ())]) for o, dataset, _ in datasets]
    first, *others = [place for place in folders if place[1]] or [('', [])]
    for where, names in others:  # mmpretrain numbers the folders of each data set
        findings += compare_labels(names, first[1], first[0], where)
    train = images.pop('train_dataloader', ())
    for loader, files in images.items():
        if shared := _shared(train, files, content):
            text = f'{len(shared)} of {len(files)} images are in train_dataloader too, such as '
            findings.append(Finding('shared images', loader, text + shared[0]))
    return findings


def compare_labels(
    names: Sequence[str], expected: Sequence[str], of: str, where: str
) -> list[Finding]:
    """Compare the class names by label in one place with those of another."""
    for i, (name, other) in enumerate(zip_longest(names, expected)):
        if name != other:
            text = f'label {i} is {name!r}, but {other!r} in {of}'
            return [Finding('other classes', where, text)]
    return []


def _shared(files: Iterable[str], others: Iterable[str], content: bool) -> list[str]:
    """Return those of ``others`` that are among ``files``."""
    paths, others = {*map(os.path.abspath, files)}, dict.fromkeys(map(os.path.abspath, others))
    shared, sizes = paths & others.keys(), defaultdict(lambda: ([], []))
    for i, group in enumerate((paths, others.keys() - shared) if content else ()):
        for file in filter(os.path.isfile, group):
            sizes[os.path.getsize(file)][i].append(file)
    for first, second in sizes.values():
        if first and second:
            digests = set(map(sha256_of, first))
            shared |= {file for file in second if sha256_of(file) in digests}
    return [file for file in others if file in shared]


def count_suffixes(names: Iterable[str], stems: Iterable[str] = ()) -> str:
    """Return the most frequent suffixes of files, such as '9 .PNG, 1 .png'.

    After a known stem they are all that follows, such as '_mask.png'.
    """
    counts = Counter()
    for name in sorted(names):
        cuts = [i for i, letter in enumerate(name) if letter in '._-' and name[:i] in stems]
        counts[name[cuts[-1] :] if cuts else os.path.splitext(name)[1]] += 1
    return ', '.join(f'{count} {suffix}' for suffix, count in counts.most_common(3)) or 'none'
