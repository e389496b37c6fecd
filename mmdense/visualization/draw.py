"""Draw predictions and ground truth on images, with NumPy and Pillow only.

Images and drawings are uint8 arrays [H, W, 3] in RGB; images are not modified. A palette holds one
colour per class: (R, G, B), each from 0 to 255.
"""

import colorsys
import functools
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, ...]

LUMA = (0.299, 0.587, 0.114)  # perceived brightness of red, green and blue
MASK_ALPHA, LABEL_MAP_ALPHA = 0.45, 0.55  # opacity of the classes' colours
GRID = 128  # the widest part of a segment is looked for at this resolution


def draw_instances(
    image: np.ndarray,
    instances: Mapping[str, np.ndarray],
    classes: Sequence[str],
    palette: Sequence[Colour],
) -> np.ndarray:
    """Draw the boxes of instances with their classes, and their masks if they have any.

    Instances have ``bboxes`` [N, 4] as x1, y1, x2, y2 in pixels, ``labels`` [N] and optionally
    ``masks`` [N, H, W]. Predictions have ``scores`` [N]: the best ones are drawn last. Ground truth
    has none: its outlines are dashed.
    """
    image = image.copy()
    width = 1 + round(min(image.shape[:2]) / 250)
    boxes, labels, scores = (instances.get(key) for key in ('bboxes', 'labels', 'scores'))
    boxes = boxes.round().astype(int)
    dash = 4 * width if scores is None else 0
    order = range(len(labels)) if scores is None else np.argsort(scores, kind='stable')
    for i in order if 'masks' in instances else ():
        mask, colour = instances['masks'][i].astype(bool), palette[labels[i]]
        if box := Image.fromarray(mask).getbbox():
            part = np.s_[box[1] : box[3], box[0] : box[2]]
            view, mask = image[part], mask[part]
            inside = mask
            view[mask] = view[mask] * (1 - MASK_ALPHA) + np.array(colour) * MASK_ALPHA
            for _ in range(width):
                inside = _erode(inside)
            _draw_outline(view, mask & ~inside, colour, dash)
    limits = np.tile(image.shape[1::-1], 2) - 1
    for i in order:
        x1, y1, x2, y2 = (boxes[i] + np.array([-1, -1, 1, 1]) * (width // 2)).clip(0, limits)
        view = image[y1 : y2 + 1, x1 : x2 + 1]
        outline = np.ones(view.shape[:2], bool)
        outline[width:-width, width:-width] = False
        _draw_outline(view, outline, palette[labels[i]], dash)
    labelled = _Labels(image)
    for i in order:
        text = classes[labels[i]] if scores is None else f'{classes[labels[i]]} {scores[i]:.2f}'
        x1, y1, _, y2 = boxes[i].tolist()
        top = y1 - labelled.height
        if top < 0 and y2 - y1 < 2 * labelled.height:  # it would hide a small object
            top = y2 + 1
        labelled.write(text, (x1 - width // 2, top), palette[labels[i]])
    return np.array(labelled.image)


def draw_label_map(
    image: np.ndarray, label_map: np.ndarray, classes: Sequence[str], palette: Sequence[Colour]
) -> np.ndarray:
    """Draw a segmentation over an image, with the class names of its larger segments.

    Where ``label_map`` [H, W] has no class, such as 255 for unknown ground truth, the image shows.
    """
    known = label_map < len(classes)
    colours = np.array(palette, np.uint8)[np.where(known, label_map, 0)]
    layers = (Image.fromarray(x) for x in (image, np.where(known[..., None], colours, image)))
    labelled = _Labels(np.asarray(Image.blend(*layers, LABEL_MAP_ALPHA)))
    step = -(-max(label_map.shape) // GRID)
    reduced = label_map[step // 2 :: step, step // 2 :: step]
    for label in np.unique(reduced[reduced < len(classes)]).tolist():
        # The label goes where the segment is widest, to cover as little else as possible.
        inside, depth = reduced == label, 0
        while (smaller := _erode(inside)).any():
            inside, depth = smaller, depth + 1
        if depth * step >= labelled.height:
            centres = np.argwhere(inside)[:, ::-1] * step
            centre = centres[len(centres) // 2]
            labelled.write(classes[label], centre, palette[label], shift=-0.5)
    return np.array(labelled.image)


def make_palette(count: int) -> list[Colour]:
    """Return distinct colours: hues in steps of the golden ratio, in three brightnesses."""
    values = (255, 200, 150)
    colours = (colorsys.hsv_to_rgb(i * 0.618034 % 1, 0.78, values[i % 3]) for i in range(count))
    return [tuple(map(round, colour)) for colour in colours]


def _erode(mask: np.ndarray) -> np.ndarray:
    """Return the pixels whose four neighbours are in the mask too; outside the image none is."""
    wide, high = np.pad(mask, ((0, 0), (1, 1))), np.pad(mask, ((1, 1), (0, 0)))
    return mask & high[:-2] & high[2:] & wide[:, :-2] & wide[:, 2:]


def _draw_outline(view: np.ndarray, outline: np.ndarray, colour: Colour, dash: int) -> None:
    """Colour the pixels of an outline in a part of the image, in dashes of this length if any."""
    if dash:
        y, x = np.ogrid[: view.shape[0], : view.shape[1]]
        outline = outline & ((x + y) // dash % 2 == 0)
    view[outline] = colour


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Return DejaVu Sans of matplotlib or the system, or else Pillow's font of few letters."""
    matplotlib = find_spec('matplotlib')
    folder = Path(matplotlib.origin).parent / 'mpl-data/fonts/ttf' if matplotlib else Path()
    with suppress(OSError):
        return ImageFont.truetype(str(folder / 'DejaVuSans.ttf'), size)
    return ImageFont.load_default(size)


class _Labels:
    """Writes text on coloured labels into an image."""

    def __init__(self, image: np.ndarray) -> None:
        self.image = Image.fromarray(image)
        size = max(9, round(min(self.image.size) / 40))
        self._draw, self._font = ImageDraw.Draw(self.image), _font(size)
        self._padding = max(1, size // 8)
        self.height = sum(self._font.getmetrics()) + self._padding

    def write(self, text: str, position: Sequence[int], colour: Colour, shift: float = 0) -> None:
        """Write a label of this colour, moved into the image where it would stick out.

        ``position`` is x, y of the upper left corner, plus a ``shift`` in sizes of the label.
        """
        size = np.array([int(self._font.getlength(text)) + 2 * self._padding, self.height])
        corner = np.add(position, size * shift).astype(int)
        corner = corner.clip(0, np.maximum(0, self.image.size - size))
        self._draw.rectangle([*corner, *(corner + size - 1)], fill=colour)
        ink = (0, 0, 0) if np.dot(colour, LUMA) > 0.4 * 255 else (255, 255, 255)
        self._draw.text((corner[0] + self._padding, corner[1]), text, fill=ink, font=self._font)
