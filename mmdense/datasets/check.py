"""What is wrong with an image, a label map, or an annotation file of COCO's format.

Checks ask what training would see, and run nothing that a file may hold: PostScript, for which
Pillow starts another program, is no image here, and one of more than :data:`MAX_PIXELS` is told by
its header. Sizes are (width, height) in pixels, as annotation files write them.
"""

from __future__ import annotations

import json
import math
import os
import warnings
from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from reprlib import repr as shown
from typing import Any

import cv2
import mmcv
import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from mmdense.errors import one_line, printable

__all__ = [
    'ERROR',
    'KINDS',
    'MAX_PIXELS',
    'WARNING',
    'Finding',
    'ReadOptions',
    'Sample',
    'check_coco',
    'check_image',
    'check_label_map',
    'check_sample',
    'map_labels',
]

ERROR, WARNING = 'error', 'warning'
# Where Pillow gives up, half a gigabyte in colour; mmdense.apis has OpenCV give up there too.
MAX_PIXELS = 2 * (1024**3 // 4 // 3)
PIXELS_VARIABLE = 'OPENCV_IO_MAX_IMAGE_PIXELS'
# What OpenCV reads as well. Above all not EPS.
FORMATS = ('BMP', 'DIB', 'GIF', 'JPEG', 'JPEG2000', 'PNG', 'PPM', 'TIFF', 'WEBP')
ORIENTATION, TURNED = 0x0112, (5, 6, 7, 8)  # EXIF: the values that exchange width and height
SMALL, THIN = 16, 20  # pixels of the shorter side; longer over shorter side
NUMBER = (int, float)
SLACK = 1  # pixels by which rounding may put a box outside
AGAIN = 'get the file again'
REMOVE = 'mend the annotation, or take it out'

# Severity, and what can be done about it.
KINDS = {
    'missing file': (ERROR, 'put it there, or take it out of the annotations'),
    'empty file': (ERROR, AGAIN),
    'no image': (ERROR, f'{AGAIN}, or save it as JPEG or PNG'),
    'damaged file': (ERROR, AGAIN),
    'too many pixels': (
        ERROR,
        f'cut it into tiles, or allow more: export {PIXELS_VARIABLE}=NUMBER, which takes memory',
    ),
    'another size': (ERROR, 'annotate the image upright, and at the size that it has'),
    'extreme shape': (WARNING, 'resizing may leave nothing of it: cut it, or take it out'),
    'deep pixels': (
        WARNING,
        'training sees the upper 8 bits: scale dark images to 8 bits yourself',
    ),
    'transparency': (
        WARNING,
        'training sees the colours behind it: flatten it if they are not meant',
    ),
    'label map': (ERROR, 'save one 8-bit number for each pixel as PNG, grey or with a palette'),
    'unknown label': (
        ERROR,
        'mend the map or metainfo.classes; where 0 is no class and classes count from 1, set '
        'reduce_zero_label=True',
    ),
    'nothing labelled': (WARNING, 'every pixel is ignored: label it, or take it out'),
    'annotation file': (ERROR, 'write it again'),
    'no images': (ERROR, 'mend data_root, data_prefix, ann_file, img_suffix or filter_cfg'),
    'classes': (ERROR, 'write metainfo.classes as the file names its categories'),
    'order of classes': (
        WARNING,
        'write metainfo.classes in the order of the file, by which mmdet counts labels',
    ),
    'unused category': (WARNING, 'left out: name it in metainfo.classes if it is to be learnt'),
    'fields': (ERROR, REMOVE),
    'duplicate id': (ERROR, 'number them anew'),
    'duplicate file': (WARNING, 'give the annotations of one image one id'),
    'unknown image': (ERROR, REMOVE),
    'unknown category': (ERROR, REMOVE),
    'empty box': (WARNING, f'left out: {REMOVE}'),
    'box outside': (WARNING, f'left out: {REMOVE}'),
    'box across the border': (WARNING, 'what lies outside is cut off'),
    'mask': (ERROR, REMOVE),
    'polygon': (WARNING, f'polygons of fewer than three points are left out: {REMOVE}'),
    'no object': (WARNING, 'left out, or learnt as background, as filter_cfg.filter_empty_gt says'),
}


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a file, or with a part of it.

    Attributes:
        kind: A key of :data:`KINDS`.
        file: Its path.
        id: Such as 'image 5' or 'annotation 17'; empty for the file itself.
        text: What is wrong.
    """

    kind: str
    file: str
    text: str
    id: str = ''

    @property
    def severity(self) -> str:
        """'error' where training would stop or learn what isn't true, else 'warning'."""
        return KINDS[self.kind][0]

    @property
    def fix(self) -> str:
        """What can be done about it."""
        return KINDS[self.kind][1]

    def __str__(self) -> str:
        return printable(': '.join(part for part in (self.file, self.id, self.text) if part))


@dataclass(frozen=True)
class ReadOptions:
    """How a data set's pipeline reads images and label maps.

    Attributes:
        backend: mmcv's, for images: 'cv2', 'pillow', 'turbojpeg' or 'tifffile'.
        color_type: mmcv's flag for images, such as 'color' or 'color_ignore_orientation'.
        label_backend: mmcv's, for label maps.
        classes: How many labels there are, from 0; None if they are not to be looked at.
        ignored: The label that stands for none of them.
        reduce_zero_label: Whether label 0 is ignored and the others count from 1.
        label_map: What labels are replaced by, after that.
    """

    backend: str = 'cv2'
    color_type: str = 'color'
    label_backend: str = 'pillow'
    classes: int | None = None
    ignored: int = 255
    reduce_zero_label: bool = False
    label_map: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Sample:
    """What belongs to an image of a data set.

    Attributes:
        image: The image file.
        id: Of the image, in the annotation file.
        size: (width, height) that the annotation file says.
        label_map: A file, where there is one.
    """

    image: str
    id: Hashable = None
    size: tuple[int, int] | None = None
    label_map: str | None = None


def check_sample(sample: Sample, options: ReadOptions) -> list[Finding]:
    """Return what is wrong with the files of an image."""
    found, size = _image(sample.image, sample.size, options)
    if sample.id is not None:
        found = [replace(finding, id=f'image {sample.id}') for finding in found]
    if sample.label_map is not None:
        found += check_label_map(sample.label_map, size=size, options=options)
    return found


# Images


def check_image(
    file: str | Path, *, size: tuple[int, int] | None = None, options: ReadOptions | None = None
) -> list[Finding]:
    """Return what is wrong with an image, decoding all of it.

    Damage inside a JPEG that leaves it as long as it should be is not found: decoders guess.

    Args:
        file: The image.
        size: (width, height) that its annotations are made for.
        options: How it will be read; by default as :class:`ReadOptions` says.
    """
    return _image(str(file), size, options or ReadOptions())[0]


def _image(
    file: str, size: tuple[int, int] | None, options: ReadOptions
) -> tuple[list[Finding], tuple[int, int] | None]:
    """Return what is wrong, and (width, height) as training sees it, if it can be read."""
    found, seen = _decode(file, options)
    if seen is None:
        return found, None
    width, height = seen
    if size and seen != tuple(size):
        turned = ', upright' if (height, width) == tuple(size) else ''
        text = f'{width} x {height} pixels{turned}, but annotated as {size[0]} x {size[1]}'
        found.append(Finding('another size', file, text))
    if min(seen) < SMALL or max(seen) > THIN * min(seen):
        found.append(Finding('extreme shape', file, f'{width} x {height} pixels'))
    return found, seen


def _decode(file: str, options: ReadOptions) -> tuple[list[Finding], tuple[int, int] | None]:
    """Decode an image by Pillow, which says what is missing, or by OpenCV, which reads more."""
    if not os.path.isfile(file):
        return [Finding('missing file', file, 'no such image')], None
    if not os.path.getsize(file):
        return [Finding('empty file', file, 'empty file')], None
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # of large images, and odd metadata
        try:
            image = Image.open(file, formats=FORMATS)
        except Image.DecompressionBombError as error:
            # Whoever raised OpenCV's limit leaves it to OpenCV, which looks at the header first.
            if os.environ.get(PIXELS_VARIABLE, str(MAX_PIXELS)) == str(MAX_PIXELS):
                return [Finding('too many pixels', file, one_line(error))], None
            return _decode_by_opencv(file, options)
        except Exception:  # each of Pillow's formats raises its own; OpenCV may read it
            return _decode_by_opencv(file, options)
        with image:
            return _load(image, file, options)


def _load(
    image: Image.Image, file: str, options: ReadOptions
) -> tuple[list[Finding], tuple[int, int] | None]:
    size, mode, depth = image.size, image.mode, repr(image.tile[:1])
    try:
        turned = image.getexif().get(ORIENTATION) in TURNED
    except Exception:  # of metadata that Pillow cannot read
        turned = True
    if image.format == 'JPEG':  # the same bits in less time: grey, and an eighth of the size
        image.draft('L', (max(1, size[0] // 8), max(1, size[1] // 8)))
    try:
        image.load()
    except Exception as error:  # each of Pillow's formats raises its own
        return [Finding('damaged file', file, f'damaged ({one_line(error)})')], None
    if image.format == 'JPEG' and _ends_in_zeros(file):
        return [Finding('damaged file', file, 'damaged (zeros in place of its end)')], None
    found = []
    if mode in ('I', 'F') or '16' in depth:
        found.append(Finding('deep pixels', file, 'more than 8 bits per channel'))
    if mode in ('RGBA', 'LA') and image.getchannel('A').getextrema()[0] < 255:
        found.append(Finding('transparency', file, 'partly transparent'))
    if turned or (options.backend == 'cv2' and not cv2.haveImageReader(file)):
        # Which formats OpenCV reads, and turns upright, depends on its version.
        unread, size = _decode_by_opencv(file, options)
        found += unread
    return found, size


def _decode_by_opencv(
    file: str, options: ReadOptions
) -> tuple[list[Finding], tuple[int, int] | None]:
    try:
        pixels = mmcv.imread(file, options.color_type, backend='cv2')
    except Exception as error:  # OpenCV and the file system raise their own
        if 'MAX_IMAGE_PIXELS' in str(error):
            return [Finding('too many pixels', file, 'more pixels than OpenCV may read')], None
        pixels = None
    if pixels is None:
        return [Finding('no image', file, 'not an image that can be read')], None
    return [], (pixels.shape[1], pixels.shape[0])


def _ends_in_zeros(file: str) -> bool:
    """Whether a JPEG has zeros in place of its end, as a crash or a broken download leaves it."""
    with open(file, 'rb') as opened:
        opened.seek(-1, os.SEEK_END)
        if opened.read(1) != b'\0':
            return False
        opened.seek(0)
        content = opened.read()
    return content.rfind(b'\xff\xd9') < content.rfind(b'\xff\xda')  # end of image, start of scan


# Label maps


def check_label_map(
    file: str | Path,
    *,
    size: tuple[int, int] | None = None,
    options: ReadOptions | None = None,
) -> list[Finding]:
    """Return what is wrong with a label map.

    Args:
        file: The map.
        size: (width, height) of its image as training sees it.
        options: How it will be read; by default as :class:`ReadOptions` says.
    """
    file, options = str(file), options or ReadOptions()
    found, seen = _decode(file, ReadOptions(color_type='unchanged'))
    found = [finding for finding in found if finding.severity == ERROR]
    if seen is None:
        return found
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        content = Path(file).read_bytes()
        pixels = mmcv.imfrombytes(content, 'unchanged', backend=options.label_backend).squeeze()
    seen = pixels.shape[1::-1]
    if size and seen != tuple(size):
        text = f'{seen[0]} x {seen[1]} pixels, but its image has {size[0]} x {size[1]}'
        found.append(Finding('another size', file, text))
    if options.classes is None:
        return found
    if content.startswith(b'\xff\xd8'):
        wrong = 'a JPEG, which changes the numbers'
    elif pixels.ndim != 2:
        wrong = f'{pixels.shape[2]} numbers for each pixel'
    elif pixels.dtype.kind not in 'bui':
        wrong = f'{pixels.dtype} numbers'
    elif int(pixels.max()) > 255:
        wrong = f'numbers up to {pixels.max()}, of which training keeps 8 bits'
    else:
        return found + _labels(file, np.flatnonzero(np.bincount(pixels.ravel())), options)
    return [*found, Finding('label map', file, wrong)]


def map_labels(numbers: np.ndarray, options: ReadOptions) -> np.ndarray:
    """Return the labels that mmseg makes of the numbers in a label map, uint8 of any shape."""
    labels = numbers.astype(np.uint8)
    if options.reduce_zero_label:  # mmseg's 255, whatever is ignored
        labels = np.where((labels == 0) | (labels == 255), 255, labels - 1).astype(np.uint8)
    before = labels.copy()
    for old, new in options.label_map.items():
        labels[before == old] = new
    return labels


def _labels(file: str, numbers: np.ndarray, options: ReadOptions) -> list[Finding]:
    labels = map_labels(numbers, options)
    counts = labels != options.ignored
    unknown = numbers[counts & (labels >= options.classes)].tolist()
    if unknown:
        first = 1 if options.reduce_zero_label else 0
        known = f'{first} to {first + options.classes - 1}' if not options.label_map else 'others'
        text = f'{_some(unknown)} found, but the {options.classes} classes are {known}'
        return [Finding('unknown label', file, text)]
    return [] if counts.any() else [Finding('nothing labelled', file, 'no pixel has a class')]


def _some(things: Sequence[Any], most: int = 5) -> str:
    more = f' and {len(things) - most} more' if len(things) > most else ''
    return ', '.join(map(str, things[:most])) + more


# Annotations


class _Refused(Exception):
    """An annotation file that mmdet would not load."""


def check_coco(
    file: str | Path,
    *,
    classes: Sequence[str],
    images: str | Path,
    label_maps: str | Path | None = None,
    map_suffix: str = '.png',
    masks: bool = False,
    panoptic: bool = False,
    training: bool = True,
    filter_empty: bool = False,
    min_size: int = 0,
) -> tuple[list[Finding], list[Sample]]:
    """Find what is wrong with an annotation file of COCO's format, and the images it names.

    Args:
        file: Of instances, or panoptic.
        classes: Names that the labels stand for.
        images: Folder of the images.
        label_maps: Folder of maps with the images' names, where there are some.
        map_suffix: Of those.
        masks: Whether instances are learnt with their masks.
        panoptic: The file has a list of segments for each image.
        training: False if it is for evaluation, which leaves out no image.
        filter_empty: Whether images without an object are left out in training.
        min_size: Images with a shorter side, in pixels, are left out in training.

    Returns:
        Findings, and the images that are read, with their label maps.
    """
    check = _Coco(str(file), masks, panoptic, training)
    try:
        kept = check.run(classes, filter_empty, min_size)
    except _Refused as error:
        return [*check.found, Finding('annotation file', str(file), str(error))], []
    samples = []
    for image in kept:
        name = image['file_name']
        stem = name.rsplit('.', 1)[0]
        label_map = label_maps and os.path.join(label_maps, stem + map_suffix)
        size = (image['width'], image['height'])
        samples.append(Sample(os.path.join(images, name), image['id'], size, label_map))
    if not samples:
        check.find('no images', 'no image is left')
    return check.found, samples


class _Coco:
    """One annotation file, as mmdet's data sets and pycocotools' evaluation read it."""

    def __init__(self, file: str, masks: bool, panoptic: bool, training: bool) -> None:
        self.file, self.masks, self.panoptic, self.training = file, masks, panoptic, training
        self.found: list[Finding] = []

    def find(self, kind: str, text: str, part: str = '') -> None:
        self.found.append(Finding(kind, self.file, text, part))

    def run(
        self, classes: Sequence[str], filter_empty: bool, min_size: int
    ) -> list[dict[str, Any]]:
        """Check everything; return the images that are read."""
        held = _read_json(self.file)
        images = self._records(held, 'images', dict(file_name=str, width=NUMBER, height=NUMBER))
        categories = self._records(held, 'categories', dict(name=str))
        names = {key: category['name'] for key, category in categories.items()}
        for name, count in Counter(names.values()).items():
            if count > 1:
                self.find(
                    'duplicate id', f'{count} categories are named {name}', f'category {name}'
                )
        learnt = [name for name in names.values() if name in classes]
        if missing := [name for name in classes if name not in learnt]:
            text = f'no category {_some(missing)} (it has {_some([*names.values()], 10)})'
            self.find('classes', text)
        elif learnt != list(classes):
            self.find('order of classes', f'categories come as {_some(learnt, 10)}')
        for name, ids in _groups((i['file_name'], key) for key, i in images.items()).items():
            if len(ids) > 1:
                self.find('duplicate file', f'images {_some(ids)} are {name}', f'image {ids[0]}')
        busy = self._annotations(held, images, names, set(classes))
        kept = []
        for key, image in images.items():
            if key not in busy and 'annotations' in held:
                self.find('no object', image['file_name'], f'image {key}')
            small = min(image['width'], image['height']) < min_size
            if not (self.training and (small or (filter_empty and key not in busy))):
                kept.append(image)
        return kept

    def _records(
        self, held: Mapping[str, Any], key: str, wanted: Mapping[str, Any]
    ) -> dict[Hashable, dict[str, Any]]:
        """Return the usable entries of a list by their id."""
        if not isinstance(held.get(key), list):
            raise _Refused(f'no list of {key}')
        one = dict(images='image', categories='category')[key]
        records = {}
        for i, record in enumerate(held[key]):
            number = record.get('id') if isinstance(record, dict) else None
            if not isinstance(number, int | str):
                self.find('fields', 'no id', f'{key}[{i}]')
                continue
            part = f'{one} {number}'
            if number in records:
                self.find('duplicate id', f'{key}[{i}] has the id of another', part)
            wrong = [k for k, kind in wanted.items() if not _is(record.get(k), kind)]
            if wrong:
                self.find('fields', f'{wrong[0]} is {shown(record.get(wrong[0]))}', part)
            else:
                records[number] = record  # the last of an id, as in pycocotools
        return records

    def _annotations(
        self,
        held: Mapping[str, Any],
        images: Mapping[Hashable, Mapping[str, Any]],
        names: Mapping[Hashable, str],
        classes: set[str],
    ) -> set[Hashable]:
        """Check annotations; return the images that mmdet takes for having some."""
        busy, seen, unused = set(), set(), Counter()
        for ann, number in self._each_annotation(held):
            part = f'annotation {number}'
            if not self.panoptic:
                if number in seen:
                    self.find('duplicate id', 'has the id of another', part)
                seen.add(number)
            try:
                owner, category = images.get(ann['image_id']), names.get(ann['category_id'])
            except (KeyError, TypeError):
                ids = [shown(ann.get(key)) for key in ('image_id', 'category_id')]
                self.find('fields', f'image_id is {ids[0]}, category_id is {ids[1]}', part)
                continue
            if owner is None:
                self.find('unknown image', f'no image {ann["image_id"]}', part)
                continue
            part = f'image {ann["image_id"]}, {part}'
            if category is None:
                self.find('unknown category', f'no category {ann["category_id"]}', part)
                continue
            if category not in classes:
                unused[category] += 1
                continue
            if self._is_object(ann, owner, part) or not self.panoptic:
                busy.add(ann['image_id'])
        for category, count in unused.items():
            self.find('unused category', f'{count} annotations', f'category {category}')
        return busy

    def _each_annotation(self, held: Mapping[str, Any]) -> Iterator[tuple[dict, Hashable]]:
        """Yield annotations that have an id, panoptic ones as mmdet rewrites them."""
        annotations = held.get('annotations')
        if annotations is None and not self.training:  # of a test set
            return
        if not isinstance(annotations, list):
            raise _Refused('no list of annotations')
        for i, ann in enumerate(annotations):
            parts = [ann]
            if self.panoptic and isinstance(ann, dict):
                parts = ann.get('segments_info')
                parts = parts if isinstance(parts, list) else [None]
            for part in parts:
                number = part.get('id') if isinstance(part, dict) else None
                if not isinstance(number, int | str):
                    self.find('fields', 'no id, or no segments_info', f'annotations[{i}]')
                    continue
                yield dict(part, image_id=ann.get('image_id')) if self.panoptic else part, number

    def _is_object(self, ann: Mapping[str, Any], image: Mapping[str, Any], part: str) -> bool:
        """Whether an annotation is learnt from, or counts as ignored."""
        if ann.get('ignore') and not self.panoptic:
            return False
        try:
            (x, y, w, h), area = ann['bbox'], ann['area']
            finite = math.isfinite(x + y + w + h + area)
        except (KeyError, TypeError, ValueError, OverflowError):
            finite = False
        if not finite:
            bbox, area = ann.get('bbox'), ann.get('area')
            self.find('fields', f'bbox is {shown(bbox)}, area is {shown(area)}', part)
            return False
        if not self.training and not self.panoptic and 'iscrowd' not in ann:
            self.find('fields', 'no iscrowd, which evaluation asks for', part)
        if w < 1 or h < 1 or area <= 0:
            self.find('empty box', f'bbox is {ann["bbox"]}, area is {area}', part)
            return False
        width, height = image['width'], image['height']
        where = f'bbox is {ann["bbox"]}, the image has {width} x {height} pixels'
        if not self.panoptic and (x >= width or y >= height or x + w <= 0 or y + h <= 0):
            self.find('box outside', where, part)
            return False
        if min(x, y) < -SLACK or x + w > width + SLACK or y + h > height + SLACK:
            self.find('box across the border', where, part)
        if self.masks and not self.panoptic:
            self._mask(ann.get('segmentation'), width, height, part)
        return True

    def _mask(self, mask: Any, width: int, height: int, part: str) -> None:
        if isinstance(mask, list) and mask:
            if wrong := _wrong_polygons(mask, max(width, height)):
                self.find('mask', wrong, part)
            elif short := sum(len(polygon) < 6 or len(polygon) % 2 for polygon in mask):
                self.find('polygon', f'{short} of {len(mask)} polygons', part)
        elif isinstance(mask, dict):
            if list(mask.get('size') or ()) != [height, width]:
                text = f'RLE of size {mask.get("size")} for an image of size {[height, width]}'
                self.find('mask', text, part)
            elif not _is_rle(mask):
                self.find('mask', 'RLE that does not fill its size', part)
        else:
            self.find('mask', 'neither polygons nor RLE', part)


def _read_json(file: str) -> dict[str, Any]:
    try:
        held = json.loads(Path(file).read_bytes())
    except FileNotFoundError as error:
        raise _Refused('no such file') from error
    except (OSError, ValueError, RecursionError) as error:
        raise _Refused(one_line(error)) from error
    if not isinstance(held, dict):
        raise _Refused(f'holds a {type(held).__name__}, not images and annotations')
    return held


def _is(value: Any, kind: Any) -> bool:
    """Whether it is a text, or a number of pixels."""
    return isinstance(value, kind) and (bool(value) if kind is str else value > 0)


def _groups(pairs: Iterator[tuple[str, Any]]) -> dict[str, list[Any]]:
    groups = defaultdict(list)
    for key, value in pairs:
        groups[key].append(value)
    return groups


def _wrong_polygons(polygons: list[Any], side: int) -> str:
    """Return what no polygon may be: pycocotools would crash, or walk along miles of outline."""
    for polygon in polygons:
        try:
            finite = math.isfinite(sum(polygon))
        except OverflowError:
            finite = False
        except TypeError:
            return f'polygon of {type(polygon).__name__}, not of numbers'
        if not finite or (polygon and (min(polygon) < -side or max(polygon) > 2 * side)):
            return 'polygon far outside the image'
    return ''


def _is_rle(mask: Mapping[str, Any]) -> bool:
    counts, (height, width) = mask.get('counts'), mask['size']
    try:
        if isinstance(counts, list):
            return min(counts, default=0) >= 0 and sum(counts) == height * width
        return isinstance(counts, str) and coco_mask.decode(mask).shape == (height, width)
    except (TypeError, ValueError):
        return False
