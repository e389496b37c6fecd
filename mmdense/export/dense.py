"""Boxes of dense heads (one-stage detectors and RPN), batched and with outputs of fixed length.

mmdet's ``predict_by_feat`` loops over images, and its lengths depend on the data. These functions
take the same steps on whole batches, so that they export with dynamic axes.

Shapes: N images, C classes, P boxes of all feature maps, K = ``cfg.max_per_img`` boxes at most.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from mmdet.models.dense_heads import GFLHead, RPNHead
from mmdet.models.dense_heads.base_dense_head import BaseDenseHead
from mmdet.models.task_modules.coders import (
    DeltaXYWHBBoxCoder,
    DistancePointBBoxCoder,
    TBLRBBoxCoder,
)
from torch import Tensor, nn

from mmdense.errors import UserError
from mmdense.export.nms import best, rows, suppress

READ = 'ATSSHead, FCOSHead, GFLHead, RetinaHead, RTMDetHead or SSDHead'
METHODS = ('predict_by_feat', '_predict_by_feat_single', '_bbox_post_process')
CODERS = (DeltaXYWHBBoxCoder, DistancePointBBoxCoder, TBLRBBoxCoder)


def check_dense_head(head: nn.Module | None, *, rpn: bool = False) -> None:
    """Raise a UserError if :func:`decode_dense` does not do what the head's prediction does."""
    base = RPNHead if rpn else GFLHead if isinstance(head, GFLHead) else BaseDenseHead
    refuse = 'export its parts instead (part neck or backbone)'
    name = type(head).__name__
    if not isinstance(head, base) or any(
        getattr(type(head), method) is not getattr(base, method) for method in METHODS
    ):
        raise UserError(
            f'ONNX export does not know how {name} predicts boxes: it reads heads that do so as '
            f'{READ}; {refuse}'
        )
    coder = type(head.bbox_coder)
    if coder not in CODERS:
        names = ', '.join(known.__name__ for known in CODERS)
        raise UserError(f'ONNX export reads boxes of {names}, not {coder.__name__}: {refuse}')
    if getattr(getattr(head, 'loss_cls', None), 'custom_cls_channels', False):
        raise UserError(f'ONNX export knows sigmoid and softmax, not those of {name}: {refuse}')
    check_nms(head.test_cfg)


def check_nms(cfg: Mapping[str, Any]) -> None:
    """Raise a UserError if a ``test_cfg`` has another suppression than NMS by class."""
    nms = cfg.get('nms') or {}
    known = nms.get('type') == 'nms' and not nms.get('class_agnostic') and 'iou_threshold' in nms
    if not known:
        raise UserError(
            f"ONNX export needs nms=dict(type='nms', iou_threshold=...) by class in the model's "
            f'test_cfg, not {dict(nms)}: change it by --cfg-options'
        )


def decode_dense(
    head: nn.Module,
    maps: Sequence[Tensor],
    size: Sequence[int],
    cfg: Mapping[str, Any],
    *,
    rpn: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return boxes [N, K, 4], scores [N, K], best first, and labels [N, K].

    ``head`` is one that :func:`check_dense_head` accepts, with its ``test_cfg``, ``maps`` are the
    neck's, [N, C_i, H_i, W_i], ``size`` is the height and width of the images in pixels, without
    padding. With ``rpn`` the boxes are proposals, whose scores have no threshold and which are
    suppressed by feature map instead of by class; their labels are those of the maps.
    """
    cls_scores, bbox_preds, *rest = head(maps)
    factors = rest[0] if rest else [None] * len(cls_scores)  # centerness or the like
    sizes = [x.shape[2:] for x in cls_scores]
    priors = head.prior_generator.grid_priors(sizes, device=maps[0].device)
    classes = head.cls_out_channels if head.use_sigmoid_cls else head.cls_out_channels - 1
    levels = []
    for level, (cls_score, bbox_pred, factor, prior) in enumerate(
        zip(cls_scores, bbox_preds, factors, priors, strict=True)
    ):
        scores = to_rows(cls_score, head.cls_out_channels)
        scores = scores.sigmoid() if head.use_sigmoid_cls else scores.softmax(-1)[..., :-1]
        if not rpn:
            scores = torch.where(scores > cfg.get('score_thr', 0), scores, -1.0)
        scores, index = best(scores.flatten(1), cfg.get('nms_pre', -1))
        place = index // classes
        if factor is not None:
            factor = to_rows(factor, 1).flatten(1).sigmoid().gather(1, place)
            scores = torch.where(scores > 0, scores * factor, scores)
        anchors = cls_score.shape[1] // head.cls_out_channels
        deltas = rows(to_rows(bbox_pred, bbox_pred.shape[1] // anchors), place)
        prior = prior[place]
        if isinstance(head, GFLHead):  # distributions of distances, in strides
            prior = head.anchor_center(prior)
            deltas = head.integral(deltas).view(*place.shape, 4)
            deltas = deltas * head.prior_generator.strides[level][0]
        boxes = decode(head.bbox_coder, prior, deltas, size)
        levels.append((boxes, scores, torch.full_like(index, level) if rpn else index % classes))
    boxes, scores, labels = (torch.cat(x, 1) for x in zip(*levels, strict=True))
    if cfg.get('min_bbox_size', -1) >= 0:
        large = (boxes[..., 2:] - boxes[..., :2] > cfg['min_bbox_size']).all(-1)
        scores = torch.where(large, scores, -1.0)
    return keep_best(boxes, scores, labels, len(levels) if rpn else classes, cfg)


def to_rows(x: Tensor, channels: int) -> Tensor:
    """Return the outputs of a layer [N, A * channels, H, W] by prior, [N, H * W * A, channels]."""
    return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, channels)


def decode(coder: Any, priors: Tensor, deltas: Tensor, size: Sequence[int]) -> Tensor:
    """Return the boxes [N, P, 4] that a coder makes of priors [N, P, D] and deltas, clipped."""
    boxes = coder.decode(priors.flatten(0, 1), deltas.flatten(0, 1), max_shape=size)
    return boxes.view(*deltas.shape[:2], 4)


def keep_best(
    boxes: Tensor, scores: Tensor, labels: Tensor, classes: int, cfg: Mapping[str, Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the best boxes [N, K, 4], scores and labels [N, K] after suppression by label."""
    each = torch.arange(classes, device=labels.device)[:, None]
    each = torch.where(labels[:, None] == each, scores[:, None], -1.0)  # [N, C, P]
    count = cfg['max_per_img']
    scores = suppress(boxes, each, cfg['nms']['iou_threshold'], count).amax(1)
    scores, index = best(scores, count)
    return rows(boxes, index), scores, labels.gather(1, index)
