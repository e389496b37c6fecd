"""Predictions on images: a model run on files or arrays, drawn, and written in COCO's format.

Shapes: H, W = an image's height and width in pixels, upright (a photograph's EXIF orientation is
applied); N = instances, K = classes.
"""

from __future__ import annotations

import copy
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
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
from mmengine.registry import DATASETS, MODELS, TRANSFORMS, DefaultScope
from mmengine.runner import CheckpointLoader
from mmengine.structures import BaseDataElement, InstanceData, PixelData
from pycocotools import mask as coco_mask
from torch import nn

from mmdense.apis.deployment import deploy as deploy_backbone
from mmdense.config.channels import fill_channels
from mmdense.config.read import load_config
from mmdense.datasets.check import ERROR, ReadOptions, check_image
from mmdense.errors import UserError, one_line
from mmdense.files import check_writable
from mmdense.visualization.draw import draw_instances, draw_label_map, make_palette
from mmdense.weights.loading import check_min_loaded, load_checked

__all__ = ['Predictor', 'find_images', 'save_predictions']

SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.pgm', '.png', '.ppm', '.tif', '.tiff', '.webp')
DRAWN_SUFFIXES = ('.jpeg', '.jpg', '.png', '.webp')  # small files that every viewer shows
PICTURES, PREDICTIONS = 'pictures', 'predictions.json'
COCO_IDS = sorted({*range(1, 91)} - {12, 26, 29, 30, 45, 66, 68, 69, 71, 83})


class Predictor:
    """A trained detector or segmentor that is run on images.

    Each image is prepared as the config's test pipeline says, and run by itself, so that nothing
    depends on which images come together. Of 16 bits the upper eight are taken, grey becomes
    colour, transparency is left out: what OpenCV does for training and testing too.

    Args:
        config: A config file, or a config.
        checkpoint: A file or URL of the whole model's weights; None leaves them random.
        device: Such as 'cpu' or 'cuda:1'; by default the GPU if there is one.
        deploy: Run the backbone's fastest form.
        min_loaded: Least share of the model's tensors, from 0 to 1, that the checkpoint must
            fill.
        min_coverage: Deprecated alias of ``min_loaded``.

    Attributes:
        classes: Their names, by label: from the checkpoint, or else the config, or the class of its
            data set, whichever has as many as the model predicts.
        palette: Their colours, RGB from 0 to 255.
        categories: ``dict(id=..., name=...)`` by label, as :meth:`coco` numbers them. A detector's
            ids are those of the annotation file of the config's test metric if it can be read and
            has these classes, COCO's own if the classes are COCO's, otherwise label + 1, as for all
            segmentors (ADE20K's label maps count so).
        segments: True for a segmentor.
        model: The network, in evaluation mode.

    Raises:
        UserError: No such config, checkpoint or device, a checkpoint that doesn't fill the model,
            a backbone that cannot be deployed, a model of another kind (depth), or a test pipeline
            that doesn't begin with reading one image.
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
        device = _device(device)
        self._scope = cfg.get('default_scope') or 'mmdet'
        self.segments = self._scope == 'mmseg'
        with DefaultScope.overwrite_default_scope(self._scope):
            self._read, self._prepare = _pipeline(cfg)
            model = revert_sync_batchnorm(MODELS.build(cfg.model))
        if type(model).__name__ == 'DepthEstimator':
            raise UserError(f'{_name(cfg)} predicts depth: only boxes, masks and classes are drawn')
        meta = {}
        if checkpoint is None:
            print_log('no checkpoint: random weights', 'current', logging.WARNING)
        else:
            meta = _load(model, str(checkpoint), min_loaded)
        if deploy:
            deploy_backbone(model)
        self.model = model.to(device).eval()
        self.classes, self.palette = _classes(cfg, meta, _class_count(model))
        self.classes, self.categories = _categories(cfg, self.classes, self.segments)

    def __call__(
        self, images: str | Path | np.ndarray | Sequence[str | Path | np.ndarray]
    ) -> list[BaseDataElement]:
        """Predict on images.

        Args:
            images: Files, or uint8 arrays [H, W, 3] in BGR as mmcv reads them; one, or several.

        Returns:
            A sample each, on the model's device, in the frame of the upright image: mmdet's
            DetDataSample with ``pred_instances`` (bboxes [N, 4] as x1, y1, x2, y2, scores [N],
            labels [N], and masks [N, H, W] if the model has them), or mmseg's SegDataSample with
            ``pred_sem_seg`` [1, H, W] and ``seg_logits`` [K, H, W].

        Raises:
            UserError: The first image that cannot be read, prepared, or taken by the network.
        """
        single = isinstance(images, str | Path | np.ndarray)
        return [self._predict(image) for image in ([images] if single else images)]

    def _predict(self, image: str | Path | np.ndarray) -> BaseDataElement:
        name = 'the image' if isinstance(image, np.ndarray) else str(image)
        results = self._load_image(image)
        with DefaultScope.overwrite_default_scope(self._scope), torch.no_grad():
            try:
                data = self._prepare(results)
            except Exception as error:  # transforms and OpenCV each raise their own
                raise UserError(f'{name}: cannot be prepared ({one_line(error)})') from error
            try:
                sample = self.model.test_step(pseudo_collate([data]))[0]
            except ValueError as error:  # too small, in most cases
                raise UserError(f'{name}: {error}') from error
        if not self.segments and 'pred_instances' not in sample:
            raise UserError(f'{type(self.model).__name__} predicts no boxes')
        return sample

    def _load_image(self, image: str | Path | np.ndarray) -> dict[str, Any]:
        """Return what the config's loader of images would put into the pipeline."""
        if not isinstance(image, np.ndarray):
            options = ReadOptions(self._read.imdecode_backend, self._read.color_type)
            for finding in check_image(image, options=options):
                if finding.severity == ERROR:
                    raise UserError(str(finding))
            try:
                return self._read(dict(img_path=str(image), img_id=0))
            except Exception as error:  # OpenCV, Pillow and the file system each raise their own
                raise UserError(f'{image}: not an image that can be read') from error
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            shape = ', '.join(map(str, image.shape))
            raise UserError(f'an image must be uint8 [H, W, 3] in BGR, not {image.dtype} [{shape}]')
        pixels = image.astype(np.float32) if self._read.to_float32 else image
        shape = image.shape[:2]
        return dict(img=pixels, img_path=None, img_id=0, img_shape=shape, ori_shape=shape)

    def draw(
        self, image: str | Path | np.ndarray, sample: BaseDataElement, score_thr: float = 0.3
    ) -> np.ndarray:
        """Draw a prediction on its image.

        Detection: boxes with class and score, on top of masks if there are any, the best ones last.
        Segmentation: the classes' colours over the image, with the names of larger segments.

        Args:
            image: The image that was predicted on.
            sample: The prediction.
            score_thr: Instances with a lower score are left out.

        Returns:
            uint8 [H, W, 3] in RGB.

        Raises:
            UserError: The image cannot be read, or its size is not that of the prediction.
        """
        rgb = self._load_rgb(image, sample)
        if self.segments:
            return draw_label_map(rgb, _label_map(sample.pred_sem_seg), self.classes, self.palette)
        instances = sample.pred_instances
        instances = instances[instances.scores >= score_thr]
        return draw_instances(rgb, _arrays(instances), self.classes, self.palette)

    def draw_truth(self, image: str | Path | np.ndarray, sample: BaseDataElement) -> np.ndarray:
        """Draw the ground truth on its image, as :meth:`draw` does, with dashed outlines.

        Args:
            image: The image.
            sample: The ground truth: the data sample of a data set's item, from a pipeline that
                loads annotations after resizing. Without annotations the image is returned as it
                is.

        Returns:
            uint8 [H, W, 3] in RGB.

        Raises:
            UserError: As :meth:`draw`.
        """
        rgb = self._load_rgb(image, sample)
        if 'gt_sem_seg' in sample and self.segments:
            return draw_label_map(rgb, _label_map(sample.gt_sem_seg), self.classes, self.palette)
        if 'gt_instances' in sample and not self.segments:
            instances = _arrays(sample.gt_instances)
            return draw_instances(rgb, instances, self.classes, self.palette)
        return rgb

    def _load_rgb(self, image: str | Path | np.ndarray, sample: BaseDataElement) -> np.ndarray:
        rgb = _rgb(self._load_image(image)['img'])
        if rgb.shape[:2] != tuple(sample.ori_shape):
            raise UserError(
                f'the image has {rgb.shape[0]} x {rgb.shape[1]} pixels, but the sample is of one '
                f'with {sample.ori_shape[0]} x {sample.ori_shape[1]}'
            )
        return rgb

    def coco(
        self, sample: BaseDataElement, image_id: int, score_thr: float = 0.0
    ) -> list[dict[str, Any]]:
        """Return a prediction in COCO's format of results.

        Args:
            sample: What was predicted.
            image_id: Of the image.
            score_thr: Instances with a lower score are left out.

        Returns:
            A dict for each instance, the best first as the model gives them: ``image_id``,
            ``category_id`` (see :attr:`categories`), ``bbox`` as x, y, width and height in pixels,
            ``score``, and ``segmentation`` as RLE with counts in text if there are masks. For a
            segmentor one for each class that is present, with the mean probability of its pixels as
            ``score``, whatever that is.
        """
        if self.segments:
            return self._coco_segments(sample, image_id)
        instances = sample.pred_instances
        found = _arrays(instances[instances.scores >= score_thr])
        results = []
        for i, (x1, y1, x2, y2) in enumerate(found['bboxes'].tolist()):
            result = dict(
                image_id=image_id,
                category_id=self.categories[found['labels'][i]]['id'],
                bbox=[round(v, 3) for v in (x1, y1, x2 - x1, y2 - y1)],
                score=round(float(found['scores'][i]), 5),
            )
            if 'masks' in found:
                result['segmentation'] = _rle(found['masks'][i])
            results.append(result)
        return results

    def _coco_segments(self, sample: BaseDataElement, image_id: int) -> list[dict[str, Any]]:
        labels = _label_map(sample.pred_sem_seg)
        logits = sample.seg_logits.data
        if len(logits) > 1:
            surest = logits.softmax(0).amax(0)
        else:  # mmseg has applied the sigmoid
            surest = torch.where(sample.pred_sem_seg.data[0] > 0, logits[0], 1 - logits[0])
        surest = surest.float().cpu().numpy()
        results = []
        for label in np.unique(labels).tolist():
            mask = labels == label
            rle = _rle(mask)
            results.append(
                dict(
                    image_id=image_id,
                    category_id=self.categories[label]['id'],
                    bbox=coco_mask.toBbox(rle).tolist(),
                    score=round(float(surest[mask].mean()), 5),
                    segmentation=rle,
                )
            )
        return results


def find_images(sources: Sequence[str | Path], out: str | Path) -> dict[Path, Path]:
    """Find images, and the files that their pictures go to.

    Files are taken whatever their name; folders are searched to the bottom for images by their
    suffix, in order, hidden ones and ``OUT/pictures`` aside.

    Args:
        sources: Files and folders.
        out: The folder that :func:`save_predictions` writes to.

    Returns:
        Image -> picture: below ``OUT/pictures`` the same path as below the deepest folder that all
        the images have in common, with .png behind suffixes other than JPEG, PNG and WebP.

    Raises:
        UserError: No such file or folder, a folder without an image, or an image that its picture
            would overwrite.
    """
    pictures = Path(out, PICTURES)
    images: dict[Path, None] = {}
    for source in map(Path, sources):
        if source.is_dir():
            found = [f for f in sorted(source.rglob('*')) if _is_image(f, source, pictures)]
            if not found:
                raise UserError(f'no image found in {source} (suffixes: {" ".join(SUFFIXES)})')
        elif source.exists():
            found = [source]
        else:
            raise UserError(f'no image or folder {source}')
        images.update(dict.fromkeys(found))
    absolute = {os.path.abspath(file): file for file in images}  # one that is named twice is one
    root = os.path.commonpath([os.path.dirname(file) for file in absolute])
    real = {os.path.realpath(file) for file in absolute}
    targets: dict[Path, Path] = {}
    for path, file in absolute.items():
        target = pictures / os.path.relpath(path, root)
        if target.suffix.lower() not in DRAWN_SUFFIXES:
            target = target.with_name(f'{target.name}.png')
        while target in targets.values():  # beside x.bmp there may be an x.bmp.png
            target = target.with_stem(f'{target.stem}_')
        if os.path.realpath(target) in real:
            raise UserError(f'{file} would be overwritten by its picture: choose another folder')
        targets[file] = target
    return targets


def _is_image(file: Path, folder: Path, pictures: Path) -> bool:
    inside = file.relative_to(folder).parts
    return (
        file.suffix.lower() in SUFFIXES
        and file.is_file()
        and not any(part.startswith('.') for part in inside)
        and pictures.resolve() not in file.resolve().parents
    )


def save_predictions(
    predictor: Predictor,
    images: Mapping[Path, Path],
    out: str | Path,
    *,
    score_thr: float = 0.3,
) -> Iterator[str | None]:
    """Predict on images, and write their pictures and ``OUT/predictions.json``.

    That file is a data set in COCO's format: ``images`` (with the ``picture`` of each, from OUT),
    ``annotations``, which are predictions and have a ``score``, and ``categories``. pycocotools
    loads it, and its annotations as results.

    Args:
        predictor: The model.
        images: As :func:`find_images` returns them.
        out: Made where needed.
        score_thr: Instances with a lower score are neither drawn nor written.

    Yields:
        After each image None, or in one line why it was left out. The file is written behind the
        last one.

    Raises:
        UserError: A file cannot be written.
    """
    out = Path(out)
    written = dict(images=[], annotations=[], categories=predictor.categories)
    check_writable(out / PREDICTIONS)
    for file, target in images.items():
        try:
            sample = predictor(file)[0]
            picture = predictor.draw(file, sample, score_thr)
        except UserError as error:
            yield str(error)
            continue
        _write_picture(target, picture)
        image = dict(id=len(written['images']) + 1, file_name=file.as_posix())
        image.update(height=picture.shape[0], width=picture.shape[1])
        written['images'].append(dict(image, picture=target.relative_to(out).as_posix()))
        for result in predictor.coco(sample, image['id'], score_thr):
            if 'segmentation' in result:
                area = float(coco_mask.area(result['segmentation']))
            else:
                area = result['bbox'][2] * result['bbox'][3]
            number = len(written['annotations']) + 1
            written['annotations'].append(dict(id=number, **result, area=area, iscrowd=0))
        yield None
    (out / PREDICTIONS).write_text(json.dumps(written))


def _write_picture(file: Path, picture: np.ndarray) -> None:
    check_writable(file)
    done, content = cv2.imencode(file.suffix, picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])
    assert done
    file.write_bytes(content.tobytes())


# The model


def _device(name: str | torch.device | None) -> torch.device:
    try:
        device = torch.device(name or get_device())
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f'no device {name}: {str(error).splitlines()[0]}') from error
    return device


def _load(model: nn.Module, path: str, min_loaded: float) -> dict[str, Any]:
    """Load a model's weights, and return the checkpoint's metadata."""
    checkpoint = CheckpointLoader.load_checkpoint(path, 'cpu')
    try:
        load_checked(model, checkpoint, source=path, min_loaded=min_loaded)
    except UserError as error:
        raise UserError(str(error) if path in str(error) else f'{path}: {error}') from error
    meta = checkpoint.get('meta')
    return meta if isinstance(meta, dict) else {}


def _name(cfg: Config) -> str:
    return cfg.filename or 'the config'


def _pipeline(cfg: Config) -> tuple[LoadImageFromFile, Compose]:
    """Build the config's test pipeline without annotations: what reads the image, and the rest."""
    transforms = list(_test_set(cfg).get('pipeline') or [])
    first = TRANSFORMS.build(transforms[0]) if transforms else None
    if not isinstance(first, LoadImageFromFile):
        raise UserError(
            f'{_name(cfg)}: the test pipeline must begin with LoadImageFromFile, not '
            f'{type(first).__name__}'
        )
    return first, Compose([t for t in transforms[1:] if not _loads_annotations(t)])


def _test_set(cfg: Config) -> ConfigDict:
    loader = cfg.get('test_dataloader')
    if not loader:
        raise UserError(f'{_name(cfg)} has no test_dataloader, whose pipeline prepares images')
    data = loader.dataset
    while 'pipeline' not in data and ('dataset' in data or 'datasets' in data):
        data = data.dataset if 'dataset' in data else data.datasets[0]
    return data


def _loads_annotations(transform: Mapping[str, Any]) -> bool:
    kind = transform['type']
    name = kind.rpartition('.')[2] if isinstance(kind, str) else kind.__name__
    return name.startswith('Load') and 'Annotation' in name


# Names and colours


def _class_count(model: nn.Module) -> int | None:
    """Return how many classes a model predicts, where its head says so."""
    head = getattr(model, 'decode_head', None) or getattr(model, 'bbox_head', None)
    if head is None:
        head = getattr(getattr(model, 'roi_head', None), 'bbox_head', None)
    if isinstance(head, nn.ModuleList):
        head = head[-1]
    return getattr(head, 'num_classes', None)


def _classes(
    cfg: Config, meta: Mapping[str, Any], count: int | None
) -> tuple[tuple[str, ...], list[tuple[int, ...]]]:
    """Return names and colours of the classes from the first source that has as many."""
    data = _test_set(cfg)
    with DATASETS.switch_scope_and_registry(cfg.get('default_scope') or 'mmdet') as registry:
        kind = registry.get(data.type) if isinstance(data.type, str) else data.type
    # Before mmdet 3 and mmseg 1 a checkpoint's metadata held them, in capitals.
    sources = [meta.get('dataset_meta') or meta, data.get('metainfo'), getattr(kind, 'METAINFO', 0)]
    sources = [{str(k).lower(): v for k, v in dict(s or {}).items()} for s in sources]
    known = [s for s in sources if s.get('classes') and count in (None, len(s['classes']))]
    if known:
        classes = tuple(map(str, known[0]['classes']))
    else:
        classes = tuple(f'class {i}' for i in range(count or 0))
        print_log(
            f'neither the checkpoint nor the config names {count} classes',
            'current',
            logging.WARNING,
        )
    for source in known[:1] + sources:  # colours of another source serve as well
        palette = source.get('palette')
        if isinstance(palette, list | tuple) and len(palette) >= len(classes):
            return classes, [tuple(map(int, colour)) for colour in palette]
    return classes, make_palette(len(classes))


def _categories(
    cfg: Config, classes: tuple[str, ...], segments: bool
) -> tuple[tuple[str, ...], list[dict[str, Any]]]:
    """Return the classes and their COCO categories, both by label."""
    ids: Sequence[int] = range(1, len(classes) + 1)
    if not segments:
        # mmdet counts labels in the order of the file, whatever the order in its config.
        known = [c for c in _file_categories(cfg) if c['name'] in classes]
        names = tuple(category['name'] for category in known)
        if sorted(names) == sorted(classes):
            if names != classes:
                print_log(
                    'the classes are named in the order of the annotation file, as mmdet counts '
                    'them, not of the config',
                    'current',
                    logging.WARNING,
                )
            classes, ids = names, [category['id'] for category in known]
        elif classes == _coco_classes():
            ids = COCO_IDS
    return classes, [dict(id=i, name=name) for i, name in zip(ids, classes, strict=True)]


def _file_categories(cfg: Config) -> list[dict[str, Any]]:
    """Return the categories of the test metric's annotation file; none where it can't be read."""
    metrics = cfg.get('test_evaluator') or []
    for metric in metrics if isinstance(metrics, list | tuple) else [metrics]:
        file = Path(metric.get('ann_file') or '')
        if file.suffix == '.json' and file.is_file():
            try:
                return json.loads(file.read_bytes())['categories']
            except (OSError, ValueError, LookupError, TypeError):  # of another format, or damaged
                break
    return []


def _coco_classes() -> tuple[str, ...]:
    from mmdet.datasets import CocoDataset

    return CocoDataset.METAINFO['classes']


# Images


def _rgb(pixels: np.ndarray) -> np.ndarray:
    pixels = pixels.clip(0, 255).astype(np.uint8)
    if pixels.ndim == 2 or pixels.shape[2] == 1:
        return np.repeat(pixels.reshape(*pixels.shape[:2], 1), 3, -1)
    return np.ascontiguousarray(pixels[..., 2::-1])


def _arrays(instances: InstanceData) -> dict[str, np.ndarray]:
    """Return boxes, labels, scores and masks, whatever mmdet's classes for them."""
    arrays = {}
    for key in ('bboxes', 'labels', 'scores', 'masks'):
        if key in instances:
            value = instances[key]
            value = value.to_ndarray() if hasattr(value, 'to_ndarray') else value
            arrays[key] = torch.as_tensor(getattr(value, 'tensor', value)).cpu().numpy()
    return arrays


def _label_map(segmentation: PixelData) -> np.ndarray:
    return segmentation.data.squeeze(0).cpu().numpy().astype(np.int64)


def _rle(mask: np.ndarray) -> dict[str, Any]:
    rle = coco_mask.encode(np.asfortranarray(mask, dtype=np.uint8))
    return dict(size=rle['size'], counts=rle['counts'].decode())
