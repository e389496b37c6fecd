"""Draw predictions and ground truth on images, with NumPy, OpenCV and Pillow only.

Images and drawings are uint8 arrays [H, W, 3] in RGB; images are not modified. A palette holds one
colour per class: (R, G, B), each from 0 to 255.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import cv2
import numpy as np
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, ...]

LUMA = (0.299, 0.587, 0.114)  # perceived brightness of red, green and blue
MASK_ALPHA, LABEL_MAP_ALPHA = 0.45, 0.55  # opacity of the classes' colours
MIN_LABELLED_AREA = 0.005  # smallest segment that gets a label, as a share of the image


def draw_instances(
    image: np.ndarray,
    instances: Mapping[str, np.ndarray],
    classes: Sequence[str],
    palette: Sequence[Colour],
) -> np.ndarray:
    """Draw the boxes of instances with their classes, and their masks if they have any.

    Predictions have scores: the best ones are drawn last. Ground truth has none: its outlines are
    dashed.

    Args:
        image: The image, [H, W, 3].
        instances: ``bboxes`` [N, 4] as x1, y1, x2, y2 in pixels, ``labels`` [N]; for predictions
            ``scores`` [N]; optionally ``masks`` [N, H, W].
    """
    image = image.copy()
    line_width = max(1, round(min(image.shape[:2]) / 250))
    boxes, labels, scores = (instances.get(key) for key in ('bboxes', 'labels', 'scores'))
    boxes = boxes.round().astype(np.int32)
    dashed = scores is None
    order = range(len(labels)) if scores is None else np.argsort(scores, kind='stable')
    for i in order if 'masks' in instances else ():
        mask, colour = instances['masks'][i].astype(bool), palette[labels[i]]
        blend = image[mask] * (1 - MASK_ALPHA) + np.array(colour) * MASK_ALPHA
        image[mask] = blend.astype(np.uint8)
        contours, _ = cv2.findContours(
            mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE
        )
        for contour in contours:
            _draw_outline(image, contour[:, 0], colour, line_width, dashed)
    for i in order:
        x1, y1, x2, y2 = boxes[i]
        corners = np.array([(x1, y1), (x2, y1), (x2, y2), (x1, y2)])
        _draw_outline(image, corners, palette[labels[i]], line_width, dashed)
    writer = _LabelWriter(image)
    for i in order:
        text = classes[labels[i]] if scores is None else f'{classes[labels[i]]} {scores[i]:.2f}'
        x1, y1, _, y2 = boxes[i].tolist()
        top = y1 - writer.height
        if top < 0 and y2 - y1 < 2 * writer.height:  # it would hide a small object
            top = y2 + 1
        writer.write(text, x1 - line_width // 2, top, palette[labels[i]])
    return writer.image()


def draw_label_map(
    image: np.ndarray, label_map: np.ndarray, classes: Sequence[str], palette: Sequence[Colour]
) -> np.ndarray:
    """Draw a segmentation over an image, with the class names of its larger segments.

    Args:
        image: The image, [H, W, 3].
        label_map: The class of each pixel, [H, W]. Others, such as 255 where the ground truth is
            unknown, show the image.
    """
    known = label_map < len(classes)
    colours = np.array(palette, np.uint8)[np.where(known, label_map, 0)]
    blend = cv2.addWeighted(image, 1 - LABEL_MAP_ALPHA, colours, LABEL_MAP_ALPHA, 0)
    writer = _LabelWriter(np.where(known[..., None], blend, image))
    for label in np.unique(label_map[known]).tolist():
        mask = (label_map == label).astype(np.uint8)
        _, segments, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
        largest = 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())
        if stats[largest, cv2.CC_STAT_AREA] < MIN_LABELLED_AREA * label_map.size:
            continue
        # The label goes where the segment is widest, to cover as little else as possible.
        inside = np.pad((segments == largest).astype(np.uint8), 1)
        distance = cv2.distanceTransform(inside, cv2.DIST_L2, 3)
        y, x = np.unravel_index(distance.argmax(), distance.shape)
        left = int(x) - 1 - writer.width(classes[label]) // 2
        writer.write(classes[label], left, int(y) - 1 - writer.height // 2, palette[label])
    return writer.image()


def make_palette(count: int) -> list[Colour]:
    """Return distinct colours: hues in steps of the golden ratio, in three brightnesses."""
    hues = np.arange(count) * 0.618034 % 1 * 180
    values = np.take([255, 200, 150], np.arange(count) % 3)
    hsv = np.stack([hues, np.full(count, 200), values], -1).astype(np.uint8)
    colours = cv2.cvtColor(hsv[None], cv2.COLOR_HSV2RGB)[0] if count else []
    return [tuple(map(int, colour)) for colour in colours]


def _draw_outline(
    image: np.ndarray, corners: np.ndarray, colour: Colour, width: int, dashed: bool
) -> None:
    """Draw a closed polygon, given by its corners [K, 2] as x, y."""
    lines = [corners]
    if dashed:
        closed = np.concatenate([corners, corners[:1]])
        position = np.concatenate([[0], np.abs(np.diff(closed, axis=0)).max(1).cumsum()])
        pixels = np.arange(position[-1] + 1)
        x, y = (np.interp(pixels, position, side).round().astype(np.int32) for side in closed.T)
        dash = 4 * width
        lines = np.split(np.stack([x, y], 1), range(dash, len(pixels), dash))[::2]
    cv2.polylines(image, lines, not dashed, colour, width)


class _LabelWriter:
    """Text on coloured labels, in matplotlib's font: OpenCV's has ASCII letters only."""

    def __init__(self, image: np.ndarray) -> None:
        self._image = Image.fromarray(image)
        self._draw = ImageDraw.Draw(self._image)
        size = max(9, round(min(image.shape[:2]) / 40))
        self._font = ImageFont.truetype(f'{get_data_path()}/fonts/ttf/DejaVuSans.ttf', size)
        self._padding = max(1, size // 8)
        self.height = sum(self._font.getmetrics()) + self._padding

    def width(self, text: str) -> int:
        return int(self._font.getlength(text)) + 2 * self._padding

    def write(self, text: str, left: int, top: int, colour: Colour) -> None:
        """Write a label of this colour, moved into the image where it would stick out."""
        width, height = self._image.size
        left = max(0, min(left, width - self.width(text)))
        top = max(0, min(top, height - self.height))
        corner = (left + self.width(text) - 1, top + self.height - 1)
        self._draw.rectangle(((left, top), corner), fill=colour)
        bright = np.dot(colour, LUMA) > 0.4 * 255
        ink = (0, 0, 0) if bright else (255, 255, 255)
        self._draw.text((left + self._padding, top), text, fill=ink, font=self._font)

    def image(self) -> np.ndarray:
        return np.array(self._image)
