"""Parameters and multiply-adds, by a count that needs no memory for either: on torch's meta device.

Counted are convolutions and matrix products, as torch's own counter knows them; norms, activations,
pooling, resizing and RoIAlign are not. N images, K RoIs, C channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ['backbone_macs', 'count_parameters', 'model_macs']


def count_parameters(module: nn.Module) -> int:
    """Return the number of parameters, frozen ones too, shared ones once."""
    return sum(parameter.numel() for parameter in module.parameters())


def backbone_macs(net: nn.Module, size: tuple[int, int], *, in_channels: int = 3) -> int:
    """Return the multiply-adds of one image.

    Args:
        net: A network on the meta device, in eval mode.
        size: Height and width in pixels.
        in_channels: Channels of the image.
    """
    return _count(net, torch.empty(1, in_channels, *size, device='meta'))[0]


def model_macs(
    model: nn.Module, size: tuple[int, int], *, num_boxes: int = 1000, num_masks: int = 100
) -> dict[str, int]:
    """Return the multiply-adds of each part of a detector or segmentor, for one image.

    The heads of a two-stage detector run on a fixed number of RoIs, in each of their stages, as
    mmdet 2.x counted them; an auxiliary head, which only training runs, is left out.

    Args:
        model: A model of mmdet or mmseg on the meta device, in eval mode.
        size: Height and width in pixels.
        num_boxes: RoIs of the box heads.
        num_masks: RoIs of the mask heads.

    Returns:
        Such as ``dict(backbone=..., neck=..., rpn_head=..., bbox_head=..., mask_head=...)``.

    Raises:
        ValueError: Neither a one- or two-stage detector nor a segmentor of the usual make.
    """
    macs = {}
    macs['backbone'], maps = _count(model.backbone, torch.empty(1, 3, *size, device='meta'))
    if getattr(model, 'with_neck', False):
        macs['neck'], maps = _count(model.neck, maps)
    if hasattr(model, 'decode_head'):
        head, metas = model.decode_head, [dict(img_shape=size)]
        macs['decode_head'], _ = _count(lambda x: head.predict(x, metas, {}), maps)
        return macs
    dense = [name for name in ('rpn_head', 'bbox_head') if hasattr(model, name)]
    if not dense:
        raise ValueError(f'{type(model).__name__}: no rpn_head, bbox_head or decode_head to count')
    for name in dense:
        macs[name], _ = _count(getattr(model, name), maps)
    if hasattr(model, 'roi_head'):
        head = model.roi_head
        macs['bbox_head'] = _roi_macs(head.bbox_head, head.bbox_roi_extractor, num_boxes)
        if head.with_mask:
            extractor = head.mask_roi_extractor or head.bbox_roi_extractor
            macs['mask_head'] = _roi_macs(head.mask_head, extractor, num_masks)
    return macs


def _roi_macs(heads: nn.Module, extractors: nn.Module, num_rois: int) -> int:
    """Count the heads of all stages on RoIs of the size that their extractors cut."""
    stages = [list(m) if isinstance(m, nn.ModuleList) else [m] for m in (heads, extractors)]
    total = 0
    for head, extractor in zip(*stages, strict=True):
        side = extractor.roi_layers[0].output_size
        rois = torch.empty(num_rois, extractor.out_channels, *side, device='meta')  # [K, C, H, W]
        total += _count(head, rois)[0]
    return total


def _count(run: Callable[[Any], Any], x: Tensor | Sequence[Tensor]) -> tuple[int, Any]:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        y = run(x)
    return counter.get_total_flops() // 2, y  # it counts a multiply-add as two
