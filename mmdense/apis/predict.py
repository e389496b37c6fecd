"""Predictions of a trained model on images: drawn, and written in COCO's format.

Shapes: H, W = height and width of an image in pixels, upright (EXIF orientation is applied);
N = instances, K = classes.
"""

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmcv.transforms import LoadImageFromFile
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.device import get_device
from mmengine.model import revert_sync_batchnorm
from mmengine.registry import MODELS, TRANSFORMS, DefaultScope
from mmengine.runner import CheckpointLoader
from mmengine.structures import BaseDataElement
from torch import nn

from mmdense.apis.classes import describe_classes
from mmdense.config.channels import fill_channels
from mmdense.config.read import load_config
from mmdense.datasets.check import ERROR, ReadOptions, Sample, check_sample
from mmdense.errors import UserError, explain, warn
from mmdense.export.metadata import inner_dataset
from mmdense.models.deploy import deploy as deploy_backbone
from mmdense.runtime.images import ImageSource, check_pixels
from mmdense.runtime.results import BasePredictor
from mmdense.weights.loading import check_min_loaded, load_checked


class Predictor(BasePredictor):
    """A trained detector, segmentor or classifier for inference.

    Each image goes through the config's test pipeline and the model on its own, so predictions do
    not depend on the other images of a call. As in training, OpenCV reads 16-bit images as their
    upper 8 bits, converts grey to colour and drops transparency. ``model`` is in evaluation mode.

    Args:
        config: Config, or config file.
        checkpoint: File or URL of the complete model's weights; None keeps random weights.
        device: Such as 'cpu' or 'cuda:1'; by default the GPU if there is one.
        deploy: Use the backbone's fastest form.
        min_loaded: Share of the model's tensors, from 0 to 1, that the checkpoint must fill.
        min_coverage: Deprecated alias of ``min_loaded``.

    UserError if the config, checkpoint or device does not exist, the checkpoint does not fill the
    model, the backbone cannot be deployed, the model predicts something else (depth), or the test
    pipeline does not begin with loading one image.
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
        self.segments, self.classifies = (self._scope == x for x in ('mmseg', 'mmpretrain'))
        with DefaultScope.overwrite_default_scope(self._scope):
            self._loader, self._pipeline = _build_pipeline(cfg, name)
            model = revert_sync_batchnorm(MODELS.build(cfg.model))
        if type(model).__name__ == 'DepthEstimator':
            raise UserError(f'{name} predicts depth: only boxes, masks and classes can be drawn')
        if checkpoint is None:
            warn('no checkpoint: random weights')
        meta = {} if checkpoint is None else _load_weights(model, str(checkpoint), min_loaded)
        if deploy:
            deploy_backbone(model)
        self.model = model.to(device).eval()
        names, self.palette, self.categories = describe_classes(model, cfg, meta)
        self.classes = tuple(names)

    def _predict(self, read: Sequence[dict[str, Any]]) -> list[BaseDataElement]:
        (results,) = read
        name = results['img_path'] or 'the image'
        with DefaultScope.overwrite_default_scope(self._scope), torch.no_grad():
            with explain(f'{name}: cannot be preprocessed'):
                data = self._pipeline(dict(results))
            try:
                sample = self.model.test_step(pseudo_collate([data]))[0]
            except ValueError as error:  # mostly too small
                raise UserError(f'{name}: {error}') from error
        if not (self.segments or self.classifies or 'pred_instances' in sample):
            raise UserError(f'{type(self.model).__name__} predicts no boxes')
        return [sample]

    def _read(self, image: ImageSource) -> dict[str, Any]:
        """Return what the config's LoadImageFromFile puts into the pipeline."""
        if not isinstance(image, np.ndarray):
            options = ReadOptions(self._loader.imdecode_backend, self._loader.color_type)
            for finding in check_sample(Sample(str(image)), options):
                if finding.severity == ERROR:
                    raise UserError(str(finding))
            with explain(f'{image}: not an image that can be read'):
                return self._loader(dict(img_path=str(image), img_id=0))
        check_pixels(image, 'BGR')
        pixels = image.astype(np.float32) if self._loader.to_float32 else image
        shape = image.shape[:2]
        return dict(img=pixels, img_path=None, img_id=0, img_shape=shape, ori_shape=shape)

    def _pixels(self, read: dict[str, Any]) -> np.ndarray:
        pixels = np.atleast_3d(read['img']).clip(0, 255).astype(np.uint8)
        return pixels[..., [0, 0, 0] if pixels.shape[2] == 1 else [2, 1, 0]]

    def _arrays(self, sample: BaseDataElement, source: str = 'pred') -> dict[str, np.ndarray]:
        """Return a prediction, or the ground truth ('gt'), as arrays; empty if there is none."""
        segmentation, arrays = sample.get(f'{source}_sem_seg'), {}
        if self.segments and segmentation is not None:
            arrays['label_map'] = segmentation.data.squeeze(0).cpu().numpy().astype(np.int64)
            if source == 'pred':
                logits = sample.seg_logits.data
                if len(logits) > 1:
                    probabilities = logits.softmax(0).amax(0)
                else:  # one channel for two classes, after mmseg's sigmoid
                    positive = segmentation.data[0] > 0
                    probabilities = torch.where(positive, logits[0], 1 - logits[0])
                arrays['probabilities'] = probabilities.float().cpu().numpy()
        instances = {} if self.segments else sample.get(f'{source}_instances', {})
        if self.classifies and (labels := sample.get(f'{source}_label')) is not None:
            boxes = labels.new_tensor([[0, 0, *sample.ori_shape[::-1]]]).expand(len(labels), 4)
            instances = dict(bboxes=boxes, labels=labels)
            if source == 'pred':
                instances['scores'] = sample.pred_score[labels]
        for key in ('bboxes', 'labels', 'scores', 'masks'):
            if key in instances:
                value = instances[key]
                value = getattr(value, 'tensor', value)  # mmdet's box classes
                if hasattr(value, 'to_ndarray'):  # mmdet's mask classes
                    value = value.to_ndarray()
                arrays[key] = torch.as_tensor(value).cpu().numpy()
        return arrays

    def draw(
        self,
        image: ImageSource,
        sample: BaseDataElement,
        score_thr: float = 0.3,
        *,
        truth: bool = False,
    ) -> np.ndarray:
        """Draw a prediction, or the ground truth, on its image; see :meth:`.BasePredictor.draw`.

        ``truth`` draws what a data sample of a test set has, dashed and without scores; its
        pipeline must load annotations after resizing. UserError if the image cannot be read, or is
        not of the sample's size.
        """
        pixels = self._pixels(self._read(image))
        (height, width), expected = pixels.shape[:2], tuple(sample.ori_shape)
        if (height, width) != expected:
            raise UserError(
                f'the image has {height} x {width} pixels, but the sample is of one '
                f'with {expected[0]} x {expected[1]}'
            )
        return self._draw(pixels, self._arrays(sample, 'gt' if truth else 'pred'), score_thr)

    def legend(self, samples: Sequence[BaseDataElement]) -> dict[str, tuple[int, ...]]:
        """Return the colours of the classes in segmentations, predicted or true, by name."""
        maps = [sample.get(key) for sample in samples for key in ('pred_sem_seg', 'gt_sem_seg')]
        found = {int(label) for data in maps if data is not None for label in data.data.unique()}
        colours = zip(self.classes, self.palette, strict=False)
        return {name: colour for i, (name, colour) in enumerate(colours) if i in found}


def _load_weights(model: nn.Module, path: str, min_loaded: float) -> dict[str, Any]:
    """Load a model's weights, and return the checkpoint's metadata."""
    checkpoint = CheckpointLoader.load_checkpoint(path, 'cpu')
    try:
        load_checked(model, checkpoint, source=path, min_loaded=min_loaded)
    except UserError as error:
        raise UserError(str(error) if path in str(error) else f'{path}: {error}') from error
    meta = checkpoint.get('meta')
    return meta if isinstance(meta, dict) else {}


def _build_pipeline(cfg: Config, name: str) -> tuple[LoadImageFromFile, Compose]:
    """Return the pipeline of the test data set: the image loader, and the rest."""
    if not cfg.get('test_dataloader'):
        raise UserError(f'{name} has no test_dataloader, whose pipeline preprocesses images')
    transforms = list(inner_dataset(cfg).get('pipeline') or [])
    loader = TRANSFORMS.build(transforms[0]) if transforms else None
    if not isinstance(loader, LoadImageFromFile):
        raise UserError(
            f'{name}: the test pipeline must begin with LoadImageFromFile, not '
            f'{type(loader).__name__}'
        )
    rest = [t for t in transforms[1:] if 'Annotations' not in str(t['type'])]
    return loader, Compose(rest)
