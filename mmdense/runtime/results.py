"""What becomes of predictions: pictures, results in COCO's format, files.

A prediction is a dict of arrays. Instances: ``bboxes`` [N, 4] as x1, y1, x2, y2 in pixels of the
upright image, ``scores`` [N], ``labels`` [N] and, if the model predicts them, ``masks`` [N, H, W].
A segmentation: ``label_map`` [H, W] and ``probabilities`` [H, W], of each pixel's class.
A classifier's prediction is one instance: the image.
"""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from pycocotools import mask as coco_mask

from mmdense.errors import UserError
from mmdense.files import atomic_write, change_suffix, check_writable, wrap_disk_errors
from mmdense.runtime.images import LABEL_MAPS, PICTURES, ImageSource, read_image
from mmdense.visualization.draw import draw_instances, draw_label_map

PREDICTIONS = 'predictions.json'

Prediction = Mapping[str, np.ndarray]


class BasePredictor:
    """A trained detector, segmentor or classifier, whatever runs it.

    A subclass sets the attributes, and overrides ``_read`` (an image source), ``_pixels`` (of what
    was read, as RGB), ``_predict`` (on several of what was read) and ``_arrays`` (of a prediction).

    Attributes:
        classes: Class names by label.
        palette: Class colours, RGB from 0 to 255.
        categories: COCO categories by label, ``dict(id=..., name=...)``.
        segments: Whether the model is a segmentor.
        classifies: Whether it is a classifier, for which ``score_thr`` does not apply.
        batch: The number of images that are predicted together.
    """

    batch = 1
    classifies = False

    def _read(self, image: ImageSource) -> Any:
        return read_image(image)

    def _pixels(self, read: Any) -> np.ndarray:
        return read

    def _arrays(self, prediction: Any) -> Prediction:
        return prediction

    def __call__(self, images: ImageSource | Sequence[ImageSource]) -> list[Any]:
        """Predict on one or several images, files or arrays.

        UserError for the first image that cannot be read, or that the model does not take.
        """
        images = [images] if isinstance(images, str | Path | np.ndarray) else images
        results = []
        for result in self.try_each(images):
            if isinstance(result, UserError):
                raise result
            results.append(result[1])
        return results

    def try_each(
        self, images: Sequence[ImageSource]
    ) -> Iterator[tuple[np.ndarray, Any] | UserError]:
        """Yield the pixels and prediction of each image, or why there is none."""
        for start in range(0, len(images), self.batch):
            results = [_attempt(self._read, x) for x in images[start : start + self.batch]]
            read = [x for x in results if not isinstance(x, UserError)]
            found = _attempt(self._predict, read) if read else []
            if isinstance(found, UserError):  # of one of them
                found = [_attempt(lambda x: self._predict([x])[0], x) for x in read]
            pairs = zip(read, found, strict=True)
            for result in results:
                if not isinstance(result, UserError):
                    image, result = next(pairs)
                yield result if isinstance(result, UserError) else (self._pixels(image), result)

    def draw(self, image: ImageSource, prediction: Any, score_thr: float = 0.3) -> np.ndarray:
        """Draw a prediction on its image, and return it as uint8 [H, W, 3] in RGB.

        Detection: masks if there are any, and boxes with class and score, the best ones on top;
        those with a score below ``score_thr`` are left out. Segmentation: the classes' colours over
        the image, with the names of larger segments. UserError if the image cannot be read.
        """
        return self._draw(self._pixels(self._read(image)), self._arrays(prediction), score_thr)

    def _draw(self, pixels: np.ndarray, arrays: Prediction, score_thr: float) -> np.ndarray:
        score_thr *= not self.classifies
        if 'label_map' in arrays:
            return draw_label_map(pixels, arrays['label_map'], self.classes, self.palette)
        if 'bboxes' in arrays:
            return draw_instances(pixels, _select(arrays, score_thr), self.classes, self.palette)
        return pixels

    def coco(self, prediction: Any, image_id: int, score_thr: float = 0.0) -> list[dict[str, Any]]:
        """Return a prediction in COCO's result format, without scores below ``score_thr``.

        That is a dict per instance, in the model's order: ``image_id``, ``category_id`` (see
        ``categories``), ``bbox`` as x, y, width, height in pixels, ``score``, and ``segmentation``
        (RLE as text) if there are masks. For a segmentor, it is a dict per class in the image; its
        ``score`` is the mean probability of the class's pixels, and ``score_thr`` does not apply.
        """
        return self._coco(self._arrays(prediction), image_id, score_thr)

    def _coco(self, arrays: Prediction, image_id: int, score_thr: float) -> list[dict[str, Any]]:
        score_thr *= not self.classifies
        arrays = _segments(arrays) if self.segments else _select(arrays, score_thr)
        results = []
        for i, (x1, y1, x2, y2) in enumerate(arrays['bboxes'].tolist()):
            result = dict(
                image_id=image_id,
                category_id=self.categories[arrays['labels'][i]]['id'],
                bbox=[round(v, 3) for v in (x1, y1, x2 - x1, y2 - y1)],
                score=round(float(arrays['scores'][i]), 5),
            )
            if 'masks' in arrays:
                rle = coco_mask.encode(np.asfortranarray(arrays['masks'][i], dtype=np.uint8))
                result['segmentation'] = dict(size=rle['size'], counts=rle['counts'].decode())
            results.append(result)
        return results


def _attempt(function: Callable[[Any], Any], argument: Any) -> Any:
    try:
        return function(argument)
    except UserError as error:
        return error


def _select(arrays: Prediction, score_thr: float) -> Prediction:
    """Return the instances that score enough; ground truth has no scores."""
    if 'scores' not in arrays:
        return arrays
    return {name: values[arrays['scores'] >= score_thr] for name, values in arrays.items()}


def _segments(arrays: Prediction) -> Prediction:
    """Return the classes of a segmentation as instances."""
    labels = np.unique(arrays['label_map'])
    masks = labels[:, None, None] == arrays['label_map']
    boxes = np.array([Image.fromarray(mask).getbbox() for mask in masks])
    scores = np.array([arrays['probabilities'][mask].mean() for mask in masks])
    return dict(bboxes=boxes, labels=labels, scores=scores, masks=masks)


def save_predictions(
    predictor: BasePredictor,
    images: Mapping[Path, Path],
    out: str | Path,
    *,
    score_thr: float = 0.3,
) -> Iterator[str | None]:
    """Predict on images, and write pictures of the predictions and ``OUT/predictions.json``.

    A segmentor's label maps are written to ``OUT/label_maps`` too: 8-bit PNG with the class of each
    pixel. ``predictions.json`` is a data set in COCO's format, which pycocotools can load:
    ``images`` (with the path of the ``picture`` below OUT), ``annotations``, which are the
    predictions and have a ``score``, and ``categories``. It is written after the last image.

    ``images`` are those of :func:`.find_images`; instances with a score below ``score_thr`` are
    neither drawn nor written. After each image it yields None, or one line on why it was skipped.
    UserError if a file cannot be written.
    """
    out = Path(out)
    dataset = dict(images=[], annotations=[], categories=predictor.categories)
    check_writable(out / PREDICTIONS)
    names = {file: target.relative_to(out / PICTURES) for file, target in images.items()}
    maps = change_suffix(names, '.png') if predictor.segments else {}
    for (file, target), result in zip(
        images.items(), predictor.try_each(list(images)), strict=True
    ):
        if isinstance(result, UserError):
            yield str(result) if str(file) in str(result) else f'{file}: {result}'
            continue
        pixels, arrays = result[0], predictor._arrays(result[1])
        check_writable(target)
        options = dict(quality=95, lossless=True, compress_level=1)  # of JPEG, WebP and PNG
        picture = Image.fromarray(predictor._draw(pixels, arrays, score_thr))
        with wrap_disk_errors(out):
            if file in maps:
                check_writable(out / LABEL_MAPS / maps[file])
                labels = arrays['label_map'].astype(np.uint8)
                Image.fromarray(labels).save(out / LABEL_MAPS / maps[file])
            picture.save(target, **options)
        image = dict(id=len(dataset['images']) + 1, file_name=file.as_posix())
        image.update(height=picture.height, width=picture.width)
        image['picture'] = target.relative_to(out).as_posix()
        dataset['images'].append(image)
        for result in predictor._coco(arrays, image['id'], score_thr):
            number = len(dataset['annotations']) + 1
            area = result['bbox'][2] * result['bbox'][3]
            if 'segmentation' in result:
                area = float(coco_mask.area(result['segmentation']))
            dataset['annotations'].append(dict(id=number, **result, area=area, iscrowd=0))
        yield None
    atomic_write(out / PREDICTIONS, json.dumps(dataset).encode())


def describe_files(predictor: BasePredictor, count: int, skipped: int, out: str | Path) -> str:
    """Return a line on what :func:`save_predictions` wrote for ``count`` images."""
    files = dict(pictures=PICTURES, predictions=PREDICTIONS)
    if predictor.segments:
        files['label maps'] = LABEL_MAPS
    written = '; '.join(f'{name}: {out}/{file}' for name, file in files.items())
    return f'{count - skipped} images{f", {skipped} skipped" if skipped else ""}; {written}'
