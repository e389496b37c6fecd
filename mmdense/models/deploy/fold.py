"""Folding of batch norms, which are affine maps in evaluation, into convolutions."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def norm_affine(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """Return the scale and the shift [C] of a batch norm in evaluation, in float64.

    ValueError if the norm has no running statistics: it uses those of the batch in evaluation.
    """
    if norm.running_mean is None:
        raise ValueError(f'{norm} has no running statistics: it cannot be folded')
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    shift = -norm.running_mean * scale
    if norm.affine:
        weight = norm.weight.detach()
        scale, shift = scale * weight, shift * weight + norm.bias.detach()
    return scale, shift


def fold_norm(conv: nn.Conv2d, norm: _BatchNorm, dtype: torch.dtype | None = None) -> nn.Conv2d:
    """Return a new convolution that equals ``conv`` followed by ``norm`` in evaluation.

    With norm(y) = s * y + t it is norm(W * x + b) = (s W) * x + (s b + t), computed in float64, so
    that the result is rounded once. Bias and the norm's weights are optional, and both arguments
    keep their weights and modes. ``dtype`` is that of the result; the convolution's by default.
    """
    scale, shift = norm_affine(norm)
    weight = conv.weight.detach().double() * scale[:, None, None, None]
    if conv.bias is not None:
        shift = shift + scale * conv.bias.detach()
    return replace_weights(conv, weight, shift, dtype)


def replace_weights(
    conv: nn.Conv2d, weight: Tensor, bias: Tensor, dtype: torch.dtype | None = None
) -> nn.Conv2d:
    """Return a copy of a convolution with this weight and bias, in evaluation, without gradients.

    The result has this dtype; the convolution's by default.
    """
    dtype = dtype or conv.weight.dtype
    conv = copy.deepcopy(conv)
    conv.weight = nn.Parameter(weight.detach().to(dtype, copy=True), requires_grad=False)
    conv.bias = nn.Parameter(bias.detach().to(dtype, copy=True), requires_grad=False)
    return conv.eval()
