"""The demo dataset: handwritten digits on photographs, for detection and segmentation.

The digits are the 1797 scans of 8 x 8 pixels that scikit-learn bundles (UCI ML hand-written digits,
https://archive.ics.uci.edu/dataset/80), the photographs are its two sample images, so nothing is
downloaded. Files::

    OUT/train/000000.jpg ...                    OUT/val/000000.jpg ...
    OUT/annotations/instances_train.json        OUT/annotations/instances_val.json    (COCO)
    OUT/semantic/train/000000.png ...           OUT/semantic/val/000000.png ...       (mmseg)
    OUT/foreground/train/000000.png ...         OUT/foreground/val/000000.png ...     (mmseg)
    OUT/demo.json                               version and arguments that the folder was made with

Shapes: S = side of an image, [h, w] = window of a digit, in pixels. Images are RGB.
"""

import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from pycocotools import mask as coco_mask

# Category d + 1 of the COCO files and label d + 1 of the label maps is digit d; label 1 of the
# foreground maps is any digit.
CLASSES = ('0', '1', '2', '3', '4', '5', '6', '7', '8', '9')

SPLITS = ('train', 'val')
MARKER = 'demo.json'
GENERATOR = 'mmdense.datasets.make_digits'
VERSION = 3  # raise it when the same arguments give other files, to replace older folders

MIN_SIZE = 64
VAL_SHARE = 0.2  # of each class's scans, which only validation images show
COUNT = (2, 6)  # digits per image
HEIGHT = (22 / 192, 60 / 192)  # of a scan's 8 rows, relative to the image
ASPECT = (0.85, 1.18)
ANGLE = (-14, 14)  # degrees
CROP = (0.3, 1.0)  # side of the background crop, relative to the photograph's shorter side
PLACEMENTS = 100  # attempts per digit, before it is left out
COLOURS = 32  # candidates per digit
CONTRAST = 33  # CIELAB distance to most pixels around a digit


class DigitsData(NamedTuple):
    """Result of :func:`make_digits`."""

    root: Path
    made: bool  # False if the folder was up to date
    images: dict[str, int]  # number of images by split
    instances: dict[str, int]  # number of digits by split


def make_digits(
    out: str | os.PathLike,
    *,
    train: int = 800,
    val: int = 200,
    size: int = 192,
    seed: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> DigitsData:
    """Write the demo dataset, or leave the folder alone if it is up to date.

    The same arguments give the same bytes. Image i depends on ``size`` and ``seed`` only, not on
    the number of images, and no scan is in both splits. A folder made with other arguments is
    replaced once the new one is complete. ``train`` and ``val`` are numbers of images, ``size`` is
    their side in pixels, at least 64; ``progress`` is called with (images done, images in total).

    ValueError if an argument is out of range, FileExistsError if ``out`` holds files that this
    function did not write, ModuleNotFoundError if scikit-learn is missing.
    """
    arguments = dict(train=train, val=val, size=size, seed=seed)
    for name, least in dict(train=1, val=1, size=MIN_SIZE, seed=0).items():
        if arguments[name] < least:
            raise ValueError(f'{name} must be at least {least}, got {arguments[name]}')
    # Follow a link to another disk, so that the rename stays within one file system.
    root = Path(out).resolve()
    counts = dict(train=train, val=val)
    marker = _read_marker(root)
    if (marker.get('version'), marker.get('arguments')) == (VERSION, arguments):
        files = sum(path.is_file() for path in root.rglob('*'))
        if files == 3 * (train + val) + 3:  # none was deleted since
            return DigitsData(root, False, counts, marker['instances'])

    sources = _load_sources()
    parts = _split_scans(sources.digits, seed)
    done, instances = 0, {}
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'.{root.name}-', dir=root.parent) as scratch:
        new = Path(scratch, 'new')
        (new / 'annotations').mkdir(parents=True)
        for split_index, split in enumerate(SPLITS):
            coco = dict(images=[], annotations=[], categories=[])
            coco['categories'] = [dict(id=i, name=name) for i, name in enumerate(CLASSES, 1)]
            for folder in ('', 'semantic', 'foreground'):
                (new / folder / split).mkdir(parents=True)
            for i in range(counts[split]):
                key = np.random.SeedSequence(seed, spawn_key=(split_index, i))
                scene = _draw_scene(sources, parts[split], size, np.random.default_rng(key))
                _write_scene(new, split, i, *scene, coco)
                done += 1
                progress(done, train + val)
            (new / f'annotations/instances_{split}.json').write_text(json.dumps(coco))
            instances[split] = len(coco['annotations'])
        marker = dict(generator=GENERATOR, version=VERSION, arguments=arguments)
        (new / MARKER).write_text(json.dumps(dict(marker, instances=instances), indent=2))
        _read_marker(root)  # again: files may have appeared in the meantime
        if root.exists():
            root.rename(Path(scratch, 'old'))
        new.rename(root)
    return DigitsData(root, True, counts, instances)


def _read_marker(root: Path) -> dict:
    """Return the marker of a folder that :func:`make_digits` wrote; empty for an empty folder."""
    fix = 'choose another folder, or remove this one first'
    if root.exists() and not root.is_dir():
        raise FileExistsError(f'{root} is not a folder: {fix}')
    names = {path.name for path in root.glob('*')}
    if not names:
        return {}
    try:
        marker = json.loads((root / MARKER).read_text())
        known = marker['generator'] == GENERATOR
    except (OSError, ValueError, TypeError, KeyError):
        known = False
    foreign = names - {*SPLITS, 'semantic', 'foreground', 'annotations', MARKER}
    if not known or foreign:
        listed = f' ({", ".join(sorted(foreign)[:3])})' if foreign else ''
        raise FileExistsError(f'{root} has files not made by this tool{listed}: {fix}')
    return marker


class _Sources(NamedTuple):
    scans: np.ndarray  # [1797, 8, 8] float32, ink in 0..1
    digits: np.ndarray  # [1797] int
    photos: list[np.ndarray]  # [H, W, 3] uint8


def _load_sources() -> _Sources:
    try:
        from sklearn.datasets import load_digits, load_sample_images
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the demo dataset needs scikit-learn: pip install 'mmdense[demo]'"
        ) from error
    data = load_digits()
    scans = (data.images / 16).astype(np.float32)
    return _Sources(scans, data.target, load_sample_images().images)


def _split_scans(digits: np.ndarray, seed: int) -> dict[str, np.ndarray]:
    """Split the scans' indices by class."""
    rng = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(len(SPLITS),)))
    parts = dict(train=[], val=[])
    for digit in range(len(CLASSES)):
        indices = rng.permutation(np.flatnonzero(digits == digit))
        count = round(VAL_SHARE * len(indices))
        parts['val'].append(indices[:count])
        parts['train'].append(indices[count:])
    return {split: np.concatenate(indices) for split, indices in parts.items()}


def _draw_scene(
    sources: _Sources, scans: np.ndarray, size: int, rng: np.random.Generator
) -> tuple[np.ndarray, list[tuple[int, int, np.ndarray]]]:
    """Draw some scans, given by their indices.

    Returns the image [S, S, 3] uint8 and of each object digit, scan and mask [S, S] uint8.
    """
    image = _crop_background(sources.photos, size, rng)
    occupied = np.zeros((size, size), dtype=bool)
    objects = []
    for scan in rng.choice(scans, rng.integers(*COUNT, endpoint=True), replace=False):
        alpha = _draw_digit(
            sources.scans[scan],
            height=size * rng.uniform(*HEIGHT),
            aspect=rng.uniform(*ASPECT),
            angle=rng.uniform(*ANGLE),
        )
        for _ in range(PLACEMENTS):
            y, x = (rng.integers(size - n, endpoint=True) for n in alpha.shape)
            window = np.s_[y : y + alpha.shape[0], x : x + alpha.shape[1]]
            if not occupied[window].any():
                break
        else:
            continue
        occupied[window] = True
        patch = image[window]
        colour = _pick_colour(patch, rng)
        image[window] = np.rint(patch + alpha[..., None] * (colour - patch))
        mask = np.zeros((size, size), dtype=np.uint8)
        mask[window] = alpha >= 0.5
        objects.append((int(sources.digits[scan]), int(scan), mask))
    return image, objects


def _crop_background(photos: list[np.ndarray], size: int, rng: np.random.Generator) -> np.ndarray:
    """Return a random square crop of a photograph [S, S, 3], mirrored half of the time."""
    photo = photos[rng.integers(len(photos))]
    height, width = photo.shape[:2]
    side = round(min(height, width) * np.exp(rng.uniform(*np.log(CROP))))
    y, x = rng.integers(height - side, endpoint=True), rng.integers(width - side, endpoint=True)
    crop = photo[y : y + side, x : x + side, :]
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    method = cv2.INTER_AREA if side > size else cv2.INTER_CUBIC
    return cv2.resize(np.ascontiguousarray(crop), (size, size), interpolation=method)


def _draw_digit(scan: np.ndarray, *, height: float, aspect: float, angle: float) -> np.ndarray:
    """Draw a scan [8, 8] as a smooth stroke: coverage [h, w] in 0..1, cropped to the ink.

    ``height`` is that of the scan's 8 rows in pixels, ``aspect`` is width over height at equal
    area, and ``angle`` is in degrees.
    """
    # Upscaled and thresholded, the outline is that of a pen. Sharpening opens the holes of 4, 6, 8
    # and 9, which are about one scan pixel wide.
    zoom, margin, supersampling = 8, 2, 4
    side = (len(scan) + 2 * margin) * zoom
    ink = cv2.resize(np.pad(scan, margin), (side, side), interpolation=cv2.INTER_CUBIC)
    smooth = cv2.GaussianBlur(ink, (0, 0), 0.32 * zoom)
    ink = smooth + 1.5 * (smooth - cv2.GaussianBlur(ink, (0, 0), zoom))

    # Threshold at four times the resolution, then average: an antialiased edge.
    scale = height / len(scan) / zoom * supersampling
    pixels = int(np.ceil(side * scale * max(aspect, 1 / aspect) ** 0.5 / supersampling))
    canvas = pixels * supersampling
    matrix = cv2.getRotationMatrix2D((0, 0), angle, scale)[:, :2] * [aspect**0.5, aspect**-0.5]
    shift = canvas / 2 - matrix @ [side / 2, side / 2]
    fine = cv2.warpAffine(ink, np.column_stack([matrix, shift]), (canvas, canvas)) > 0.5
    _, blobs, stats, _ = cv2.connectedComponentsWithStats(fine.astype(np.uint8))
    areas = stats[:, cv2.CC_STAT_AREA]
    kept = areas >= 0.04 * areas[1:].sum()  # smaller blobs are dirt of the scanner
    kept[0] = False
    fine = kept[blobs].astype(np.float32)
    alpha = cv2.resize(fine, (pixels, pixels), interpolation=cv2.INTER_AREA)
    x, y, w, h = cv2.boundingRect((alpha > 0).astype(np.uint8))
    return alpha[y : y + h, x : x + w]


def _pick_colour(patch: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Return a random colour [3] float32 that is readable on a patch [h, w, 3] uint8."""
    hsv = rng.uniform((0, 0.4, 0.1), (360, 1, 1), (1, COLOURS, 3)).astype(np.float32)
    colours = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)
    # Lightness makes strokes legible, hue less so.
    ink, paper = (
        cv2.cvtColor(pixels, cv2.COLOR_RGB2LAB).reshape(-1, 3) * (1, 0.4, 0.4)
        for pixels in (colours, patch[::2, ::2].astype(np.float32) / 255)
    )
    contrast = np.quantile(np.linalg.norm(ink[:, None] - paper, axis=2), 0.2, axis=1)
    enough = np.flatnonzero(contrast >= CONTRAST)
    # The first that is readable: the best would always be near black or white.
    return colours[0, enough[0] if len(enough) else contrast.argmax()] * 255


def _write_scene(
    root: Path, split: str, index: int, image: np.ndarray, objects: list[tuple], coco: dict
) -> None:
    """Write an image and its label maps, and append it to COCO's lists."""
    name, size = f'{index:06d}', len(image)
    labels = np.zeros((size, size), dtype=np.uint8)
    for digit, scan, mask in objects:
        labels[mask > 0] = digit + 1
        rle = coco_mask.encode(np.asfortranarray(mask))  # polygons cannot have holes
        coco['annotations'].append(
            dict(
                id=len(coco['annotations']) + 1,  # COCOeval takes a match with 0 for no match
                image_id=index,
                category_id=digit + 1,
                bbox=list(cv2.boundingRect(mask)),
                area=int(mask.sum()),
                iscrowd=0,
                segmentation=dict(size=[size, size], counts=rle['counts'].decode()),
                scan=scan,
            )
        )
    coco['images'].append(dict(id=index, file_name=f'{name}.jpg', width=size, height=size))
    for folder, suffix, pixels in (
        (split, '.jpg', cv2.cvtColor(image, cv2.COLOR_RGB2BGR)),
        (f'semantic/{split}', '.png', labels),
        (f'foreground/{split}', '.png', np.minimum(labels, 1)),
    ):
        (root / folder / f'{name}{suffix}').write_bytes(cv2.imencode(suffix, pixels)[1])
