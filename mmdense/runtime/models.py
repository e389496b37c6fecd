"""Detectors, segmentors and classifiers from a file: ``Detector('model.onnx')('image.jpg')``."""

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmdense.errors import UserError
from mmdense.runtime.images import crop_center, interpolate, positions, resize, scaled_size
from mmdense.runtime.results import BasePredictor, Prediction
from mmdense.runtime.session import Session

STRIP = 64  # rows of a segmentation that are resized at once, to save memory
Size = tuple[int, int]  # height, width


class OnnxPredictor(BasePredictor):
    """A model in an ONNX file that ``tools/export_onnx.py`` wrote.

    Calling it predicts on one or several images, files or uint8 [H, W, 3] in RGB, and returns a
    :data:`.Prediction` for each. ``batch`` images are read together; those of one size run as one
    batch. For the other arguments see :class:`.Session`, which may be given in place of the file.
    UserError if the file cannot be loaded, or is for another task.
    """

    tasks: tuple[str, ...] = ()

    def __init__(
        self,
        file: str | Path | Session,
        *,
        provider: str = 'cpu',
        threads: int | None = None,
        batch: int = 1,
    ) -> None:
        if not isinstance(file, Session):
            file = Session(file, provider=provider, threads=threads)
        self.session, self.metadata = file, file.metadata
        task = self.metadata['task']
        if task not in self.tasks:
            name = KINDS[task].__name__ if task in KINDS else 'Session'
            raise UserError(f'{file.file} is for {task}: load it by mmdense.runtime.{name}')
        self.batch = min(batch, file.shape[0] or batch)
        self.categories, self.settings = (
            self.metadata[k] for k in ('categories', 'postprocessing')
        )
        self.classes = tuple(self.metadata['classes'])
        self.palette = [tuple(colour) for colour in self.metadata['palette']]

    def _predict(self, read: Sequence[np.ndarray]) -> list[Prediction]:
        inputs, groups, results = [*map(self._resize, read)], {}, {}
        for i, image in enumerate(inputs):
            groups.setdefault(image.shape, []).append(i)
        for members in groups.values():
            images = np.stack([self._pad(inputs[i]) for i in members]).transpose(0, 3, 1, 2)
            outputs = self.run(images)
            for n, i in enumerate(members):
                output = {name: values[n] for name, values in outputs.items()}
                results[i] = self.finish(output, inputs[i].shape[:2], read[i].shape[:2])
        return [results[i] for i in range(len(read))]

    def _resize(self, image: np.ndarray) -> np.ndarray:
        size, rule = image.shape[:2], dict(self.metadata.get('resize') or {})
        pillow, crop = rule.pop('pillow', ''), self.metadata.get('crop')
        target = scaled_size(*size, **rule) if rule else size
        if not min(target):
            raise UserError(f'{size[0]} x {size[1]} pixels: too narrow to be resized')
        image = resize(image, target, pillow)
        return crop_center(image, crop) if crop else image

    def _pad(self, image: np.ndarray) -> np.ndarray:
        rule = self.metadata.get('pad')
        if not rule:
            return image
        sides = np.subtract(rule['size'][::-1], image.shape[:2]).clip(0)
        return np.pad(image, [(0, n) for n in (*sides, 0)], constant_values=round(rule['value']))

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        return self.session.run(images)

    def finish(self, output: dict[str, np.ndarray], size: Size, original: Size) -> Prediction:
        """Return the prediction in the original size from an image's outputs in the resized one."""
        raise NotImplementedError


class Detector(OnnxPredictor):
    """A detector, with masks if the model predicts them; see :class:`OnnxPredictor`."""

    tasks, segments = ('detection', 'instance segmentation'), False

    def finish(self, output: dict[str, np.ndarray], size: Size, original: Size) -> Prediction:
        found = {name: values[output['scores'] > 0] for name, values in output.items()}
        boxes = found.pop('boxes') / np.float32(np.divide(size, original)[[1, 0, 1, 0]])
        if 'masks' in found:
            threshold = self.settings['mask_thr']
            found['masks'] = paste_masks(found['masks'], boxes, original, threshold)
        return dict(bboxes=boxes, **found)


class Segmentor(OnnxPredictor):
    """A segmentor, on complete images or sliding windows; see :class:`OnnxPredictor`."""

    tasks, segments = ('semantic segmentation',), True

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        slide = self.settings.get('slide')
        if not slide:
            return self.session.run(images, ['logits'])
        total, count, starts = 0.0, np.zeros(images.shape[2:], np.float32), []
        crops = slide['crop_size']
        for side, crop, step in zip(images.shape[2:], crops, slide['stride'], strict=True):
            last = max(0, side - crop)
            starts.append([min(start, last) for start in range(0, last + step, step)])
        for y, x in itertools.product(*starts):
            window = np.s_[..., y : y + crops[0], x : x + crops[1]]
            logits = self.session.run(images[window], ['logits'])['logits']
            if not count.any():
                total = np.zeros((*logits.shape[:2], *count.shape), np.float32)
            total[window] += logits
            count[window] += 1
        return dict(logits=total / count)

    def finish(self, output: dict[str, np.ndarray], size: Size, original: Size) -> Prediction:
        logits = output['logits'][:, : size[0], : size[1]]  # without padding
        align = [self.settings.get('align_corners', False)] * 2
        y, x = map(positions, size, original, align)
        label_map, probabilities = np.empty(original, np.int64), np.empty(original, np.float32)
        for top in range(0, len(y), STRIP):
            rows = np.s_[top : top + STRIP]
            strip = interpolate(logits, y[rows], x)
            if len(strip) == 1:  # of two classes
                probability = 1 / (1 + np.exp(-strip[0]))
                label_map[rows] = positive = probability > self.settings['threshold']
                probabilities[rows] = np.where(positive, probability, 1 - probability)
            else:
                label_map[rows] = strip.argmax(0)
                probabilities[rows] = 1 / np.exp(strip - strip.max(0)).sum(0)
        return dict(label_map=label_map, probabilities=probabilities)


class Classifier(OnnxPredictor):
    """A classifier; see :class:`OnnxPredictor`.

    A prediction has all classes, the best first: ``labels`` [C], ``scores`` [C] and ``bboxes``
    [C, 4], each the complete image. Only the best is drawn and written.
    """

    tasks, segments, classifies = ('classification',), False, True

    def finish(self, output: dict[str, np.ndarray], size: Size, original: Size) -> Prediction:
        labels = (-output['scores']).argsort(kind='stable')
        boxes = np.broadcast_to([0, 0, *original[::-1]], (len(labels), 4))
        return dict(bboxes=boxes, labels=labels, scores=output['scores'][labels])

    def _arrays(self, prediction: Prediction) -> Prediction:
        return {name: values[:1] for name, values in prediction.items()}


def paste_masks(masks: np.ndarray, boxes: np.ndarray, size: Size, threshold: float) -> np.ndarray:
    """Paste masks into an image as mmdet's FCNMaskHead does: bool [N, H, W].

    ``masks`` [N, h, w] are probabilities inside the boxes, [N, 4] as x1, y1, x2, y2 in pixels. A
    pixel of the object has at least ``threshold``.
    """
    (height, width), (h, w) = size, masks.shape[1:]
    pasted = np.zeros((len(masks), height, width), bool)
    masks = np.pad(masks, ((0, 0), (1, 1), (1, 1)))
    for image, mask, (x1, y1, x2, y2) in zip(pasted, masks, boxes.tolist(), strict=True):
        if x2 > x1 and y2 > y1:
            rows = np.arange(max(0, int(y1) - 1), min(height, math.ceil(y2) + 1))
            columns = np.arange(max(0, int(x1) - 1), min(width, math.ceil(x2) + 1))
            y = ((rows + 0.5 - y1) / (y2 - y1) * h + 0.5).clip(0, h + 1)
            x = ((columns + 0.5 - x1) / (x2 - x1) * w + 0.5).clip(0, w + 1)
            image[rows[:, None], columns] = interpolate(mask, y, x) >= threshold
    return pasted


KINDS = {task: kind for kind in (Detector, Segmentor, Classifier) for task in kind.tasks}


def open_model(
    file: str | Path, *, provider: str = 'cpu', threads: int | None = None, batch: int = 1
) -> OnnxPredictor:
    """Return the predictor of a file's task; for the arguments see :class:`OnnxPredictor`."""
    session = Session(file, provider=provider, threads=threads)
    return KINDS.get(session.metadata['task'], Detector)(session, batch=batch)
