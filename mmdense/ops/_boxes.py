"""Non-maximum suppression of boxes [N, 4] as (x1, y1, x2, y2)."""

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou

from mmdense.ops._common import widen


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Return the kept indices by falling score; equal scores keep their order."""
    boxes, scores = widen(boxes, scores)
    dtype = torch.promote_types(boxes.dtype, scores.dtype)
    # Sides are x2 - x1 + offset, in areas and in intersections: moving the far corner by the
    # offset gives both, up to 2**24, where float32 has no digit for a pixel.
    boxes = torch.cat((boxes[:, :2], boxes[:, 2:] + offset), 1) if offset else boxes
    # mmcv compares at the boxes' precision, torchvision's CPU kernel in double: an IoU of exactly
    # 0.6 in float32 exceeds the double 0.6.
    iou_threshold = torch.tensor(iou_threshold, dtype=dtype).item()
    return torch.ops.torchvision.nms(boxes.to(dtype), scores.to(dtype), iou_threshold)


def softnms(
    boxes: Tensor,
    scores: Tensor,
    dets: Tensor,
    iou_threshold: float,
    sigma: float,
    min_score: float,
    method: int,
    offset: int,
) -> Tensor:
    """Write (box, decayed score) to ``dets`` [N, 5] in the order picked; return their indices.

    ``method`` is 0 naive, 1 linear, 2 gaussian. Boxes are picked one after another, in numpy, whose
    calls have the least overhead.
    """
    boxes, scores = widen(boxes, scores)
    rows = torch.cat((boxes, scores[:, None].to(boxes)), 1).T.cpu().numpy().copy()
    x1, y1, x2, y2, score = rows
    area = (x2 - x1 + offset) * (y2 - y1 + offset)
    inds = np.arange(score.size)
    columns = (*rows, area, inds)
    picked, size = 0, score.size
    while picked < size:
        best = picked + score[picked:size].argmax()
        for column in columns:
            column[[picked, best]] = column[[best, picked]]
        rest = slice(picked + 1, size)
        width = np.minimum(x2[picked], x2[rest]) - np.maximum(x1[picked], x1[rest]) + offset
        height = np.minimum(y2[picked], y2[rest]) - np.maximum(y1[picked], y1[rest]) + offset
        inter = width.clip(min=0) * height.clip(min=0)
        union = area[picked] + area[rest] - inter
        # Two boxes without area (0 / 0) don't overlap.
        iou = np.divide(inter, union, out=np.zeros_like(inter), where=union != 0)
        if method == 2:
            score[rest] *= np.exp(-(iou * iou) / sigma)
        else:
            score[rest] *= np.where(iou >= iou_threshold, 1 - iou if method == 1 else 0, 1)
        # Like mmcv, put the last box in the place of a dropped one: the order decides ties.
        alive = score[rest] >= min_score
        kept = alive.sum()
        holes = np.flatnonzero(~alive[:kept])
        movers = kept + np.flatnonzero(alive[kept:])[::-1]
        for column in columns:
            column[rest][holes] = column[rest][movers]
        picked += 1
        size = picked + kept
    dets[:size] = torch.from_numpy(rows[:, :size].T).to(dets)
    return torch.from_numpy(inds[:size]).to(boxes.device)


def nms_match(dets: Tensor, iou_threshold: float) -> list[list[int]]:
    """Return groups of indices into ``dets`` [N, 5]: a kept box, then the boxes it suppresses."""
    (dets,) = widen(dets)
    order = dets[:, 4].argsort(descending=True, stable=True)
    groups = []
    while order.numel():
        first, rest = order[:1], order[1:]
        matched = box_iou(dets[first, :4], dets[rest, :4])[0] >= iou_threshold
        groups.append(torch.cat((first, rest[matched])).tolist())
        order = rest[~matched]
    return groups
