"""Handwritten digits on photographs: detection, instance and semantic segmentation.

The digits are scikit-learn's bundled copy of the UCI ML hand-written digits (1797 real scans of
8 x 8 pixels, https://archive.ics.uci.edu/dataset/80), the photographs are the two that
scikit-learn bundles (china.jpg, flower.jpg), so nothing is downloaded. What is written::

    OUT/train/000000.jpg ...                    OUT/val/000000.jpg ...
    OUT/annotations/instances_train.json        OUT/annotations/instances_val.json    (COCO)
    OUT/semantic/train/000000.png ...           OUT/semantic/val/000000.png ...       (mmseg)
    OUT/foreground/train/000000.png ...         OUT/foreground/val/000000.png ...     (mmseg)
    OUT/demo.json                               how it was made; marks the folder as ours

Shapes: S = image side, [h, w] = one digit's tight window, all in pixels; images are RGB.
"""

import itertools
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from pycocotools import mask as coco_mask

# Category d + 1 of the COCO files and label d + 1 of the label maps is digit d.
CLASSES = ('0', '1', '2', '3', '4', '5', '6', '7', '8', '9')
PALETTE = (
    (230, 25, 75),
    (60, 180, 75),
    (255, 225, 25),
    (0, 130, 200),
    (245, 130, 48),
    (240, 50, 230),
    (70, 240, 240),
    (145, 30, 180),
    (210, 245, 60),
    (250, 190, 212),
)
SEG_CLASSES = ('background', *CLASSES)
SEG_PALETTE = ((0, 0, 0), *PALETTE)
# The same label maps with all digits as one class.
FOREGROUND_CLASSES = ('background', 'digit')
FOREGROUND_PALETTE = ((0, 0, 0), (255, 225, 25))

SPLITS = ('train', 'val')
MAPS = ('semantic', 'foreground')  # folders of label maps
MARKER = 'demo.json'
GENERATOR = 'mmdense.datasets.make_digits'
# To be raised whenever the same arguments give other files: older folders are then remade.
VERSION = 2

PHOTOS = ('china.jpg', 'flower.jpg')
SCAN_SIDE = 8
VAL_SCANS = 0.2  # share of each class's scans that only the validation images show
MIN_SIZE = 64
COUNT = (2, 6)  # digits in an image, both ends included
HEIGHT = (22 / 192, 60 / 192)  # height of a scan over the image side
ASPECT = (0.85, 1.18)
ANGLE = (-14.0, 14.0)  # degrees; well short of turning a 6 into a 9
CROP = (0.3, 1.0)  # side of the crop over the photograph's shorter side
MAX_IOU = 0.05  # between the boxes of one image
PLACEMENTS = 100  # tries for one digit, then it is left out
BLUR = 0.32  # in scan pixels
SHARPEN = (1.5, 1.0)  # unsharp masking: amount, and radius in scan pixels
STROKE = 0.5  # sharpened ink that bounds a stroke
SPECK = 0.04  # separate blobs below this share of a digit's ink are dirt of the scanner
SUPERSAMPLING = 4
COLOURS = 32  # candidates for one digit
CONTRAST = 33.0  # CIELAB distance to keep between a digit and most pixels around it
CHROMA = 0.4  # weight of hue and saturation in that distance
JPEG_QUALITY = 92


class DigitsData(NamedTuple):
    """What :func:`make_digits` found or made.

    Attributes:
        root: the folder.
        made: whether it was written now (False: it was up to date).
        images: images by split.
        instances: digits by split.
    """

    root: Path
    made: bool
    images: dict[str, int]
    instances: dict[str, int]


class _Sources(NamedTuple):
    scans: np.ndarray  # [1797, 8, 8] float32, ink in 0..1
    digits: np.ndarray  # [1797] int
    photos: list[np.ndarray]  # [H, W, 3] uint8


class _Scene(NamedTuple):
    image: np.ndarray  # [S, S, 3] uint8
    labels: np.ndarray  # [S, S] uint8
    objects: list[tuple[int, int, np.ndarray]]  # digit, scan's index, mask [S, S] bool


def make_digits(
    out: str | os.PathLike,
    *,
    train: int = 800,
    val: int = 200,
    size: int = 192,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> DigitsData:
    """Write the demo dataset into a folder, or leave the folder alone if it is up to date.

    The same arguments give the same bytes. Image i depends on ``size`` and ``seed`` only, not on
    how many images are made, and no scan is shown in both splits. A folder made earlier with
    other arguments is replaced once its successor is complete.

    Args:
        out: the folder to make.
        train: number of training images.
        val: number of validation images.
        size: side of the square images in pixels, at least 64.
        seed: chooses everything that is random.
        progress: called with (images done, images in all) after each image.

    Raises:
        ValueError: an argument is out of range.
        FileExistsError: ``out`` exists and holds what this function did not write.
        ModuleNotFoundError: scikit-learn is missing.
    """
    for name, value, least in (
        ('train', train, 1),
        ('val', val, 1),
        ('size', size, MIN_SIZE),
        ('seed', seed, 0),
    ):
        if value < least:
            raise ValueError(f'{name} must be at least {least}, got {value}')
    # A link to a disk elsewhere is followed, so that renaming stays within one file system.
    root = Path(out).resolve()
    images = dict(train=train, val=val)
    arguments = dict(**images, size=size, seed=seed)
    marker = _read_marker(root)
    if _up_to_date(root, marker, arguments):
        return DigitsData(root, False, images, marker['instances'])

    sources = _load_sources()
    parts = _split_scans(sources.digits, seed)
    done = itertools.count(1)

    def scenes(split: str):
        for i in range(images[split]):
            # Keyed by split and image: neither the counts nor the order reach the generator.
            key = (SPLITS.index(split), i)
            rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))
            yield _scene(sources, parts[split], size, rng)
            if progress is not None:
                progress(next(done), train + val)

    root.parent.mkdir(parents=True, exist_ok=True)
    # Made beside its place and renamed: under the real name there is never a half-made folder.
    with tempfile.TemporaryDirectory(prefix=f'.{root.name}-', dir=root.parent) as scratch:
        new = Path(scratch, 'new')
        instances = {split: _write_split(new, split, scenes(split)) for split in SPLITS}
        marker = dict(
            generator=GENERATOR,
            version=VERSION,
            arguments=arguments,
            scans={split: len(parts[split]) for split in SPLITS},
            instances=instances,
        )
        _write_json(new / MARKER, marker, indent=2)
        # Asked again: somebody may have put something there in the meantime.
        _read_marker(root)
        if root.exists():
            root.rename(Path(scratch, 'old'))
        new.rename(root)
    return DigitsData(root, True, images, instances)


# ---------------------------------------------------------------------------- the folder


def _read_marker(root: Path) -> dict | None:
    """Return the marker of a folder that we made, None for no folder or an empty one."""
    way_out = 'choose another folder, or remove this one first'
    if not root.exists():
        return None
    if not root.is_dir():
        raise FileExistsError(f'{root} is not a folder: {way_out}')
    names = {path.name for path in root.iterdir()}
    if not names:
        return None
    try:
        marker = json.loads((root / MARKER).read_text(encoding='utf-8'))
        ours = marker['generator'] == GENERATOR
    except (OSError, ValueError, TypeError, KeyError):
        ours = False
    if not ours:
        raise FileExistsError(f'{root} was not made by this tool, it stays as it is: {way_out}')
    foreign = names - {*SPLITS, *MAPS, 'annotations', MARKER}
    if foreign:
        raise FileExistsError(
            f'{root} also holds {", ".join(sorted(foreign))}, not made by this tool: {way_out}'
        )
    return marker


def _up_to_date(root: Path, marker: dict | None, arguments: dict[str, int]) -> bool:
    if marker is None or marker.get('version') != VERSION or marker.get('arguments') != arguments:
        return False
    # The folder was complete when it got its name; this notices files deleted since.
    return all(
        _annotation_file(root, split).is_file()
        and len(list((root / split).glob('*.jpg'))) == arguments[split]
        and all(len(list((root / maps / split).glob('*.png'))) == arguments[split] for maps in MAPS)
        for split in SPLITS
    )


def _annotation_file(root: Path, split: str) -> Path:
    return root / 'annotations' / f'instances_{split}.json'


def _write_split(root: Path, split: str, scenes: Iterable[_Scene]) -> int:
    """Write images, label maps and annotations of one split, return the number of digits."""
    for folder in (root / split, *(root / maps / split for maps in MAPS), root / 'annotations'):
        folder.mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for image_id, (image, labels, objects) in enumerate(scenes):
        stem = f'{image_id:06d}'
        jpeg = cv2.imencode(
            '.jpg', cv2.cvtColor(image, cv2.COLOR_RGB2BGR), [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
        )[1]
        (root / split / f'{stem}.jpg').write_bytes(jpeg.tobytes())
        for maps, values in zip(MAPS, (labels, np.minimum(labels, 1)), strict=True):
            png = cv2.imencode('.png', values)[1]
            (root / maps / split / f'{stem}.png').write_bytes(png.tobytes())
        height, width = labels.shape
        images.append(dict(id=image_id, file_name=f'{stem}.jpg', width=width, height=height))
        for digit, scan, mask in objects:
            annotations.append(
                dict(
                    # From 1: COCOeval takes a match with annotation 0 for no match.
                    id=len(annotations) + 1,
                    image_id=image_id,
                    category_id=digit + 1,
                    bbox=list(_box(mask)),
                    area=int(mask.sum()),
                    iscrowd=0,
                    segmentation=_rle(mask),
                    scan=scan,
                )
            )
    _write_json(
        _annotation_file(root, split),
        dict(
            info=dict(
                description='Handwritten digits on photographs, made by mmdense', version='1.0'
            ),
            licenses=[],
            images=images,
            annotations=annotations,
            categories=[
                dict(id=i, name=name, supercategory='digit') for i, name in enumerate(CLASSES, 1)
            ],
        ),
    )
    return len(annotations)


def _write_json(path: Path, content: dict, indent: int | None = None) -> None:
    path.write_text(json.dumps(content, indent=indent) + '\n', encoding='utf-8')


def _rle(mask: np.ndarray) -> dict:
    """Return COCO's compressed run lengths: polygons can't say the holes of 0, 6, 8 and 9."""
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return dict(size=[int(n) for n in rle['size']], counts=rle['counts'].decode('ascii'))


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """Return the tight box (x, y, width, height) around a mask's pixels."""
    ys, xs = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return int(xs[0]), int(ys[0]), int(xs[-1] - xs[0] + 1), int(ys[-1] - ys[0] + 1)


# ---------------------------------------------------------------------------- the sources


def _load_sources() -> _Sources:
    try:
        from sklearn.datasets import load_digits, load_sample_image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the demo dataset needs scikit-learn: pip install 'mmdense[demo]'"
        ) from error
    data = load_digits()
    return _Sources(
        scans=(data.images / 16).astype(np.float32),
        digits=data.target,
        photos=[load_sample_image(name) for name in PHOTOS],
    )


def _split_scans(digits: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Split the scans' indices by class; the counts of images must not matter here."""
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(len(SPLITS),)))
    train, val = [], []
    for digit in range(len(CLASSES)):
        indices = rng.permutation(np.flatnonzero(digits == digit))
        held_out = round(VAL_SCANS * len(indices))
        val.append(indices[:held_out])
        train.append(indices[held_out:])
    return dict(train=np.concatenate(train), val=np.concatenate(val))


# ---------------------------------------------------------------------------- one image


def _scene(sources: _Sources, scans: np.ndarray, size: int, rng: np.random.Generator) -> _Scene:
    """Draw one image from the given scans' indices."""
    image = _background(sources.photos, size, rng)
    inked = np.zeros((size, size), dtype=bool)
    labels = np.zeros((size, size), dtype=np.uint8)
    boxes, objects = [], []
    for scan in rng.choice(scans, rng.integers(*COUNT, endpoint=True), replace=False):
        alpha = _draw(
            sources.scans[scan],
            height=size * rng.uniform(*HEIGHT),
            aspect=rng.uniform(*ASPECT),
            angle=rng.uniform(*ANGLE),
        )
        window = _place(alpha, inked, boxes, rng)
        if window is None:
            continue
        colour = _colour(image, window, rng)
        patch = image[window]
        blend = patch + alpha[..., None] * (colour - patch)
        image[window] = np.rint(blend).astype(np.uint8)
        inked[window] |= alpha > 0
        mask = np.zeros((size, size), dtype=bool)
        mask[window] = alpha >= 0.5
        digit = int(sources.digits[scan])
        labels[mask] = digit + 1
        boxes.append(_box(mask))
        objects.append((digit, int(scan), mask))
    # The largest digit covers a tenth of the image, so that a second one finds its place.
    assert len(objects) >= COUNT[0]
    return _Scene(image, labels, objects)


def _background(photos: list[np.ndarray], size: int, rng: np.random.Generator) -> np.ndarray:
    """Return a random square crop of a photograph [S, S, 3], mirrored half of the time."""
    photo = photos[rng.integers(len(photos))]
    height, width = photo.shape[:2]
    # Uniform in the logarithm: each magnification is as likely as any other.
    side = round(min(height, width) * np.exp(rng.uniform(*np.log(CROP))))
    y, x = rng.integers(height - side, endpoint=True), rng.integers(width - side, endpoint=True)
    crop = photo[y : y + side, x : x + side]
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    method = cv2.INTER_AREA if side > size else cv2.INTER_CUBIC
    return cv2.resize(np.ascontiguousarray(crop), (size, size), interpolation=method)


def _draw(scan: np.ndarray, *, height: float, aspect: float, angle: float) -> np.ndarray:
    """Draw a scan [8, 8] as a smooth stroke.

    Args:
        scan: ink in 0..1.
        height: of the scan's 8 rows, in pixels.
        aspect: width over height, at an equal area.
        angle: in degrees.

    Returns:
        The coverage [h, w] in 0..1, cut tight.
    """
    # Interpolated, blurred by less than a scan pixel, and cut at one level: the outline is that
    # of a pen and not of an 8 x 8 raster. The hollows of 4, 6, 8 and 9 are about a pixel wide and
    # hardly paler than the stroke: sharpening opens them (89 % of the scans other than 4 then have
    # the holes that their digit should have, 80 % without it).
    zoom, margin = 8, 2
    ink = np.pad(scan, margin)
    side = len(ink) * zoom
    ink = cv2.resize(ink, (side, side), interpolation=cv2.INTER_CUBIC)
    amount, wide = SHARPEN
    smooth = cv2.GaussianBlur(ink, (0, 0), BLUR * zoom)
    ink = smooth + amount * (smooth - cv2.GaussianBlur(ink, (0, 0), wide * zoom))

    turn = np.deg2rad(angle)
    matrix = (
        np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
        @ np.diag([np.sqrt(aspect), 1 / np.sqrt(aspect)])
        * (height / SCAN_SIDE / zoom * SUPERSAMPLING)
    )
    # The turned raster's extent, rounded up to whole pixels; both centres fall together.
    extent = np.abs(matrix).sum(axis=1).max() * side
    pixels = int(np.ceil(extent / SUPERSAMPLING))
    canvas = pixels * SUPERSAMPLING
    shift = np.full(2, (canvas - 1) / 2) - matrix @ np.full(2, (side - 1) / 2)
    ink = cv2.warpAffine(ink, np.column_stack([matrix, shift]), (canvas, canvas))

    # Thresholded fine, then averaged: the coverage of each pixel, an antialiased edge.
    fine = (ink > STROKE).astype(np.uint8)
    _, blobs, stats, _ = cv2.connectedComponentsWithStats(fine, connectivity=8)
    areas = stats[:, cv2.CC_STAT_AREA]
    kept = areas >= SPECK * areas[1:].sum()
    kept[0] = False
    alpha = cv2.resize(
        kept[blobs].astype(np.float32), (pixels, pixels), interpolation=cv2.INTER_AREA
    )
    x, y, w, h = _box(alpha > 0)
    return alpha[y : y + h, x : x + w]


def _place(
    alpha: np.ndarray,
    inked: np.ndarray,
    boxes: list[tuple[int, int, int, int]],
    rng: np.random.Generator,
) -> tuple[slice, slice] | None:
    """Find a window [h, w] whose ink touches none and whose box hardly overlaps the others."""
    (h, w), (height, width) = alpha.shape, inked.shape
    inner_x, inner_y, inner_w, inner_h = _box(alpha >= 0.5)
    for _ in range(PLACEMENTS):
        y, x = rng.integers(height - h, endpoint=True), rng.integers(width - w, endpoint=True)
        window = np.s_[y : y + h, x : x + w]
        box = (x + inner_x, y + inner_y, inner_w, inner_h)
        if not (inked[window] & (alpha > 0)).any() and all(_iou(box, b) < MAX_IOU for b in boxes):
            return window
    return None


def _iou(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> float:
    """Return the intersection over union of two boxes (x, y, width, height)."""
    w = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    h = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    common = max(w, 0) * max(h, 0)
    return common / (a[2] * a[3] + b[2] * b[3] - common)


def _colour(image: np.ndarray, window: tuple[slice, slice], rng: np.random.Generator) -> np.ndarray:
    """Return a random colour [3] float32 that is readable on a window's surroundings."""
    rows, columns = window
    margin = (rows.stop - rows.start) // 8 + 1
    around = image[
        max(rows.start - margin, 0) : rows.stop + margin,
        max(columns.start - margin, 0) : columns.stop + margin,
    ]
    hsv = rng.uniform((0, 0.4, 0.1), (360, 1, 1), (COLOURS, 3)).astype(np.float32)
    colours = cv2.cvtColor(hsv[None], cv2.COLOR_HSV2RGB)
    # Lightness carries the legibility of strokes, hue less. The quantile lets a few pixels of a
    # busy photograph come close to the digit's colour.
    weights = np.array([1, CHROMA, CHROMA], dtype=np.float32)
    paint = cv2.cvtColor(colours, cv2.COLOR_RGB2LAB)[0] * weights
    under = cv2.cvtColor(around[::2, ::2].astype(np.float32) / 255, cv2.COLOR_RGB2LAB) * weights
    distance = np.linalg.norm(paint[:, None] - under.reshape(1, -1, 3), axis=2)
    contrast = np.quantile(distance, 0.2, axis=1)
    enough = np.flatnonzero(contrast >= CONTRAST)
    # The first that will do, not the best: the best would always be near black or white.
    return colours[0, enough[0] if len(enough) else contrast.argmax()] * 255
