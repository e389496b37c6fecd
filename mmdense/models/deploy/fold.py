"""Folding of batch norms, which are affine maps in evaluation, into convolutions."""

import copy
from collections import Counter
from typing import Any

import torch
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import fuse_conv_bn_eval

CONVS = (nn.Conv2d, Conv2dSame)  # others may change their weights before they use them
TOLERANCE = 1e-3  # of the largest value of an output, in float32


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


@torch.no_grad()
def fold_batch_norms(net: nn.Module, x: Tensor) -> int:
    """Fold the batch norms of any network in evaluation into its convolutions, in place.

    A norm folds if, for images x [N, C, H, W], it reads what a convolution has just returned, and
    both run once. Activations inside of norms, as timm has them, stay. Returns how many folded;
    RuntimeError if the outputs, a tensor or several, are others afterwards.
    """
    made: dict[int, tuple[nn.Module, Tensor, int]] = {}  # by id: convolution, output, version
    convs, calls = {}, Counter()  # norm -> convolution

    def record(module: nn.Module, inputs: tuple, output: Any) -> None:
        calls[module] += 1
        if type(module) in CONVS:
            made[id(output)] = module, output, output._version
        elif isinstance(module, _BatchNorm) and module.running_mean is not None:
            conv, y, version = made.get(id(inputs[0]), (None, inputs[0], -1))
            if y._version == version:  # nothing has changed it in place
                convs[module] = conv

    handles = [module.register_forward_hook(record) for module in net.modules()]
    before = net(x)
    for handle in handles:
        handle.remove()
    names = {module: name for name, module in net.named_modules()}
    pairs = [(norm, conv) for norm, conv in convs.items() if calls[norm] == calls[conv] == 1]
    for norm, conv in pairs:
        folded = fuse_conv_bn_eval(conv, norm)
        for old, new in ((conv, folded), (norm, getattr(norm, 'act', nn.Identity()))):
            parent, _, child = names[old].rpartition('.')
            setattr(net.get_submodule(parent), child, new)
    after = net(x)
    for old, new in zip(before, after, strict=True):
        if not (new - old).abs().max() <= TOLERANCE * old.abs().max():
            raise RuntimeError(f'{type(net).__name__}: outputs differ after folding its norms')
    return len(pairs)
