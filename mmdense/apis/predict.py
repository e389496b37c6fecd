"""Predictions of a trained model on images: drawn, and written in COCO's format.

Shapes: H, W = height and width of an image in pixels, upright (EXIF orientation is applied);
N = instances, K = classes.
"""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from mmcv.transforms import LoadImageFromFile
from mmengine.config import Config, ConfigDict
from mmengine.dataset import Compose, pseudo_collate
from mmengine.device import get_device
from mmengine.logging import print_log
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, TRANSFORMS, DefaultScope
from mmengine.runner import CheckpointLoader
from mmengine.structures import BaseDataElement, InstanceData, PixelData
from PIL import Image
from pycocotools import mask as coco_mask
from torch import nn

from mmdense.apis.classes import class_names, coco_categories, num_classes_of
from mmdense.config.channels import fill_channels
from mmdense.config.read import load_config
from mmdense.datasets.check import ERROR, ReadOptions, Sample, check_sample
from mmdense.errors import UserError, one_line
from mmdense.files import atomic_write, change_suffix, check_writable, relative_paths
from mmdense.models.deploy import deploy as deploy_backbone
from mmdense.visualization.draw import draw_instances, draw_label_map
from mmdense.weights.loading import check_min_loaded, load_checked

IMAGE_SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.pgm', '.png', '.ppm', '.tif', '.tiff', '.webp')
PICTURE_SUFFIXES = ('.jpeg', '.jpg', '.png', '.webp')  # compressed, and shown by every viewer
PICTURES, LABEL_MAPS, PREDICTIONS = 'pictures', 'label_maps', 'predictions.json'

ImageSource = str | Path | np.ndarray  # a file, or uint8 [H, W, 3] in BGR


class Predictor:
    """A trained detector or segmentor for inference.

    Each image goes through the config's test pipeline and the model on its own, so predictions do
    not depend on the other images of a call. As in training, OpenCV reads 16-bit images as their
    upper 8 bits, converts grey to colour and drops transparency.

    Args:
        config: Config, or config file.
        checkpoint: File or URL of the complete model's weights; None keeps random weights.
        device: Such as 'cpu' or 'cuda:1'; by default the GPU if there is one.
        deploy: Use the backbone's fastest form.
        min_loaded: Smallest share of the model's tensors, from 0 to 1, that the checkpoint must
            fill.
        min_coverage: Deprecated alias of ``min_loaded``.

    Attributes:
        classes: Class names by label, from :func:`.class_names`.
        palette: Class colours, RGB from 0 to 255.
        categories: COCO categories by label, ``dict(id=..., name=...)``: a detector's from
            :func:`.coco_categories`, a segmentor's numbered from 1.
        segments: Whether the model is a segmentor.
        model: The model, in evaluation mode.

    Raises:
        UserError: if the config, checkpoint or device does not exist, the checkpoint does not fill
            the model, the backbone cannot be deployed, the model predicts something else (depth),
            or the test pipeline does not begin with loading one image.
    """

    def __init__(
        self,
        config: str | Path | Config,
        checkpoint: str | Path | None = None,
        *,
        device: str | torch.device | None = None,
        deploy: bool = False,
        min_loaded: float = 1.0,
        min_coverage: float | None = None,
    ) -> None:
        min_loaded = check_min_loaded(min_loaded, min_coverage)
        if isinstance(config, Config):
            cfg = copy.deepcopy(config)
            fill_channels(cfg)
        else:
            cfg = load_config(str(config))
        if checkpoint and '://' not in str(checkpoint) and not Path(checkpoint).exists():
            raise UserError(f'no checkpoint {checkpoint}')
        try:
            device = torch.device(device or get_device())
            torch.empty(1, device=device)
        except (RuntimeError, AssertionError) as error:
            raise UserError(f'no device {device}: {str(error).splitlines()[0]}') from error
        name = cfg.filename or 'the config'
        self._scope = cfg.get('default_scope') or 'mmdet'
        self.segments = self._scope == 'mmseg'
        with DefaultScope.overwrite_default_scope(self._scope):
            dataset, self._loader, self._pipeline = _build_pipeline(cfg, name)
            model = revert_sync_batchnorm(MODELS.build(cfg.model))
        if type(model).__name__ == 'DepthEstimator':
            raise UserError(f'{name} predicts depth: only boxes, masks and classes can be drawn')
        if checkpoint is None:
            print_log('no checkpoint: random weights', 'current', logging.WARNING)
        meta = {} if checkpoint is None else _load_weights(model, str(checkpoint), min_loaded)
        if deploy:
            deploy_backbone(model)
        self.model = model.to(device).eval()
        classes, self.palette = class_names(dataset, self._scope, meta, num_classes_of(model))
        if self.segments:
            self.categories = [dict(id=i, name=name) for i, name in enumerate(classes, start=1)]
        else:
            trained = bool(meta.get('dataset_meta') or meta.get('CLASSES'))
            self.categories = coco_categories(cfg, classes, trained)
        self.classes = tuple(category['name'] for category in self.categories)

    def __call__(self, images: ImageSource | Sequence[ImageSource]) -> list[BaseDataElement]:
        """Predict on images.

        Args:
            images: Files, or uint8 arrays [H, W, 3] in BGR, as mmcv reads them; one or several.

        Returns:
            A data sample per image, on the model's device, in the coordinates of the upright image:
            mmdet's DetDataSample with ``pred_instances`` (bboxes [N, 4] as x1, y1, x2, y2,
            scores [N], labels [N], and masks [N, H, W] if the model predicts them), or mmseg's
            SegDataSample with ``pred_sem_seg`` [1, H, W] and ``seg_logits`` [K, H, W].

        Raises:
            UserError: for the first image that cannot be read or preprocessed, or that the model
                rejects.
        """
        single = isinstance(images, str | Path | np.ndarray)
        return [self._predict(image) for image in ([images] if single else images)]

    def _predict(self, image: ImageSource) -> BaseDataElement:
        name = 'the image' if isinstance(image, np.ndarray) else str(image)
        results = self._load_image(image)
        with DefaultScope.overwrite_default_scope(self._scope), torch.no_grad():
            try:
                data = self._pipeline(results)
            except Exception as error:  # each transform, and OpenCV, raises its own
                raise UserError(f'{name}: cannot be preprocessed ({one_line(error)})') from error
            try:
                sample = self.model.test_step(pseudo_collate([data]))[0]
            except ValueError as error:  # mostly too small
                raise UserError(f'{name}: {error}') from error
        if not self.segments and 'pred_instances' not in sample:
            raise UserError(f'{type(self.model).__name__} predicts no boxes')
        return sample

    def _load_image(self, image: ImageSource) -> dict[str, Any]:
        """Return what the config's LoadImageFromFile puts into the pipeline."""
        if not isinstance(image, np.ndarray):
            options = ReadOptions(self._loader.imdecode_backend, self._loader.color_type)
            for finding in check_sample(Sample(str(image)), options):
                if finding.severity == ERROR:
                    raise UserError(str(finding))
            try:
                return self._loader(dict(img_path=str(image), img_id=0))
            except Exception as error:  # OpenCV, Pillow and the file system each raise their own
                raise UserError(f'{image}: not an image that can be read') from error
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            shape = ', '.join(map(str, image.shape))
            raise UserError(f'an image must be uint8 [H, W, 3] in BGR, not {image.dtype} [{shape}]')
        pixels = image.astype(np.float32) if self._loader.to_float32 else image
        shape = image.shape[:2]
        return dict(img=pixels, img_path=None, img_id=0, img_shape=shape, ori_shape=shape)

    def draw(
        self,
        image: ImageSource,
        sample: BaseDataElement,
        score_thr: float = 0.3,
        *,
        truth: bool = False,
    ) -> np.ndarray:
        """Draw a prediction, or the ground truth, on its image.

        Detection: masks if there are any, and boxes with class and score, the best ones on top.
        Segmentation: the classes' colours over the image, with the names of larger segments.

        Args:
            sample: The prediction; for ground truth, a data sample of a test set whose pipeline
                loads annotations after resizing.
            score_thr: Predicted instances with a lower score are left out.
            truth: Draw the ground truth, if there is any: dashed, without scores.

        Returns:
            uint8 [H, W, 3] in RGB.

        Raises:
            UserError: if the image cannot be read, or is not of the sample's size.
        """
        pixels = np.atleast_3d(self._load_image(image)['img']).clip(0, 255).astype(np.uint8)
        (height, width), expected = pixels.shape[:2], tuple(sample.ori_shape)
        if (height, width) != expected:
            raise UserError(
                f'the image has {height} x {width} pixels, but the sample is of one '
                f'with {expected[0]} x {expected[1]}'
            )
        rgb = pixels[..., [0, 0, 0] if pixels.shape[2] == 1 else [2, 1, 0]]
        source = 'gt' if truth else 'pred'
        label_map, instances = sample.get(f'{source}_sem_seg'), sample.get(f'{source}_instances')
        if self.segments and label_map is not None:
            return draw_label_map(rgb, _to_label_map(label_map), self.classes, self.palette)
        if not self.segments and instances is not None:
            if not truth:
                instances = instances[instances.scores >= score_thr]
            return draw_instances(rgb, _to_numpy(instances), self.classes, self.palette)
        return rgb

    def legend(self, samples: Sequence[BaseDataElement]) -> dict[str, tuple[int, ...]]:
        """Return the colours of the classes in segmentations, predicted or true, by name."""
        maps = [sample.get(key) for sample in samples for key in ('pred_sem_seg', 'gt_sem_seg')]
        found = {int(label) for data in maps if data is not None for label in data.data.unique()}
        colours = zip(self.classes, self.palette, strict=False)
        return {name: colour for i, (name, colour) in enumerate(colours) if i in found}

    def coco(
        self, sample: BaseDataElement, image_id: int, score_thr: float = 0.0
    ) -> list[dict[str, Any]]:
        """Return a prediction in COCO's result format.

        Instances with a score below ``score_thr`` are left out.

        Returns:
            A dict per instance, in the model's order: ``image_id``, ``category_id`` (see
            :attr:`categories`), ``bbox`` as x, y, width, height in pixels, ``score``, and
            ``segmentation`` (RLE as text) if there are masks. For a segmentor, a dict per class in
            the image; its ``score`` is the mean probability of the class's pixels, and
            ``score_thr`` does not apply.
        """
        if self.segments:
            arrays = _segments(sample)
        else:
            instances = sample.pred_instances
            arrays = _to_numpy(instances[instances.scores >= score_thr])
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


def _load_weights(model: nn.Module, path: str, min_loaded: float) -> dict[str, Any]:
    """Load a model's weights, and return the checkpoint's metadata."""
    checkpoint = CheckpointLoader.load_checkpoint(path, 'cpu')
    try:
        load_checked(model, checkpoint, source=path, min_loaded=min_loaded)
    except UserError as error:
        raise UserError(str(error) if path in str(error) else f'{path}: {error}') from error
    meta = checkpoint.get('meta')
    return meta if isinstance(meta, dict) else {}


def _build_pipeline(cfg: Config, name: str) -> tuple[ConfigDict, LoadImageFromFile, Compose]:
    """Return the test data set's config, and its pipeline: the image loader, and the rest."""
    if not cfg.get('test_dataloader'):
        raise UserError(f'{name} has no test_dataloader, whose pipeline preprocesses images')
    dataset = cfg.test_dataloader.dataset
    while 'pipeline' not in dataset and ('dataset' in dataset or 'datasets' in dataset):  # wrappers
        dataset = dataset.dataset if 'dataset' in dataset else dataset.datasets[0]
    transforms = list(dataset.get('pipeline') or [])
    loader = TRANSFORMS.build(transforms[0]) if transforms else None
    if not isinstance(loader, LoadImageFromFile):
        raise UserError(
            f'{name}: the test pipeline must begin with LoadImageFromFile, not '
            f'{type(loader).__name__}'
        )
    rest = [t for t in transforms[1:] if 'Annotations' not in str(t['type'])]
    return dataset, loader, Compose(rest)


def _to_numpy(instances: InstanceData) -> dict[str, np.ndarray]:
    """Return the boxes, labels, scores and masks of predictions or ground truth."""
    arrays = {}
    for key in ('bboxes', 'labels', 'scores', 'masks'):
        if key in instances:
            value = instances[key]
            value = getattr(value, 'tensor', value)  # mmdet's box classes
            if hasattr(value, 'to_ndarray'):  # mmdet's mask classes
                value = value.to_ndarray()
            arrays[key] = torch.as_tensor(value).cpu().numpy()
    return arrays


def _to_label_map(segmentation: PixelData) -> np.ndarray:
    return segmentation.data.squeeze(0).cpu().numpy().astype(np.int64)


def _segments(sample: BaseDataElement) -> dict[str, np.ndarray]:
    """Return the classes of a segmentation as instances."""
    label_map, logits = _to_label_map(sample.pred_sem_seg), sample.seg_logits.data
    if len(logits) > 1:
        probabilities = logits.softmax(0).amax(0)
    else:  # one channel for two classes, after mmseg's sigmoid
        probabilities = torch.where(sample.pred_sem_seg.data[0] > 0, logits[0], 1 - logits[0])
    probabilities = probabilities.float().cpu().numpy()
    labels = np.unique(label_map)
    masks = labels[:, None, None] == label_map
    boxes = np.array([cv2.boundingRect(mask.astype(np.uint8)) for mask in masks])
    boxes[:, 2:] += boxes[:, :2]
    scores = np.array([probabilities[mask].mean() for mask in masks])
    return dict(bboxes=boxes, labels=labels, scores=scores, masks=masks)


def find_images(sources: Sequence[str | Path], out: str | Path) -> dict[Path, Path]:
    """Find images, and name the pictures of their predictions.

    A file is taken whatever its suffix. Folders are searched recursively for image suffixes, also
    through links, in sorted order, without hidden files and what :func:`save_predictions` writes.

    Args:
        sources: Files and folders.
        out: The output folder of :func:`save_predictions`.

    Returns:
        Image -> picture. Pictures have the same paths below ``OUT/pictures`` as the images below
        their deepest common folder; .png is appended to suffixes other than JPEG, PNG and WebP.

    Raises:
        UserError: if a file or folder does not exist, a folder has no image, or a picture would
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


def save_predictions(
    predictor: Predictor,
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

    Args:
        images: Image -> picture, from :func:`find_images`.
        out: OUT, the output folder.
        score_thr: Instances with a lower score are neither drawn nor written.

    Yields:
        After each image None, or one line on why it was skipped.

    Raises:
        UserError: if a file cannot be written.
    """
    out = Path(out)
    dataset = dict(images=[], annotations=[], categories=predictor.categories)
    check_writable(out / PREDICTIONS)
    names = {file: target.relative_to(out / PICTURES) for file, target in images.items()}
    maps = change_suffix(names, '.png') if predictor.segments else {}
    for file, target in images.items():
        try:
            sample = predictor(file)[0]
            picture = predictor.draw(file, sample, score_thr)
        except UserError as error:
            yield str(error)
            continue
        check_writable(target)
        if file in maps:
            check_writable(out / LABEL_MAPS / maps[file])
            labels = _to_label_map(sample.pred_sem_seg).astype(np.uint8)
            Image.fromarray(labels).save(out / LABEL_MAPS / maps[file])
        options = dict(quality=95, lossless=True, compress_level=1)  # of JPEG, WebP and PNG
        Image.fromarray(picture).save(target, **options)
        height, width = picture.shape[:2]
        image = dict(id=len(dataset['images']) + 1, file_name=file.as_posix())
        image.update(height=height, width=width, picture=target.relative_to(out).as_posix())
        dataset['images'].append(image)
        for result in predictor.coco(sample, image['id'], score_thr):
            number = len(dataset['annotations']) + 1
            area = result['bbox'][2] * result['bbox'][3]
            if 'segmentation' in result:
                area = float(coco_mask.area(result['segmentation']))
            dataset['annotations'].append(dict(id=number, **result, area=area, iscrowd=0))
        yield None
    atomic_write(out / PREDICTIONS, json.dumps(dataset).encode())
