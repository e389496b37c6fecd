"""Drawing predictions on images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import cv2
import numpy as np
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

LUMA = (0.299, 0.587, 0.114)  # how bright red, green and blue look
INSTANCE_ALPHA, SEGMENT_ALPHA = 0.45, 0.55  # opacity of colours on the image
LABELLED = 0.005  # share of the image that a patch of a label map needs to be named


# Drawing


def draw_instances(
    picture: np.ndarray,
    found: Mapping[str, np.ndarray],
    classes: Sequence[str],
    palette: Sequence[tuple[int, ...]],
) -> np.ndarray:
    width = max(1, round(min(picture.shape[:2]) / 250))
    order = np.argsort(found['scores'], kind='stable')
    for i in order if 'masks' in found else ():
        mask, colour = found['masks'][i].astype(bool), palette[found['labels'][i]]
        _blend(picture, mask, colour, INSTANCE_ALPHA)
        outlines, _ = cv2.findContours(
            mask.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE
        )
        cv2.drawContours(picture, outlines, -1, colour, width, cv2.LINE_AA)
    for i in order:
        x1, y1, x2, y2 = found['bboxes'][i].round().astype(int).tolist()
        cv2.rectangle(picture, (x1, y1), (x2, y2), palette[found['labels'][i]], width)
    writing = _Writing(picture)
    for i in order:
        label, (x1, y1) = found['labels'][i], found['bboxes'][i][:2].round().astype(int).tolist()
        text = f'{classes[label]} {found["scores"][i]:.2f}'
        writing.put(text, x1 - width // 2, y1 - writing.height, palette[label])
    return writing.picture()


def draw_segments(
    picture: np.ndarray,
    labels: np.ndarray,
    classes: Sequence[str],
    palette: Sequence[tuple[int, ...]],
) -> np.ndarray:
    colours = np.array(palette, np.uint8)[labels]
    picture = cv2.addWeighted(picture, 1 - SEGMENT_ALPHA, colours, SEGMENT_ALPHA, 0)
    writing = _Writing(picture)
    for label in np.unique(labels).tolist():
        mask = (labels == label).astype(np.uint8)
        _, patches, stats, _ = cv2.connectedComponentsWithStats(mask, connectivity=8)
        largest = 1 + int(stats[1:, cv2.CC_STAT_AREA].argmax())
        if stats[largest, cv2.CC_STAT_AREA] < LABELLED * labels.size:
            continue
        # The name stands where the patch is widest, so that it covers as little else as can be.
        inside = cv2.copyMakeBorder(
            (patches == largest).astype(np.uint8), 1, 1, 1, 1, cv2.BORDER_CONSTANT
        )
        depth = cv2.distanceTransform(inside, cv2.DIST_L2, 3)
        y, x = np.unravel_index(depth.argmax(), depth.shape)
        text = classes[label]
        left = int(x) - 1 - writing.width(text) // 2
        writing.put(text, left, int(y) - 1 - writing.height // 2, palette[label])
    return writing.picture()


def _blend(picture: np.ndarray, mask: np.ndarray, colour: tuple[int, ...], alpha: float) -> None:
    picture[mask] = (picture[mask] * (1 - alpha) + np.array(colour) * alpha).astype(np.uint8)


class _Writing:
    """Text on patches of colour, in matplotlib's own font: OpenCV has no letters beyond ASCII."""

    def __init__(self, picture: np.ndarray) -> None:
        self._image = Image.fromarray(picture)
        self._draw = ImageDraw.Draw(self._image)
        size = max(9, round(min(picture.shape[:2]) / 40))
        self._font = ImageFont.truetype(f'{get_data_path()}/fonts/ttf/DejaVuSans.ttf', size)
        self._pad = max(1, size // 8)
        self.height = sum(self._font.getmetrics()) + self._pad

    def width(self, text: str) -> int:
        return int(self._font.getlength(text)) + 2 * self._pad

    def put(self, text: str, left: int, top: int, colour: tuple[int, ...]) -> None:
        """Write on a patch of this colour, inside the picture."""
        width, height = self._image.size
        left = max(0, min(left, width - self.width(text)))
        top = max(0, min(top, height - self.height))
        corner = (left + self.width(text) - 1, top + self.height - 1)
        self._draw.rectangle(((left, top), corner), fill=colour)
        bright = np.dot(colour, LUMA) > 0.4 * 255
        ink = (0, 0, 0) if bright else (255, 255, 255)
        self._draw.text((left + self._pad, top), text, fill=ink, font=self._font)

    def picture(self) -> np.ndarray:
        return np.array(self._image)
