"""Networks that are exported, from a model's own modules and with its preprocessing inside.

Shapes: N images of C channels, H x W pixels; K detections; the outputs are in each class.
"""

import copy
import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from mmdet.models.detectors.base_detr import DetectionTransformer
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

from mmdense.errors import UserError, one_line
from mmdense.export.dense import check_dense_head, decode_dense
from mmdense.export.detr import check_detr, decode_detr
from mmdense.export.two_stage import check_roi_head, decode_masks, decode_rois

PARTS = ('model', 'raw', 'neck', 'backbone')
DIVISORS = (1, 2, 4, 8, 16, 32, 64, 128)
HEAD_OUTPUTS = ('cls_score', 'bbox_pred', 'score_factor')  # the last: objectness or centerness


class Preprocessing(nn.Module):
    """A model's preprocessing: pixels [N, C, H, W] from 0 to 255 to what its backbone reads.

    Three channels are RGB. Without a data preprocessor, images pass unchanged.

    Attributes:
        order: The model's order of channels, 'RGB' or 'BGR'; '' if it has no data preprocessor.
        divisor: Height and width are padded to multiples of it, at the bottom and right.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        source = getattr(model, 'data_preprocessor', None)
        names = '_channel_conversion', 'channel_conversion', 'to_rgb'  # mmengine, mmseg, mmpretrain
        swap = next((getattr(source, name) for name in names if hasattr(source, name)), None)
        self.order = '' if swap is None else 'RGB' if swap else 'BGR'  # mmcv reads BGR
        for name in ('mean', 'std'):
            self.register_buffer(name, getattr(source, name, None) if self.order else None)
        self.divisor = getattr(source, 'pad_size_divisor', 1)
        if hasattr(source, 'test_cfg'):  # mmseg's, whose other settings are for training
            padding = source.test_cfg or {}
            self.divisor = padding.get('size_divisor') or 1
            if padding.get('size'):
                raise UserError(f'ONNX export cannot pad images to {padding["size"]}')
        self.value = float(getattr(source, 'pad_val', getattr(source, 'pad_value', 0)))

    def forward(self, images: Tensor) -> Tensor:
        x = images.float()
        if self.order == 'BGR' and x.shape[1] == 3:
            x = x.flip(1)
        if self.mean is not None:
            x = (x - self.mean) / self.std
        if self.divisor > 1:
            # Written so that torch.export divides the padded sides without a remainder.
            height, width = (
                (side + self.divisor - 1) // self.divisor * self.divisor - side
                for side in x.shape[2:]
            )
            x = nn.functional.pad(x, (0, width, 0, height), value=self.value)
        return x


class Network(nn.Module):
    """A model, in evaluation mode on the CPU in float32, with its preprocessing.

    Attributes:
        names: Names of the outputs of ``forward`` that are exported.
        part: One of ``PARTS``.
        task: What the outputs are for; None for parts of a model.
        channels: Channels of the images.
    """

    names: Sequence[str] = ()
    part = 'model'
    task: str | None = None

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.preprocess = Preprocessing(model)
        backbone = getattr(model, 'backbone', model)
        self.channels = next(p for p in backbone.parameters() if p.dim() == 4).shape[1]

    def postprocessing(self) -> dict[str, Any]:
        """Return the settings of the outputs for the file's metadata."""
        return {}

    def probe(self, images: Tensor) -> Sequence[Tensor]:
        """Run as far as the image size matters."""
        return self(images)

    def random_images(self, number: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
        """Return random images for :meth:`forward`, the same in each call."""
        generator = torch.Generator().manual_seed(0)
        shape = (number, self.channels, height, width)
        if self.preprocess.order:
            return torch.randint(256, shape, generator=generator).to(dtype)
        return torch.randn(shape, generator=generator)

    def fit_divisor(self, size: tuple[int, int]) -> None:
        """Pad to the smallest multiple that the network takes, for necks that add feature maps.

        UserError if the network does not run on images of this size.
        """
        original = self.preprocess.divisor
        height, width = (side // DIVISORS[-1] * DIVISORS[-1] + DIVISORS[-1] for side in size)
        for divisor in (*DIVISORS, 0):  # last, networks of one size
            step = self.preprocess.divisor = math.lcm(original, divisor or 1)
            sizes = (height + step, max(width - step, step)), size
            try:
                with torch.no_grad():
                    for sides in sizes if divisor else sizes[1:]:
                        self.probe(self.random_images(1, *sides, torch.float32))
            except ValueError as error:  # the image is too small
                raise UserError(str(error)) from error
            except (AssertionError, RuntimeError) as error:
                reason = one_line(error)
                continue
            return
        raise UserError(f'no run on images of {size[0]} x {size[1]}: {reason}')


class Detector(Network):
    """Images to ``boxes`` [N, K, 4], ``scores`` [N, K], ``labels`` [N, K], ``masks`` [N, K, h, w].

    Boxes are x1, y1, x2, y2 in pixels, best first; those with a score <= 0 are padding. ``masks``
    are probabilities inside the boxes, of instance segmentation only. UserError if the model has
    parts that cannot be exported.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.head = roi_head = getattr(model, 'roi_head', None)
        if hasattr(model, 'panoptic_fusion_head'):
            raise UserError(f'ONNX export has no panoptic outputs of {type(model).__name__}')
        if roi_head is not None:
            check_dense_head(getattr(model, 'rpn_head', None), rpn=True)
            check_roi_head(roi_head)
        else:
            self.head = getattr(model, 'bbox_head', None)
            check_detr(model) if _is_detr(model) else check_dense_head(self.head or model)
        self.masks = bool(getattr(roi_head, 'with_mask', False))
        self.names = ('boxes', 'scores', 'labels', *(['masks'] if self.masks else []))
        self.task = 'instance segmentation' if self.masks else 'detection'

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        model, size = self.model, images.shape[2:]
        if _is_detr(model):
            x = self.preprocess(images)
            padded = x.shape[2:] if self.preprocess.divisor > 1 else None
            return decode_detr(model, model.extract_feat(x), size, padded)
        maps = self.probe(images)
        if not hasattr(model, 'roi_head'):
            return decode_dense(model.bbox_head, maps, size, model.bbox_head.test_cfg)
        rpn = model.rpn_head
        boxes, scores, _ = decode_dense(rpn, maps, size, rpn.test_cfg, rpn=True)
        boxes, scores, labels = decode_rois(model.roi_head, maps, boxes, scores, size)
        if not self.masks:
            return boxes, scores, labels
        return boxes, scores, labels, decode_masks(model.roi_head, maps, boxes, labels)

    def probe(self, images: Tensor) -> Sequence[Tensor]:
        return self.model.extract_feat(self.preprocess(images))

    def override(self, score: float | None, iou: float | None, max_per_img: int | None) -> None:
        """Change the settings of the head's ``test_cfg`` that are not None."""
        cfg = self.head.test_cfg
        if _is_detr(self.model) and (score, iou) != (None, None):
            kind = type(self.model).__name__
            raise UserError(f'{kind} has neither a score threshold nor NMS: select its boxes later')
        if score is not None:
            cfg.score_thr = score
        if iou is not None:
            cfg.nms.iou_threshold = iou
        if max_per_img is not None:
            cfg.max_per_img = max_per_img

    def postprocessing(self) -> dict[str, Any]:
        cfg, detr = self.head.test_cfg, _is_detr(self.model)
        settings = dict(
            score_thr=0.0 if detr else float(cfg.get('score_thr', 0)),
            nms_iou=None if detr else float(cfg.nms.iou_threshold),
            max_per_img=int(cfg.get('max_per_img') or self.model.num_queries),
        )
        if self.masks:
            settings['mask_thr'] = float(cfg.mask_thr_binary)
        return settings


class Segmentor(Network):
    """Images to ``segmentation`` [N, H, W] and ``logits`` [N, C, H, W], or ``depth`` [N, 1, H, W].

    The network sees the complete image, whatever its ``test_cfg``.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        head = model.decode_head
        self.head = head[-1] if isinstance(head, nn.ModuleList) else head
        depth = type(model).__name__ == 'DepthEstimator' or hasattr(self.head, 'max_depth')
        self.names = ('depth',) if depth else ('segmentation', 'logits')
        self.task = 'depth' if depth else 'semantic segmentation'
        if model.test_cfg.get('mode') == 'slide_flip':
            raise UserError('ONNX export reads test_cfg modes whole and slide, not slide_flip')

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        (height, width), x = images.shape[2:], self.preprocess(images)
        size = x.shape[2:]
        meta = dict(ori_shape=size, img_shape=size, pad_shape=size)
        logits = self.model.encode_decode(x, [meta])
        if self.preprocess.divisor > 1:
            logits = logits[..., :height, :width]
        if self.part == 'raw' or 'depth' in self.names:
            return (logits,)
        if logits.shape[1] == 1:
            return (logits[:, 0].sigmoid() > self.head.threshold).long(), logits
        return logits.argmax(1), logits

    def postprocessing(self) -> dict[str, Any]:
        cfg, slide = self.model.test_cfg, None
        if cfg.get('mode') == 'slide':
            slide = {name: list(_pair(cfg[name])) for name in ('crop_size', 'stride')}
        threshold = getattr(self.head, 'threshold', None)
        align = bool(self.model.align_corners)
        return dict(threshold=threshold, slide=slide, align_corners=align)


class Classifier(Network):
    """Images to ``scores`` [N, C], the probabilities of the classes."""

    names, task = ('scores',), 'classification'

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        return (self.model(self.preprocess(images)).softmax(1),)


class Part(Network):
    """Images to the feature maps of a backbone or neck, or the raw outputs of a dense head.

    Feature maps are ``c2``, ``c3``, ... of a backbone or ``p2``, ``p3``, ... of a neck (log2 of
    the stride); raw outputs are ``cls_score_0``, ..., ``bbox_pred_0``, ... by feature map, and of
    some heads ``score_factor_0``, ...
    """

    def __init__(self, model: nn.Module, part: str) -> None:
        super().__init__(model)
        self.part = part

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        features = getattr(self.model, 'backbone', self.model)(self.preprocess(images))
        if self.part != 'backbone' and getattr(self.model, 'neck', None) is not None:
            features = self.model.neck(features)
        if self.part != 'raw':
            return (features,) if isinstance(features, Tensor) else tuple(features)
        outputs = self.model.bbox_head(features)
        if isinstance(outputs, Tensor) or not 2 <= len(outputs) <= len(HEAD_OUTPUTS):
            name = type(self.model.bbox_head).__name__
            raise UserError(f'{name} returns more than scores and boxes: export the neck')
        self.kinds = len(outputs)
        return tuple(level for levels in outputs for level in levels)

    def name_outputs(self, size: tuple[int, int]) -> None:
        """Set ``names`` by a run on images of this size."""
        with torch.no_grad():
            outputs = self(self.random_images(1, *size, torch.float32))
        if self.part == 'raw':
            kinds = HEAD_OUTPUTS[: self.kinds]
            levels = range(len(outputs) // len(kinds))
            self.names = [f'{name}_{level}' for name in kinds for level in levels]
            return
        sides = [max(size), *(max(x.shape[2:]) for x in outputs)]
        levels = [*accumulate(round(math.log2(a / b)) for a, b in pairwise(sides))]  # strides 2^n
        letter = 'p' if self.part == 'neck' else 'c'
        repeats = (levels[:i].count(level) for i, level in enumerate(levels))
        self.names = [
            f'{letter}{level}' + (f'_{repeat}' if repeat else '')
            for level, repeat in zip(levels, repeats, strict=True)
        ]


def build_network(model: nn.Module, part: str | None) -> Network:
    """Return a copy of a model, or of a part of it, that :func:`.write_graph` exports.

    ``part`` is 'model' (boxes, masks, segmentation, scores), 'raw' (a dense head's outputs, or
    logits), 'neck' or 'backbone'; by default 'model', or all there is of a model without a head.
    UserError if the model does not have the part, or it cannot be exported.
    """
    kind = type(model).__name__
    two_stage, classifies = hasattr(model, 'roi_head'), getattr(model, 'head', None) is not None
    segments, detects = hasattr(model, 'decode_head'), hasattr(model, 'bbox_head')
    whole = segments or detects or two_stage or classifies
    has_neck = getattr(model, 'neck', None) is not None
    if part is None:
        part = 'model' if whole else 'neck' if has_neck else 'backbone'
    if part not in PARTS:
        raise ValueError(f'part is {part!r}, must be one of {PARTS}')
    if part == 'neck' and not has_neck:
        raise UserError(f'{kind} has no neck: export its backbone')
    if part == 'raw' and (_is_detr(model) or not (segments or detects)):
        raise UserError(f'{kind} has no dense head with raw outputs: export the model or the neck')
    if part == 'model' and not whole:
        raise UserError(f'{kind} has no head: export its backbone')
    if part == 'model' and not Preprocessing(model).order:
        raise UserError(f'{kind} has no data preprocessor: export its parts')
    if classifies and part != 'backbone':
        names = [base.__name__ for base in type(model.head).__mro__]
        if part == 'neck' or 'ClsHead' not in names:  # others have no softmax
            raise UserError(f'no ONNX export of the {part} with {names[0]}: add --part backbone')
    model = copy.deepcopy(model).float().cpu().eval().requires_grad_(False)
    for parent in list(model.modules()):
        if getattr(parent, 'inplace', False):
            parent.inplace = False  # torch.export decomposes in-place activations
        for name, child in parent.named_children():
            if type(child) is nn.AdaptiveAvgPool2d:
                setattr(parent, name, AdaptivePool(child.output_size))
    if part in ('model', 'raw') and segments:
        network = Segmentor(model)
        if part == 'raw':
            network.part, network.names = part, network.names[-1:]
        return network
    if part == 'model':
        return Classifier(model) if classifies else Detector(model)
    return Part(model, part)


def _is_detr(model: nn.Module) -> bool:
    return isinstance(model, DetectionTransformer)


class AdaptivePool(nn.AdaptiveAvgPool2d):
    """Adaptive pooling for dynamic sizes, which ONNX has no operator for.

    Means over windows are matrix products: [N, C, H, W] to [N, C, h, w].
    """

    def forward(self, x: Tensor) -> Tensor:
        counts = _pair(self.output_size)
        if counts == (1, 1):
            return x.mean((2, 3), keepdim=True)
        rows, columns = (_windows(*sides, x) for sides in zip(counts, x.shape[2:], strict=True))
        return rows @ x @ columns.t()


def _windows(count: int | None, side: int, like: Tensor) -> Tensor:
    """Return the weights [count, side] of pixels in windows, which may overlap."""
    count = count or side
    index = torch.arange(count, device=like.device)[:, None]
    pixel = torch.arange(side, device=like.device)
    inside = (pixel >= index * side // count) & (pixel * count < (index + 1) * side)
    weights = inside.to(like.dtype)
    return weights / weights.sum(1, keepdim=True)
