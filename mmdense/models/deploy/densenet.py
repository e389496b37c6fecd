"""Inference form of DenseNet: norms folded, and each block in one buffer.

A block works in one channels-last buffer, for images of either memory format: each layer reads the
channels before its own and writes its own after them. A norm and a ReLU before a 1x1 convolution
become a clamp; the affine part folds into the convolution. Nothing is kept between calls, and all
operators are torch's public ones.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from mmdense.models.deploy.fold import fold_norm, norm_affine, replace_weights

HALF_MAX = torch.finfo(torch.float16).max
UNREACHED = 30  # standard deviations


class DeployedStem(nn.Module):
    """The modules of the stem: [N, in_channels, H, W] to [N, C, H / s, W / s]."""

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        super().__init__()
        convs = [module for module in modules if isinstance(module, nn.Conv2d)]
        norms = [module for module in modules if isinstance(module, _BatchNorm)]
        if norms:
            self.convs = nn.ModuleList(map(fold_norm, convs, norms))
            self.pool = modules[-1]
        else:
            self.convs = nn.ModuleList(map(copy.deepcopy, convs))
            self.pool = None

    def forward(self, x: Tensor) -> Tensor:
        *convs, last = self.convs
        for conv in convs:
            x = F.relu(conv(x), inplace=True)
        x = last(x)
        # Max pooling commutes with ReLU, which then runs on a quarter of the pixels.
        return x if self.pool is None else F.relu(self.pool(x), inplace=True)


class DeployedNorm(nn.Module):
    """A batch norm in evaluation, followed by a ReLU: [N, C, H, W] to a new [N, C, H, W]."""

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__()
        for name, value in zip(('scale', 'shift'), norm_affine(norm), strict=True):
            self.register_buffer(name, value.to(norm.running_mean.dtype)[:, None, None])

    def forward(self, x: Tensor) -> Tensor:
        scale, shift = self.scale.to(x.dtype), self.shift.to(x.dtype)  # under autocast
        return torch.addcmul(shift, x, scale).relu_()


class Clamp(nn.Module):
    """The part of norm and ReLU that does not fold: [N, C, H, W] within bounds [C]."""

    def __init__(self, low: Tensor, high: Tensor) -> None:
        super().__init__()
        self.register_buffer('low', low[:, None, None])
        self.register_buffer('high', high[:, None, None])
        self._set_both()

    def _set_both(self) -> None:
        # With lower bounds only, the usual case, it takes half the time in bf16.
        self.both = self.high.is_meta or bool((self.high < torch.inf).any())

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        self._set_both()

    def forward(self, x: Tensor) -> Tensor:
        low = self.low.to(x.dtype)  # under autocast
        return torch.clamp(x, low, self.high.to(x.dtype)) if self.both else torch.maximum(x, low)


class DeployedLayer(nn.Module):
    """A ``DenseLayer``: the channels before it, [N, C, H, W], to [N, growth_rate, H, W]."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        if layer.bottleneck:
            conv = fold_norm(layer.conv1, layer.norm2, torch.float64)  # rounded once, by _fold
            self.norm1, self.conv1 = _fold(layer.norm1, conv, layer.conv1.weight.dtype)
            self.conv2 = copy.deepcopy(layer.conv2)
        else:  # a folded shift would be missing in the padding of a 3x3 convolution
            self.norm1, self.conv1 = DeployedNorm(layer.norm1), copy.deepcopy(layer.conv1)
            self.conv2 = None

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(self.norm1(x))
        return x if self.conv2 is None else self.conv2(F.relu(x, inplace=True))


class DeployedBlock(nn.Sequential):
    """A ``DenseBlock``: [N, C, H, W] to a new [N, C + layers * growth_rate, H, W]."""

    def __init__(self, block: nn.Sequential) -> None:
        super().__init__()
        for name, layer in block.named_children():
            self.add_module(name, DeployedLayer(layer))
        last = block[-1]
        growth = (last.conv2 if last.bottleneck else last.conv1).out_channels
        self.added = len(block) * growth

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or (x.requires_grad and torch.is_grad_enabled()):
            # The compiler fuses the concatenation with the clamp; autograd needs it.
            features = [x]
            for layer in self:
                features.append(layer(torch.cat(features, 1)))
            return torch.cat(features, 1)
        end = x.shape[1]
        size = (x.shape[0], end + self.added, *x.shape[2:])
        buffer = torch.empty(
            size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last
        )
        buffer[:, :end] = x
        for layer in self:
            new = layer(buffer[:, :end])
            begin, end = end, end + new.shape[1]
            buffer[:, begin:end] = new
        return buffer


class DeployedTransition(nn.Module):
    """Map the output of a block, [N, C, H, W], to [N, C_out, H / 2, W / 2], rounded down.

    ``norm`` is None if the input is normalized already.
    """

    def __init__(self, norm: _BatchNorm | None, conv: nn.Conv2d) -> None:
        super().__init__()
        if norm is None:
            self.norm, self.conv = nn.Identity(), copy.deepcopy(conv)
        else:
            self.norm, self.conv = _fold(norm, conv, conv.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        # Average pooling commutes with the 1x1 convolution, which then has a quarter of the pixels.
        return self.conv(F.avg_pool2d(self.norm(x), 2))


def _fold(norm: _BatchNorm, conv: nn.Conv2d, dtype: torch.dtype) -> tuple[Clamp, nn.Conv2d]:
    """Return a clamp and a 1x1 convolution that equal norm, ReLU and 1x1 convolution.

    With a norm of a * x + b, and t = -b / a: relu(a * x + b) is a * max(x, t) + b where a > 0, and
    a * min(x, t) + b where a < 0. The factor and the sum fold into weight and bias, in float64.
    """
    scale, shift = norm_affine(norm)
    bound = torch.where(scale == 0, torch.inf, -shift / scale)
    # Where a bound overflows in float16 and no feature comes near it, the sign of the norm at the
    # mean decides what ReLU does. The same holds where the scale is zero.
    distance = (bound - norm.running_mean) * (norm.running_var.double() + norm.eps).rsqrt()
    decided = (bound.abs() > HALF_MAX) & (distance.abs() > UNREACHED)
    low = torch.where(decided | (scale < 0), -torch.inf, bound)
    high = torch.where(decided | (scale > 0), torch.inf, bound)
    off = decided & (scale * norm.running_mean + shift <= 0)
    scale, shift = scale.masked_fill(off, 0), shift.masked_fill(off, 0)
    weight = conv.weight.detach().double()
    bias = weight.flatten(1) @ shift
    if conv.bias is not None:
        bias += conv.bias.detach()
    folded = replace_weights(conv, weight * scale[:, None, None], bias, dtype)
    return Clamp(low.to(dtype), high.to(dtype)), folded
