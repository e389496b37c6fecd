"""Checks of COCO annotation files, as mmdet and pycocotools read them."""

import json
import math
import os
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from reprlib import repr as short_repr
from typing import Any

import numpy as np

from mmdense.datasets.check import Finding, Sample
from mmdense.datasets.content import SLACK, check_objects
from mmdense.errors import first_of, one_line

NUMBER = int | float
TITLES = dict(images='image', categories='category', annotations='annotation')
FIELDS = dict(images=dict(file_name=str, width=NUMBER, height=NUMBER), categories=dict(name=str))


class _UnreadableError(Exception):
    """mmdet cannot load the annotation file."""


@dataclass
class CocoCheck:
    """Checks a COCO annotation file of instances."""

    file: str
    classes: Sequence[str]  # of the dataset
    images: str  # folder
    label_maps: str | None = None  # folder, if there are any
    map_suffix: str = '.png'
    masks: bool = False  # whether training uses them
    training: bool = True  # False for evaluation, which leaves out no image
    filter_empty: bool = False  # whether training leaves out images without objects
    min_size: int = 0  # training leaves out images with a shorter side, in pixels
    labelled: bool = True  # False for images that a semi-supervised model labels itself
    findings: list[Finding] = field(default_factory=list, init=False)

    def run(self) -> tuple[list[Finding], list[Sample], Sequence[str]]:
        """Return the findings, the images that are read, and the class names by label."""
        self._boxes, self._objects = [], Counter()  # for check_objects()
        try:
            content = self._read()
            images = self._records(content, 'images')
            categories = self._records(content, 'categories')
            names = {number: category['name'] for number, category in categories.items()}
            labels = self._check_names(list(names.values()))
            annotated = self._check_annotations(content, images, names)
            if 'annotations' in content and self.labelled:
                self.findings += check_objects(self.file, self._boxes, self._objects, self.classes)
        except _UnreadableError as error:
            self._report('unreadable annotations', str(error))
            return self.findings, [], ()
        samples = []
        for name, count in Counter(image['file_name'] for image in images.values()).items():
            if count > 1:
                self._report('duplicate file', f'{count} images are {name}')
        for number, image in images.items():
            name, size = image['file_name'], (image['width'], image['height'])
            empty = number not in annotated
            if empty and 'annotations' in content:
                self._report('no objects', name, f'image {number}')
            if self.training and (min(size) < self.min_size or (self.filter_empty and empty)):
                continue
            label_map = name.rsplit('.', 1)[0] + self.map_suffix
            label_map = self.label_maps and os.path.join(self.label_maps, label_map)
            samples.append(Sample(os.path.join(self.images, name), number, size, label_map))
        if not samples:
            self._report('no images', 'no image is left')
        return self.findings, samples, labels

    def _report(self, kind: str, text: str, part: str = '') -> None:
        self.findings.append(Finding(kind, self.file, text, part))

    def _read(self) -> dict[str, Any]:
        try:
            content = json.loads(Path(self.file).read_bytes())
        except FileNotFoundError as error:
            raise _UnreadableError('no such file') from error
        except (OSError, ValueError, RecursionError) as error:
            raise _UnreadableError(one_line(error)) from error
        if not isinstance(content, dict):
            raise _UnreadableError(f'is a {type(content).__name__}, not images and annotations')
        # A test set may have no annotations.
        unused = not (self.training and self.labelled)
        optional = unused and 'annotations' not in content
        for key in ('images', 'categories', *(() if optional else ('annotations',))):
            if not isinstance(content.get(key), list):
                raise _UnreadableError(f'no list of {key}')
        return content

    def _with_ids(
        self, content: Mapping[str, Any], key: str
    ) -> Iterator[tuple[Hashable, str, dict[str, Any]]]:
        """Yield the id of each entry of a list, its name in findings, and the entry."""
        known = set()
        for i, record in enumerate(content.get(key, ())):
            number = record.get('id') if isinstance(record, dict) else None
            whole = isinstance(number, float) and number.is_integer()
            if not (whole or isinstance(number, int | str)):
                self._report('invalid field', 'no id', f'{key}[{i}]')
                continue
            part = f'{TITLES[key]} {number}'
            if number in known:
                self._report('duplicate id', f'{key}[{i}] has the same id', part)
            known.add(number)
            yield number, part, record

    def _records(self, content: Mapping[str, Any], key: str) -> dict[Hashable, dict[str, Any]]:
        """Return the usable entries of a list by id."""
        records = {}
        for number, part, record in self._with_ids(content, key):
            records[number] = record  # the last of an id, as in pycocotools
            for name, kind in FIELDS[key].items():
                value = record.get(name)
                if not isinstance(value, kind) or value == '' or (kind is not str and value <= 0):
                    self._report('invalid field', f'{name} is {short_repr(value)}', part)
                    records.pop(number, None)
        return records

    def _check_names(self, names: list[str]) -> Sequence[str]:
        """Return the classes in the order of the file, or () if it is ambiguous."""
        known = [name for name in names if name in self.classes]
        for name, count in Counter(known).items():
            if count > 1:
                text = f'{count} categories are {name!r}, and mmdet gives each its own label'
                self._report('same name', text)
        if missing := [name for name in self.classes if name not in known]:
            text = f'no category {first_of(missing)} (it has {first_of(names, 10)})'
            self._report('missing class', text)
        return () if missing or len(known) > len({*known}) else known

    def _check_annotations(
        self,
        content: Mapping[str, Any],
        images: Mapping[Hashable, Mapping[str, Any]],
        names: Mapping[Hashable, str],
    ) -> set[Hashable]:
        """Check annotations, and return the images that have some."""
        annotated, unused = set(), Counter()
        for _, part, annotation in self._with_ids(content, 'annotations'):
            ids = annotation.get('image_id'), annotation.get('category_id')
            try:
                image, category = images.get(ids[0]), names.get(ids[1])
            except TypeError:  # not hashable
                text = f'image_id is {short_repr(ids[0])}, category_id is {short_repr(ids[1])}'
                self._report('invalid field', text, part)
                continue
            if image is None:
                self._report('unknown image', f'no image {ids[0]!r}', part)
                continue
            part = f'image {ids[0]}, {part}'
            if category is None:
                self._report('unknown category', f'no category {ids[1]!r}', part)
            elif category not in self.classes:
                unused[category] += 1
            else:
                annotated.add(ids[0])
                size = image['width'], image['height']
                if not annotation.get('ignore') and self._check_object(annotation, *size, part):
                    self._objects[category] += not annotation.get('iscrowd')
        for category, count in unused.items():
            self._report('unused category', f'{count} annotations', f'category {category}')
        return annotated

    def _check_object(
        self, annotation: Mapping[str, Any], width: int, height: int, part: str
    ) -> bool:
        """Check an annotation, and return whether mmdet reads it."""
        box, area = annotation.get('bbox'), annotation.get('area')
        try:
            x, y, w, h = box
            finite = math.isfinite(x + y + w + h + area)
        except (TypeError, ValueError, OverflowError):
            finite = False
        if not finite:
            text = f'bbox is {short_repr(box)}, area is {short_repr(area)}'
            self._report('invalid field', text, part)
            return False
        self._boxes.append((x, y, w, h, width, height))
        if not self.training and 'iscrowd' not in annotation:
            self._report('invalid field', 'no iscrowd, which evaluation needs', part)
        text = f'bbox is {box}, the image has {width} x {height} pixels'
        if w < 1 or h < 1 or area <= 0:
            self._report('empty box', f'bbox is {box}, area is {area}', part)
            return False
        if x >= width or y >= height or x + w <= 0 or y + h <= 0:
            self._report('box outside', text, part)
            return False
        if min(x, y) < -SLACK or x + w > width + SLACK or y + h > height + SLACK:
            self._report('box crosses border', text, part)
        if self.masks:
            self._check_mask(annotation.get('segmentation'), width, height, part)
        return True

    def _check_mask(self, mask: Any, width: int, height: int, part: str) -> None:
        if isinstance(mask, dict):
            if list(mask.get('size') or ()) != [height, width]:
                text = f'RLE of size {mask.get("size")} for an image of size {[height, width]}'
                self._report('invalid mask', text, part)
            return
        if not isinstance(mask, list) or not mask:
            self._report('invalid mask', 'neither polygons nor RLE', part)
            return
        try:
            points = np.concatenate([np.array(polygon, dtype=float) for polygon in mask])
        except (TypeError, ValueError, OverflowError):
            points = None
        side = max(width, height)
        if points is None or points.ndim != 1:
            self._report('invalid mask', 'a polygon is not a list of numbers', part)
        elif not ((points >= -side) & (points <= 2 * side)).all():  # or NaN
            self._report('invalid mask', 'a polygon lies far outside the image', part)
        elif short := sum(len(polygon) < 6 or len(polygon) % 2 for polygon in mask):
            self._report('short polygon', f'{short} of {len(mask)} polygons', part)
