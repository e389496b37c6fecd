"""Non-maximum suppression with dense outputs, which exports as ONNX's NonMaxSuppression.

Shapes: B images, or pairs of image and class; C classes; P boxes. A score of -1 marks a box that is
left out.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

UNLIMITED = 2**31 - 1
CONSTANT = 3840  # TensorRT's limit of TopK
THRESHOLD = -0.5  # between -1, for boxes that are left out, and the lowest score


@torch.library.custom_op('mmdense::non_max_suppression', mutates_args=())
def non_max_suppression(boxes: Tensor, scores: Tensor, limit: int, iou_threshold: float) -> Tensor:
    """Return rows of (image, class, box) [K, 3] as ONNX's operator does, at most ``limit`` a class.

    ``boxes`` [B, P, 4] are x1, y1, x2, y2 with ``scores`` [B, C, P].
    """
    rows = []
    for image, classes in enumerate(scores):
        for label, score in enumerate(classes):
            index = (score > THRESHOLD).nonzero()[:, 0]
            kept = torch.ops.torchvision.nms(boxes[image][index], score[index], iou_threshold)
            kept = index[kept[:limit]]
            place = (torch.full_like(kept, image), torch.full_like(kept, label), kept)
            rows.append(torch.stack(place, 1))
    return torch.cat(rows)


@non_max_suppression.register_fake
def _(boxes: Tensor, scores: Tensor, limit: int, iou_threshold: float) -> Tensor:
    return boxes.new_empty(torch.library.get_ctx().new_dynamic_size(), 3, dtype=torch.long)


def translations() -> dict[Any, Callable[..., Any]]:
    """Return ``custom_translation_table`` of :func:`torch.onnx.export`."""
    from onnxscript import opset18 as op

    def translate(boxes, scores, limit: int, iou_threshold: float):  # noqa: ANN001, ANN202
        return op.NonMaxSuppression(boxes, scores, limit, iou_threshold, THRESHOLD)

    return {torch.ops.mmdense.non_max_suppression.default: translate}


def suppress(boxes: Tensor, scores: Tensor, iou_threshold: float, count: int) -> Tensor:
    """Return the scores [B, C, P], and -1 where a better box of the same class overlaps more.

    ``boxes`` [B, P, 4] are x1, y1, x2, y2. ``count`` are used at most, of all classes; all if it is
    <= 0.
    """
    limit = count if count > 0 else UNLIMITED
    image, label, box = non_max_suppression(boxes, scores, limit, iou_threshold).unbind(1)
    index = (image * scores.shape[1] + label) * scores.shape[2] + box
    kept = scores.new_zeros(scores.numel()).index_fill(0, index, 1.0)
    return torch.where(kept.view(scores.shape) > 0, scores, -1.0)


def best(scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return the ``count`` best of scores [B, P], in order, and their places; all if it is <= 0.

    If there are fewer, scores of -1 fill the rest, unless ``count`` is large: lengths that do not
    depend on the image's size export in less time, and TensorRT needs them.
    """
    total = scores.shape[1]
    if not 0 < count <= CONSTANT:
        return scores.topk(torch.sym_min(count, total) if count > 0 else total)
    scores, index = nn.functional.pad(scores, (0, count), value=-1.0).topk(count)
    return scores, torch.where(scores > THRESHOLD, index, 0)


def rows(x: Tensor, index: Tensor) -> Tensor:
    """Return the rows [B, K, D] of ``x`` [B, P, D] at ``index`` [B, K]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[-1]))
