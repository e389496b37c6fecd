"""A dense block for torch's compiler: shared batch statistics, and backward written out.

As in ``_densenet_lean`` the statistics of a channel are computed once, although every later layer
normalizes by them. Saved for backward are the block's features and the outputs of 1x1 convolutions:
the compiler fuses norms and ReLUs into the kernels that read them, where autograd would save each
layer's concatenation and activation. A channel's gradient is the sum over all layers that read it.
``GROUP`` of them are added at once: a sum over all would read every layer's gradient again for each
layer before it, and one at a time would write the sum as often.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmdense.models.backbones._densenet_lean import can_be_lean, record_all
from mmdense.models.layers import lean

GROUP = 4


def can_share(block: nn.Sequential, x: Tensor) -> bool:
    """Return whether a block can share statistics: its norms use those of x alone, all is plain."""
    if not (torch.is_grad_enabled() and can_be_lean(block) and block[0].bottleneck):
        return False
    norms = [norm for layer in block for norm in (layer.norm1, layer.norm2)]
    drops = any(layer.drop.training and layer.drop.p for layer in block)
    by_batch = all(norm.affine and lean.norms_by_batch(norm) for norm in norms)
    return by_batch and not drops and lean.group_of(norms[0], x) is None


def shared_block(block: nn.Sequential, x: Tensor) -> Tensor:
    """Return the features [N, C, H, W] of a block that :func:`can_share`, for [N, C_in, H, W]."""
    amp = torch.is_autocast_enabled(x.device.type)
    dtype = torch.get_autocast_dtype(x.device.type) if amp else x.dtype
    modules = [m for layer in block for m in (layer.norm1, layer.conv1, layer.norm2, layer.conv2)]
    parameters = [p for module in modules for p in (module.weight, module.bias) if p is not None]
    inputs = dtype, block[0].norm1.eps, x.to(dtype), *parameters
    features, mean, var, *moments = _SharedBlock.apply(*inputs)
    count = features.numel() // features.shape[1]
    norms = [(m, mean[: m.num_features], var[: m.num_features]) for m in modules[::4]]
    norms += zip(modules[2::4], moments[::2], moments[1::2], strict=True)
    record_all([(norm, lean.Statistics(*values, count, None)) for norm, *values in norms])
    return features


class _Norm(NamedTuple):
    """A norm as it ran, all in [C, 1, 1]: its result is ``x * scale + shift``."""

    scale: Tensor
    shift: Tensor
    mean: Tensor
    inverse: Tensor  # 1 / deviation

    @classmethod
    def of(cls, weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float) -> _Norm:
        inverse = torch.rsqrt(var + eps)
        scale = weight * inverse
        return cls(*(v.view(-1, 1, 1) for v in (scale, bias - mean * scale, mean, inverse)))

    def backward(self, grad: Tensor, x: Tensor, kernel: Tensor) -> tuple[Tensor, ...]:
        """Return the gradients of ReLU's output and input, and of weight, bias and kernel."""
        normed = x * self.scale + self.shift
        d, d_kernel, _ = torch.ops.aten.convolution_backward(
            *(grad, F.relu(normed).to(grad.dtype), kernel.to(grad.dtype), [0], [1, 1]),
            *([kernel.shape[-1] // 2] * 2, [1, 1], False, [0, 0], 1, [True, True, False]),
        )
        masked = torch.where(normed > 0, d, 0).to(self.mean.dtype)
        d_weight = (masked * (x - self.mean)).sum((0, 2, 3)) * self.inverse.flatten()
        return d, masked, d_weight, masked.sum((0, 2, 3)), d_kernel.to(kernel.dtype)

    def through(self, d_weight: Tensor, d_bias: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return offset and slope of what the statistics take from x's gradient, [C, 1, 1]."""
        slope = self.scale * d_weight.view(-1, 1, 1) * self.inverse / count
        return self.scale * d_bias.view(-1, 1, 1) / count - self.mean * slope, slope


class _SharedBlock(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, dtype: torch.dtype, eps: float, x: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        layers, first, growth = len(parameters) // 6, x.shape[1], parameters[-1].shape[0]
        size = len(x), first + layers * growth, *x.shape[2:]
        form = lean.format_of(x)
        features = torch.empty(size, dtype=dtype, device=x.device, memory_format=form)
        features[:, :first] = x
        known, hidden, moments = [], [], []

        def run(x: Tensor, mean: Tensor, var: Tensor, parameters: tuple[Tensor, ...]) -> Tensor:
            norm, kernel = _Norm.of(*parameters[:2], mean, var, eps), parameters[2].to(dtype)
            x = F.relu(x * norm.scale + norm.shift).to(dtype)
            return F.conv2d(x, kernel, padding=kernel.shape[-1] // 2)

        for i in range(layers):
            end = first + i * growth
            known.append(_moments(x))
            mean, var = map(torch.cat, zip(*known, strict=True))
            x = run(features[:, :end], mean, var, parameters[6 * i : 6 * i + 3])
            hidden.append(x)
            moments += _moments(x)
            x = run(x, *moments[-2:], parameters[6 * i + 3 : 6 * i + 6])
            features[:, end : end + growth] = x
        ctx.settings = layers, eps
        ctx.save_for_backward(features, mean, var, *hidden, *moments, *parameters)
        ctx.mark_non_differentiable(mean, var, *moments)
        return features, mean, var, *moments

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (layers, eps), (features, mean, var, *rest) = ctx.settings, ctx.saved_tensors
        hidden, moments, parameters = rest[:layers], rest[layers : 3 * layers], rest[3 * layers :]
        growth, count = parameters[-1].shape[0], features.numel() // features.shape[1]
        offset = slope = torch.zeros_like(mean).view(-1, 1, 1)
        grads, waiting = [], []  # those of outputs of ReLUs wait, with their norms

        def complete(begin: int, end: int) -> Tensor:
            """Return the gradient of channels through all layers so far, but for statistics."""
            total = grad[:, begin:end]
            for d, norm in waiting:
                scale = norm.scale[begin:end]
                active = features[:, begin:end] * scale + norm.shift[begin:end] > 0
                total = total + torch.where(active, d[:, begin:end], 0) * scale
            return total

        for i in reversed(range(layers)):
            weight1, bias1, kernel1, weight2, bias2, kernel2 = parameters[6 * i : 6 * i + 6]
            end = len(mean) - (layers - 1 - i) * growth
            d = complete(end, end + growth)
            if i < layers - 1:
                d = d - offset[end:] - slope[end:] * features[:, end : end + growth]
                offset, slope = offset[:end], slope[:end]
            x, norm = hidden[i], _Norm.of(weight2, bias2, *moments[2 * i : 2 * i + 2], eps)
            _, d, *grads2 = norm.backward(d.to(x.dtype), x, kernel2)
            by_mean, by_var = norm.through(*grads2[:2], count)
            d = (d * norm.scale - by_mean - by_var * x).to(x.dtype)
            x, norm = features[:, :end], _Norm.of(weight1, bias1, mean[:end], var[:end], eps)
            d, _, *grads1 = norm.backward(d, x, kernel1)
            waiting.append((d, norm))
            if len(waiting) == GROUP or not i:
                grad, waiting = complete(0, end).to(x.dtype), []
            by_mean, by_var = norm.through(*grads1[:2], count)
            offset, slope = offset + by_mean, slope + by_var
            grads = [*grads1, *grads2, *grads]
        return None, None, (grad - offset - slope * x).to(x.dtype), *grads


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean and biased variance [C] of x [N, C, H, W], in float32 at least."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.var_mean(wide, (0, 2, 3), correction=0)[::-1]
