"""Inference form of RDNet: affine parameters of norms folded, wide layers computed in strips.

Feature maps are channels-last, for images of either memory format, so a norm over channels and a
1x1 convolution need no copy. On a CPU the hidden layer of a block, four times as wide as its input,
is computed strip by strip and activated in place: as one tensor it would not fit the cache, and the
system would fill new memory with zeros for each block. All operators are torch's public ones.

N images, C channels, P = N * H * W pixels.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmdense.models.deploy.fold import replace_weights

__all__ = ['DeployedDenseStage', 'DeployedMixBlock', 'DeployedTransition']

STRIP = 12 * 2**20  # bytes of a strip of the hidden layer, by measurement


class DeployedTransition(nn.Module):
    """The norm and the convolution between dense stages: [N, C, H, W] to [N, C', H / s, W / s].

    Args:
        norm: timm's LayerNorm2d.
        conv: Without padding: padded zeros would differ from the norm's shift.
    """

    def __init__(self, norm: nn.LayerNorm, conv: nn.Conv2d) -> None:
        super().__init__()
        self.eps, self.stride = norm.eps, conv.stride
        self.weight, self.bias = (nn.Parameter(x.to(conv.weight.dtype)) for x in _fold(norm, conv))

    def forward(self, x: Tensor) -> Tensor:
        x = _normed(x.permute(0, 2, 3, 1), self.eps).permute(0, 3, 1, 2)
        return F.conv2d(x, self.weight, self.bias, self.stride)


class DeployedMixBlock(nn.Module):
    """A ``MixBlock``: all features of the dense stage, [N, C, H, W], to new channels."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.conv_dw, norm, fc1, _, fc2, *gate = block.layers.layers
        self.eps = norm.eps
        self.fc1 = replace_weights(fc1, *_fold(norm, fc1))
        self.fc2 = copy.deepcopy(fc2)
        self.gate = copy.deepcopy(gate[0].fc) if gate else None
        self.growth = len(block.gamma)
        self.scale = nn.Parameter(block.gamma.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_dw(x).permute(0, 2, 3, 1)
        x = _product(F.gelu(_product(_normed(x, self.eps), self.fc1)), self.fc2)
        return (x * self._scale(x)).permute(0, 3, 1, 2)

    def write(self, x: Tensor, out: Tensor) -> None:
        """Do the same strip by strip, into out [N, H, W, growth]."""
        x = self.conv_dw(x).permute(0, 2, 3, 1)
        length = max(1, STRIP // (self.fc1.out_channels * x.element_size()))
        strips = []
        for strip in x.flatten(0, 2).split(length):
            hidden = _product(_normed(strip, self.eps), self.fc1)
            strips.append(_product(torch.ops.aten.gelu_(hidden), self.fc2))
        x = strips[0] if len(strips) == 1 else torch.cat(strips)
        x = x.view(out.shape)
        torch.mul(x, self._scale(x), out=out)

    def _scale(self, x: Tensor) -> Tensor:
        """Return the scale of x [N, H, W, growth], as [growth] or [N, 1, 1, growth]."""
        if self.gate is None:
            return self.scale.to(x.dtype)  # autocast's products are narrower
        gate = F.hardsigmoid(_linear(x.mean((1, 2), keepdim=True), self.gate))
        return (gate * self.scale).to(x.dtype)


class DeployedDenseStage(nn.Sequential):
    """``MixBlock``s; each reads the stage's input and the output of all earlier blocks."""

    def __init__(self, blocks: Iterable[nn.Module]) -> None:
        deployed = (DeployedMixBlock(block) for block in blocks)
        super().__init__(OrderedDict((f'dense_block{i}', b) for i, b in enumerate(deployed)))

    def forward(self, x: Tensor) -> Tensor:
        # A compiler plans memory itself, and gradients need values that would be overwritten.
        plain = torch.compiler.is_compiling() or (torch.is_grad_enabled() and x.requires_grad)
        if plain or x.device.type != 'cpu':
            for block in self:
                x = torch.cat([x, block(x)], 1)
            return x
        number, channels, height, width = x.shape
        total = channels + sum(block.growth for block in self)
        rows = x.new_empty(number, height, width, total)
        features = rows.permute(0, 3, 1, 2)
        features[:, :channels] = x
        for block in self:
            block.write(x, rows[..., channels : channels + block.growth])
            channels += block.growth
            x = features[:, :channels]
        return x


def _fold(norm: nn.LayerNorm, conv: nn.Conv2d) -> tuple[Tensor, Tensor]:
    """Return weight and bias of a convolution with the affine part of the norm before it.

    W * (s y + t) + b = (s W) * y + (b + W t), in float64: the result is rounded once.
    """
    weight = conv.weight.detach().double()
    bias = conv.bias.detach().double() + weight.sum((2, 3)) @ norm.bias.detach().double()
    weight = weight * norm.weight.detach().double()[:, None, None]
    return weight, bias


def _linear(x: Tensor, conv: nn.Conv2d) -> Tensor:
    return F.linear(x, conv.weight.flatten(1), conv.bias)


def _normed(x: Tensor, eps: float) -> Tensor:
    """Return x [..., C] normalized to mean 0 and variance 1 over the channels."""
    return F.layer_norm(x, x.shape[-1:], eps=eps)


def _product(x: Tensor, conv: nn.Conv2d) -> Tensor:
    """Return [..., C'] for [..., C], by a convolution where that is faster, by measurement.

    It is when compiled, and on a CPU in float32, where products run in the BLAS and convolutions in
    oneDNN. With one thread both run in the BLAS, convolutions with additional copies.
    """
    if not torch.compiler.is_compiling():
        wide = x.device.type == 'cpu' and x.dtype == torch.float32
        if not (wide and torch.get_num_threads() > 1 and x.numel() > 0):
            return _linear(x, conv)
    image = x if x.ndim == 4 else x[None, :, None]  # a strip is an image one pixel high
    image = conv(image.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return image.view(*x.shape[:-1], conv.out_channels)
