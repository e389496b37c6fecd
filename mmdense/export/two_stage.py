"""Boxes and masks of two-stage detectors: mmdet's Standard and Cascade RoI heads.

Shapes: N images, P proposals, C classes, K = ``test_cfg.max_per_img`` boxes at most.
"""

from collections.abc import Sequence

import torch
from mmdet.models.roi_heads import CascadeRoIHead, StandardRoIHead
from mmdet.models.roi_heads.bbox_heads import BBoxHead
from mmdet.models.roi_heads.mask_heads import FCNMaskHead
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from mmdet.models.task_modules.coders import DeltaXYWHBBoxCoder
from torch import Tensor, nn

from mmdense.errors import UserError
from mmdense.export.dense import check_nms, decode
from mmdense.export.nms import best, rows, suppress

READ = dict(  # parts of a RoI head -> class, and its method that these functions replace
    bbox_head=(BBoxHead, '_predict_by_feat_single'),
    mask_head=(FCNMaskHead, 'predict_by_feat'),
    bbox_roi_extractor=(SingleRoIExtractor, 'forward'),
    mask_roi_extractor=(SingleRoIExtractor, 'forward'),
)
PLAIN = dict(custom_cls_channels=False, custom_activation=False, with_reg=True)


def check_roi_head(roi_head: nn.Module) -> None:
    """Raise a UserError if these functions do not do what the RoI head's prediction does."""
    known = type(roi_head) in (StandardRoIHead, CascadeRoIHead) and not roi_head.with_shared_head
    parts = {roi_head: known}
    for name, (base, method) in READ.items():
        for part in _stages(getattr(roi_head, name, None)):
            plain = all(getattr(part, key, value) == value for key, value in PLAIN.items())
            plain &= type(getattr(part, 'bbox_coder', None)) in (DeltaXYWHBBoxCoder, type(None))
            plain &= all(
                getattr(x, 'pool_mode', '') == 'avg' for x in getattr(part, 'roi_layers', ())
            )
            same = getattr(type(part), method, None) is getattr(base, method)
            parts[part] = isinstance(part, base) and same and plain
    for part, known in parts.items():
        if not known:
            raise UserError(
                f'ONNX export does not know {type(part).__name__} with these settings: it reads '
                'StandardRoIHead and CascadeRoIHead, plain box and FCN mask heads, and '
                'SingleRoIExtractor with average RoIAlign; export its neck or backbone instead'
            )
    check_nms(roi_head.test_cfg)


def decode_rois(
    roi_head: nn.Module,
    maps: Sequence[Tensor],
    proposals: Tensor,
    scores: Tensor,
    size: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return boxes [N, K, 4], scores [N, K], best first, and labels [N, K].

    ``proposals`` [N, P, 4] with negative ``scores`` [N, P] are left out. ``size`` is the height and
    width of the images in pixels, without padding.
    """
    cfg, valid = roi_head.test_cfg, scores >= 0
    number, count = proposals.shape[:2]
    heads, extractors = _stages(roi_head.bbox_head), _stages(roi_head.bbox_roi_extractor)
    logits = []
    for head, extractor in zip(heads, extractors, strict=True):
        cls_score, deltas = head(pool_rois(extractor, maps, proposals))
        classes = head.num_classes
        logits.append(cls_score)
        if head is not heads[-1]:  # the next stage starts from the boxes of the likeliest class
            if not head.reg_class_agnostic:
                label = cls_score[:, :-1].argmax(1, keepdim=True)
                deltas = rows(deltas.view(-1, classes, 4), label)
            proposals = decode(head.bbox_coder, proposals, deltas.view(number, count, 4), size)
    scores = (sum(logits) / len(logits)).softmax(-1)[:, :-1].view(number, count, classes)
    scores = torch.where(valid[..., None] & (scores > cfg.score_thr), scores, -1.0)
    scores = scores.transpose(1, 2)  # [N, C, P]
    iou, limit = cfg.nms.iou_threshold, cfg.max_per_img
    if head.reg_class_agnostic:
        boxes = decode(head.bbox_coder, proposals, deltas.view(number, count, 4), size)
        scores = suppress(boxes, scores, iou, limit)
    else:
        proposals = proposals.repeat_interleave(classes, 1)
        boxes = decode(head.bbox_coder, proposals, deltas.view(number, -1, 4), size)
        boxes = boxes.view(number, count, classes, 4).transpose(1, 2).reshape(-1, count, 4)
        scores = suppress(boxes, scores.reshape(-1, 1, count), iou, limit)
    scores, index = best(scores.view(number, -1), limit)
    places = index % count if head.reg_class_agnostic else index
    return rows(boxes.reshape(number, -1, 4), places), scores, index // count


def decode_masks(
    roi_head: nn.Module, maps: Sequence[Tensor], boxes: Tensor, labels: Tensor
) -> Tensor:
    """Return the probabilities [N, K, h, w] of the masks of boxes; h x w is the head's size."""
    masks = []
    heads, extractors = _stages(roi_head.mask_head), _stages(roi_head.mask_roi_extractor)
    for head, extractor in zip(heads, extractors, strict=True):
        logits = head(pool_rois(extractor, maps, boxes))  # [N * K, C, h, w]
        label = labels.flatten() * (0 if head.class_agnostic else 1)
        masks.append(logits[torch.arange(logits.shape[0]), label].sigmoid())
    mask = sum(masks) / len(masks)
    return mask.view(*labels.shape, *mask.shape[1:])


def pool_rois(extractor: nn.Module, maps: Sequence[Tensor], boxes: Tensor) -> Tensor:
    """Return what a SingleRoIExtractor pools for boxes [N, P, 4]: [N * P, C, h, w].

    torchvision's operator has a translation to ONNX; mmcv's has none.
    """
    number, count = boxes.shape[:2]
    image = torch.arange(number, device=boxes.device)[:, None, None].expand(number, count, 1)
    rois = torch.cat([image.to(boxes), boxes], 2).view(-1, 5)
    layers = extractor.roi_layers
    levels = extractor.map_roi_levels(rois, len(layers))
    pooled = maps[0].new_zeros(rois.shape[0], extractor.out_channels, *layers[0].output_size)
    for level, layer in enumerate(layers):
        index = (levels == level).nonzero()[:, 0]
        samples = max(0, layer.sampling_ratio), layer.aligned
        features = torch.ops.torchvision.roi_align(
            maps[level], rois[index], layer.spatial_scale, *layer.output_size, *samples
        )
        pooled = pooled.index_put((index,), features)
    return pooled


def _stages(part: nn.Module | None) -> list[nn.Module]:
    return list(part) if isinstance(part, nn.ModuleList) else [part] if part is not None else []
