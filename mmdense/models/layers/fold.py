"""Batch norms of a trained network, which in evaluation are affine maps, folded away."""

from __future__ import annotations

import copy

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.fusion import fuse_conv_bn_eval

__all__ = ['fold_norm']


def fold_norm(conv: nn.Conv2d, norm: _BatchNorm) -> nn.Conv2d:
    """Return a new convolution that does what ``conv`` and then ``norm`` do in evaluation.

    With norm(y) = s * y + t it is norm(W * x + b) = (s W) * x + (s b + t). Both arguments are left
    alone, in whatever mode they are; the result is of the convolution's precision, without
    gradients, in evaluation.

    Args:
        conv: With or without bias, [N, C_in, H, W] to [N, C, H', W'].
        norm: Of C channels, BatchNorm2d or SyncBatchNorm, with or without weights.

    Raises:
        ValueError: A norm without running statistics: it norms by the batch in evaluation as well.
    """
    if norm.running_mean is None:
        raise ValueError(f'{norm} has no running statistics: it cannot be folded')
    # In float64, whatever the network's precision: the result is rounded once.
    wide = [copy.deepcopy(module).eval().double() for module in (conv, norm)]
    return fuse_conv_bn_eval(*wide).to(conv.weight.dtype).requires_grad_(False)
