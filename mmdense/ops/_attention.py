"""Multi-scale deformable attention.

B: images; K: keys (pixels of all levels in a row); Q: queries; M: heads; D: channels a head;
L: levels; P: points. ``sampling_locations`` [B, Q, M, L, P, 2] are (x, y) in [0, 1].
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdense.ops._common import widen


def ms_deform_attn_forward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    im2col_step: int,
) -> Tensor:
    """Return [B, Q, M * D] for ``value`` [B, K, M, D] and weights [B, Q, M, L, P]."""
    tensors = widen(value, sampling_locations, attention_weights)
    levels = _levels(value_spatial_shapes, value_level_start_index)
    return sum(_attend(*_slices(tensors, level), level) for level in levels).to(value)


def ms_deform_attn_backward(
    value: Tensor,
    value_spatial_shapes: Tensor,
    value_level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
    grad_output: Tensor,
    grad_value: Tensor,
    grad_sampling_loc: Tensor,
    grad_attn_weight: Tensor,
    im2col_step: int,
) -> None:
    """Write the gradients of values, locations and weights.

    The output is a sum over the levels. Each level is recomputed and differentiated alone, so that
    only one level's samples are in memory.
    """
    *tensors, grad = widen(value, sampling_locations, attention_weights, grad_output)
    outs = grad_value, grad_sampling_loc, grad_attn_weight
    for level in _levels(value_spatial_shapes, value_level_start_index):
        leaves = [t.detach().requires_grad_() for t in _slices(tensors, level)]
        with torch.enable_grad():
            attended = _attend(*leaves, level)
        grads = torch.autograd.grad(attended, leaves, grad)
        for out, part in zip(_slices(outs, level), grads, strict=True):
            out.copy_(part)


Level = tuple[int, int, int, int]  # index, first key, height, width


def _levels(shapes: Tensor, starts: Tensor) -> list[Level]:
    pairs = zip(starts.tolist(), shapes.tolist(), strict=True)
    return [(index, start, *shape) for index, (start, shape) in enumerate(pairs)]


def _slices(tensors: tuple[Tensor, ...], level: Level) -> list[Tensor]:
    """Return views of one level's values, locations and weights."""
    value, locations, weights = tensors
    index, start, height, width = level
    return [
        value[:, start : start + height * width],
        locations[:, :, :, index],
        weights[..., index, :],
    ]


def _attend(value: Tensor, locations: Tensor, weights: Tensor, level: Level) -> Tensor:
    """Return one level's contribution [B, Q, M * D]."""
    maps = value.permute(0, 2, 3, 1).unflatten(3, level[2:]).flatten(0, 1)  # [B M, D, H, W]
    grid = locations.transpose(1, 2).flatten(0, 1) * 2 - 1  # [B M, Q, P, 2]
    samples = F.grid_sample(maps, grid, align_corners=False)  # [B M, D, Q, P]
    weights = weights.transpose(1, 2).flatten(0, 1)[:, None]  # [B M, 1, Q, P]
    out = (samples * weights).sum(-1)
    return out.unflatten(0, (len(value), value.size(2))).permute(0, 3, 1, 2).flatten(2)
