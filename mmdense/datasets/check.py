"""Checks of images and label maps: would training read what is meant?

No check runs what a file may contain: PostScript, for which Pillow starts another program, is not
an image here, and images above :data:`MAX_PIXELS` are rejected by their header. Sizes are
(width, height) in pixels, as in annotation files.
"""

import os
import re
import warnings
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cv2
import mmcv
import numpy as np
import yaml
from PIL import Image

from mmdense.errors import first_of, one_line, printable
from mmdense.files import IMAGE_FORMATS, ends_in_zeros

ERROR, WARNING = 'error', 'warning'
MAX_PIXELS = 2 * (1024**3 // 4 // 3)  # Pillow's limit; mmdense.patches sets OpenCV's to the same
PIXELS_VARIABLE = 'OPENCV_IO_MAX_IMAGE_PIXELS'
ORIENTATION, ROTATED = 0x0112, (5, 6, 7, 8)  # EXIF: the values that exchange width and height
MIN_SIDE, MAX_RATIO = 16, 20  # of an ordinary image, in pixels and as long over short side
# Severity -> kind of finding -> how to fix it.
FIXES = yaml.safe_load(Path(__file__).with_name('findings.yml').read_text(encoding='utf-8'))


@dataclass(frozen=True)
class Finding:
    """A problem with a file, or with a part of it."""

    kind: str  # a key of findings.yml
    file: str
    text: str
    id: str = ''  # of the part, such as 'image 5' or 'annotation 17'

    @property
    def severity(self) -> str:
        """'error' if training would stop or learn something false, else 'warning'."""
        return ERROR if self.kind in FIXES[ERROR] else WARNING

    @property
    def fix(self) -> str:
        return FIXES[self.severity][self.kind]

    def __str__(self) -> str:
        return printable(': '.join(part for part in (self.file, self.id, self.text) if part))


@dataclass(frozen=True)
class ReadOptions:
    """How a dataset's pipeline reads images and label maps."""

    backend: str = 'cv2'  # mmcv's, for images
    color_type: str = 'color'  # mmcv's, such as 'color_ignore_orientation'
    label_backend: str = 'pillow'  # mmcv's, for label maps
    classes: int | None = None  # number of classes; None leaves labels unchecked
    ignored: int = 255
    reduce_zero_label: bool = False  # label 0 is ignored and the others count from 1
    label_map: Mapping[int, int] = field(default_factory=dict)  # replacements, after that
    where: str = field(default='', compare=False)  # the data set's place in the config
    names: Sequence[str] = field(default=(), compare=False)  # of its classes, by label


@dataclass(frozen=True)
class Sample:
    """The files of one image in a dataset."""

    image: str
    id: Hashable = None  # in the annotation file
    size: tuple[int, int] | None = None  # (width, height) in the annotation file
    label_map: str | None = None


# What a check returns of one file: kinds of problems with their texts.
Problems = list[tuple[str, str]]


def check_sample(
    sample: Sample, options: ReadOptions, counts: np.ndarray | None = None
) -> list[Finding]:
    """Decode an image and its label map, and return what is wrong with them.

    The pixels of each number in the label map are added to ``counts``, [256].
    Damage inside a JPEG that keeps its length is not found: decoders fill in something plausible.
    """
    size, problems = _decode(sample.image, options)
    if size:
        width, height = size
        if sample.size and size != tuple(sample.size):
            upright = ' upright' if size == tuple(sample.size[::-1]) else ''
            text = f'{width} x {height} pixels{upright}, annotated as {sample.size[0]} x '
            problems.append(('size mismatch', f'{text}{sample.size[1]}'))
        if min(size) < MIN_SIDE or max(size) > MAX_RATIO * min(size):
            problems.append(('extreme shape', f'{width} x {height} pixels'))
    part = '' if sample.id is None else f'image {sample.id}'
    findings = [Finding(kind, sample.image, text, part) for kind, text in problems]
    if sample.label_map is not None:
        problems = _check_label_map(sample.label_map, size, options, counts)
        findings += [Finding(kind, sample.label_map, text) for kind, text in problems]
    return findings


def _decode(file: str, options: ReadOptions) -> tuple[tuple[int, int] | None, Problems]:
    """Return (width, height) of an image as training reads it, None if it cannot, and the problems.

    Pillow, which detects truncation, decodes it, or OpenCV, which has more formats.
    """
    if not os.path.isfile(file):
        return None, [('missing file', 'no such image')]
    if not os.path.getsize(file):
        return None, [('empty file', 'empty file')]
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # about large images and odd metadata
        try:
            image = Image.open(file, formats=IMAGE_FORMATS)
        except Exception as error:  # each of Pillow's formats raises its own
            limit = os.environ.get(PIXELS_VARIABLE, str(MAX_PIXELS))
            if isinstance(error, Image.DecompressionBombError) and limit == str(MAX_PIXELS):
                return None, [('too many pixels', one_line(error))]
            return _decode_by_opencv(file, options)
        with image:
            return _decode_by_pillow(image, file, options)


def _decode_by_pillow(
    image: Image.Image, file: str, options: ReadOptions
) -> tuple[tuple[int, int] | None, Problems]:
    size, mode, layout = image.size, image.mode, str([tile[3] for tile in image.tile[:1]])
    try:
        rotated = image.getexif().get(ORIENTATION) in ROTATED
    except Exception:  # metadata that Pillow cannot read
        rotated = True
    if image.format == 'JPEG':  # decode the same bits faster: grey, at an eighth of the size
        image.draft('L', (max(1, size[0] // 8), max(1, size[1] // 8)))
    try:
        image.load()
    except Exception as error:  # each of Pillow's formats raises its own
        return None, [('damaged file', f'damaged ({one_line(error)})')]
    if image.format == 'JPEG' and ends_in_zeros(file):
        return None, [('damaged file', 'damaged (zeros in place of its end)')]
    problems = []
    if mode in ('I', 'I;16', 'F') or re.search('(?<!BGR);16', layout):  # BGR;16 has 5 or 6 bits
        problems.append(('high bit depth', 'more than 8 bits per channel'))
    if mode in ('RGBA', 'LA') and image.getchannel('A').getextrema()[0] < 255:
        problems.append(('transparency', 'partly transparent'))
    if rotated or (options.backend == 'cv2' and not cv2.haveImageReader(file)):
        # OpenCV's version decides which formats it reads and rotates.
        size, more = _decode_by_opencv(file, options)
        problems += more
    return size, problems


def _decode_by_opencv(file: str, options: ReadOptions) -> tuple[tuple[int, int] | None, Problems]:
    try:
        backend = 'tifffile' if options.backend == 'tifffile' else 'cv2'
        pixels = mmcv.imread(file, options.color_type, backend=backend)
    except Exception as error:  # OpenCV and the file system raise their own
        if 'MAX_IMAGE_PIXELS' in str(error):
            return None, [('too many pixels', "more pixels than OpenCV's limit")]
        pixels = None
    if pixels is None:
        return None, [('not an image', 'not an image that can be read')]
    return pixels.shape[1::-1], []


def _check_label_map(
    file: str, image_size: tuple[int, int] | None, options: ReadOptions, counts: np.ndarray | None
) -> Problems:
    size, problems = _decode(file, ReadOptions(color_type='unchanged'))
    if size is None:
        return problems
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        content = Path(file).read_bytes()
        pixels = mmcv.imfrombytes(content, 'unchanged', backend=options.label_backend).squeeze()
    problems = []
    width, height = pixels.shape[1::-1]
    if image_size and (width, height) != image_size:
        text = f'{width} x {height} pixels, but its image has {image_size[0]} x {image_size[1]}'
        problems.append(('size mismatch', text))
    if options.classes is None:
        return problems
    if content.startswith(b'\xff\xd8'):
        text = 'a JPEG, which changes the numbers'
    elif pixels.ndim != 2:
        text = f'{pixels.shape[2]} numbers per pixel'
    elif pixels.dtype.kind not in 'bui':
        text = f'{pixels.dtype} numbers'
    elif int(pixels.max()) > 255 or int(pixels.min()) < 0:
        text = f'numbers from {pixels.min()} to {pixels.max()}, of which training keeps 8 bits'
    else:
        numbers = np.bincount(pixels.flat, minlength=256)
        if counts is not None:
            counts += numbers
        return problems + _check_labels(np.flatnonzero(numbers), options)
    return [*problems, ('not a label map', text)]


def map_labels(numbers: np.ndarray, options: ReadOptions) -> np.ndarray:
    """Return the labels that mmseg reads from the numbers of a label map, uint8 of any shape."""
    labels = numbers.astype(np.uint8)
    if options.reduce_zero_label:  # mmseg's 255, whatever is ignored
        labels = np.where((labels == 0) | (labels == 255), 255, labels - 1).astype(np.uint8)
    before = labels.copy()
    for old, new in options.label_map.items():
        labels[before == old] = new
    return labels


def _check_labels(numbers: np.ndarray, options: ReadOptions) -> Problems:
    labels = map_labels(numbers, options)
    used = labels != options.ignored
    unknown = numbers[used & (labels >= options.classes)].tolist()
    if unknown:
        first = 1 if options.reduce_zero_label else 0
        known = f'{first} to {first + options.classes - 1}' if not options.label_map else 'others'
        text = f'{first_of(unknown)} found, but the {options.classes} classes are {known}'
        return [('unknown label', text)]
    return [] if used.any() else [('no labels', 'no pixel has a class')]
