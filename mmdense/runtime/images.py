"""Images for exported models: finding, reading, resizing, with the pixels of mmcv and OpenCV.

Shapes: H, W = height and width of an image in pixels, upright (EXIF orientation is applied).
"""

import os
import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps

from mmdense.errors import UserError, one_line
from mmdense.files import IMAGE_FORMATS, ends_in_zeros, relative_paths

IMAGE_SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.pgm', '.png', '.ppm', '.tif', '.tiff', '.webp')
PICTURE_SUFFIXES = ('.jpeg', '.jpg', '.png', '.webp')  # compressed, and shown by every viewer
PICTURES, LABEL_MAPS = 'pictures', 'label_maps'

ImageSource = str | Path | np.ndarray  # a file, or uint8 [H, W, 3]


def read_image(source: ImageSource) -> np.ndarray:
    """Return an image, uint8 [H, W, 3] in RGB, with the pixels of mmcv.

    16-bit images are read as their upper 8 bits, grey becomes colour, transparency is dropped.
    CMYK, and 16-bit colour in TIFF and PPM, differ from mmcv's by up to 2 of 255. UserError if a
    file is missing, damaged or not an image, or an array not uint8 [H, W, 3].
    """
    if isinstance(source, np.ndarray):
        return check_pixels(source, 'RGB')
    reason = 'no such image' if not os.path.isfile(source) else 'not an image that can be read'
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # about large images and odd metadata
        try:
            if not os.path.getsize(source):
                reason = 'empty file'
            with Image.open(source, formats=IMAGE_FORMATS) as image:
                reason = ''
                image.load()
                if image.format == 'JPEG' and ends_in_zeros(source):
                    raise OSError('zeros in place of its end')
                image = ImageOps.exif_transpose(image)
                if image.mode.startswith('I'):  # 16 bits of grey
                    image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
                return np.asarray(image.convert('RGB'))
        except Exception as error:  # each of Pillow's formats raises its own
            if not reason or isinstance(error, Image.DecompressionBombError):
                reason = f'damaged ({one_line(error)})'
            raise UserError(f'{source}: {reason}') from error


def check_pixels(image: np.ndarray, order: str) -> np.ndarray:
    """Return an array; raise UserError if it is not uint8 [H, W, 3], with channels in ``order``."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        shape = ', '.join(map(str, image.shape))
        raise UserError(f'an image must be uint8 [H, W, 3] in {order}, not {image.dtype} [{shape}]')
    return image


def scaled_size(
    height: int, width: int, scale: Any, keep_ratio: bool = False, edge: str = ''
) -> tuple[int, int]:
    """Return the (height, width) that mmcv's Resize gives an image; ``scale`` is (w, h).

    With ``edge``, 'short', 'long', 'width' or 'height', mmpretrain's ResizeEdge; ``scale`` is that
    edge's length.
    """
    if edge:
        side = dict(height=height, width=width, short=min(height, width), long=max(height, width))
        return int(scale * height / side[edge]), int(scale * width / side[edge])
    if not keep_ratio:
        return scale[1], scale[0]
    factor = min(max(scale) / max(height, width), min(scale) / min(height, width))
    return int(height * factor + 0.5), int(width * factor + 0.5)


def positions(length: int, target: int, align_corners: bool = False) -> np.ndarray:
    """Return where linear interpolation to ``target`` pixels reads in ``length``, float32."""
    if align_corners:
        return np.linspace(0, length - 1, target, dtype=np.float32)
    return ((np.arange(target) + 0.5) * (1 / (target / length)) - 0.5).astype(np.float32)


def interpolate(values: np.ndarray, y: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Return values [..., H, W] at rows ``y`` and columns ``x``, bilinear; borders continue."""
    for axis, position in ((-2, y[:, None]), (-1, x)):
        last = values.shape[axis] - 1
        position = position.clip(0, last)
        before = position.astype(int)
        weight = (position - before).astype(np.float32)
        low = values.take(before.ravel(), axis)
        values = low + (values.take((before + 1).clip(0, last).ravel(), axis) - low) * weight
    return values


def resize(image: np.ndarray, size: tuple[int, int], pillow: str = '') -> np.ndarray:
    """Resize uint8 [H, W, 3] to (height, width): the same pixels as OpenCV's INTER_LINEAR.

    In its fixed point: weights of 11 bits, horizontal sums without their lowest 4 bits. With
    ``pillow``, such as 'bicubic', by Pillow.
    """
    if pillow:
        method = Image.Resampling[pillow.upper()]
        return np.asarray(Image.fromarray(image).resize(size[::-1], method))
    (height, width), (y, x) = image.shape[:2], map(positions, image.shape[:2], size)
    if (height, width) == size:
        return image
    above, left = (np.floor(p).astype(int) for p in (y, x))
    y, x = y - above, np.where((left < 0) | (left >= width - 1), 0, x - left)
    y0, y1, x0, x1 = (np.rint(w * 2048).astype(np.int32)[:, None] for w in (1 - y, y, 1 - x, x))
    rows, lines = np.unique(np.stack([above, above + 1]).clip(0, height - 1), return_inverse=True)
    left, right = (columns.clip(0, width - 1) for columns in (left, left + 1))
    image = image[rows]
    image = (image.take(left, 1) * x0 + image.take(right, 1) * x1) >> 4
    above, below = image[lines.reshape(2, -1)]
    result = (y0[:, None] * above >> 16) + (y1[:, None] * below >> 16)
    return (result + 2 >> 2).astype(np.uint8)


def crop_center(image: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Return the centre of an image, at most ``size`` (w, h), as mmcv's CenterCrop."""
    sides = zip(image.shape, size[::-1], strict=False)
    starts = [max(0, round((side - target) / 2)) for side, target in sides]
    return image[tuple(slice(a, a + n) for a, n in zip(starts, size[::-1], strict=True))]


def find_images(sources: Sequence[str | Path], out: str | Path) -> dict[Path, Path]:
    """Find images, and name the pictures of their predictions.

    A file is taken whatever its suffix. Folders are searched recursively for image suffixes, also
    through links, in sorted order, without hidden files and what :func:`.save_predictions` writes
    to ``out``.

    Returns image -> picture. Pictures have the same paths below ``OUT/pictures`` as the images
    below their deepest common folder; .png is appended to suffixes other than JPEG, PNG and WebP.
    UserError if a file or folder does not exist, a folder has no image, or a picture would
    overwrite an image.
    """
    pictures = Path(out, PICTURES)
    written = {os.path.realpath(Path(out, name)) for name in (PICTURES, LABEL_MAPS)}
    images: dict[str, Path] = {}  # by absolute path: each once
    for source in map(Path, sources):
        if source.is_dir():
            files = sorted(_find_in_folder(source, written))
            if not files:
                suffixes = ' '.join(IMAGE_SUFFIXES)
                raise UserError(f'no image found in {source} (suffixes: {suffixes})')
        elif source.exists():
            files = [source]
        else:
            raise UserError(f'no image or folder {source}')
        images |= {os.path.abspath(file): file for file in files}
    real = {os.path.realpath(path) for path in images}
    targets: dict[Path, Path] = {}
    for path, name in relative_paths(images).items():
        file, target = images[path], pictures / name
        if target.suffix.lower() not in PICTURE_SUFFIXES:
            target = target.with_name(f'{target.name}.png')
        while target in targets.values():  # x.bmp and x.bmp.png
            target = target.with_stem(f'{target.stem}_')
        if os.path.realpath(target) in real:
            raise UserError(f'{file} would be overwritten by its picture: choose another folder')
        targets[file] = target
    return targets


def _find_in_folder(source: Path, skipped: Iterable[str]) -> Iterator[Path]:
    visited = set(skipped)
    for folder, children, names in os.walk(source, followlinks=True):
        path = os.path.realpath(folder)
        children[:] = [child for child in children if path not in visited and child[0] != '.']
        for name in names if path not in visited else ():
            file = Path(folder, name)
            if file.suffix.lower() in IMAGE_SUFFIXES and name[0] != '.' and file.is_file():
                yield file
        visited.add(path)  # a link may point to a folder above it
