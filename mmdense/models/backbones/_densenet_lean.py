"""Selective recomputation of a dense block: one buffer, shared statistics, recomputed norms.

A block's features are in one buffer [N, C, H, W], of which each layer reads the first channels.
Saved for backward are the buffer and the outputs of 1x1 convolutions; norms and ReLUs are
recomputed.

The batch statistics of a channel are the same for all layers that read it, so they are computed
once, together with the channel. In backward the gradient of a channel x through the norms of layers
j, with weights w_j, is

    sum_j (w_j g_j) / s - (sum_j w_j mean(g_j) + x' sum_j w_j mean(g_j x')) / s

where x' is the normalized channel, s its deviation and g_j the gradient of the norm's output. The
means are the gradients of w_j and of the bias, and the second part is added once the first is
complete. So the cost of statistics, and the exchange of SyncBN, are linear in the depth.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from mmdense.models.layers import lean

__all__ = ['can_be_lean', 'lean_block']


def lean_block(block: nn.Sequential, x: Tensor) -> Tensor:
    """Return the features [N, C, H, W] of a block that :func:`can_be_lean`, for [N, C_in, H, W].

    Results are those of the plain block. There are no second derivatives.
    """
    steps = [step for layer in block for step in _steps(layer)]
    parameters = [p for norm, conv in steps for p in (norm.weight, norm.bias, conv.weight)]
    return _LeanBlock.apply(block, x, *parameters)


def can_be_lean(block: nn.Sequential) -> bool:
    """Return whether a block's norms are torch's, with equal ``eps``, and no layer has hooks."""
    steps = [step for layer in block for step in _steps(layer)]
    plain = all(isinstance(norm, _BatchNorm) for norm, _ in steps)
    plain = plain and all(lean.is_plain(module) for step in steps for module in step)
    return plain and len({norm.eps for norm, _ in steps}) == 1


def _steps(layer: nn.Module) -> list[tuple[nn.Module, nn.Conv2d]]:
    first = [(layer.norm1, layer.conv1)]
    return [*first, (layer.norm2, layer.conv2)] if layer.bottleneck else first


class _Step(NamedTuple):
    """Norm, ReLU, convolution and dropout, as they ran."""

    norm: nn.Module
    conv: nn.Conv2d
    statistics: lean.Statistics | None  # of the norm's input, if it used those of the batch
    mask: int | None  # index of the dropout mask, if dropout ran


class _LeanBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, block: nn.Sequential, x: Tensor, *parameters: Tensor) -> Tensor:
        first, form = x.shape[1], lean.format_of(x)
        growth = _steps(block[0])[-1][1].out_channels
        size = (len(x), first + len(block) * growth, *x.shape[2:])
        buffer = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=form)
        buffer[:, :first] = x
        shared, layers, hidden, masks = None, [], [], []
        with lean.Autocast.of(x.device.type).entered():
            for start in range(first, size[1], growth):
                layer = block[len(layers)]
                x = buffer[:, :start].contiguous(memory_format=form)
                if lean.norms_by_batch(layer.norm1):
                    shared = _extended(shared, layer.norm1, x)
                steps = []
                for i, (norm, conv) in enumerate(_steps(layer)):
                    statistics = None
                    if lean.norms_by_batch(norm):
                        statistics = lean.batch_statistics(norm, x) if i else shared
                        lean.record(norm, statistics)
                    if i:
                        hidden.append(x)
                    x, kept = _dropped(layer.drop, conv(_activated(norm, x, statistics)))
                    steps.append(
                        _Step(norm, conv, statistics, None if kept is None else len(masks))
                    )
                    if kept is not None:
                        masks.append(kept)
                buffer[:, start : start + growth] = x
                layers.append(steps)
        ctx.layers, ctx.shared, ctx.growth, ctx.rate = layers, shared, growth, block[0].drop.p
        ctx.numbers = len(hidden), len(masks)
        # With the parameters, so that torch notices changes.
        ctx.save_for_backward(buffer, *hidden, *masks, *parameters)
        return buffer

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        number, number_of_masks = ctx.numbers
        buffer, *kept = ctx.saved_tensors
        hidden, masks = kept[:number], kept[number : number + number_of_masks]
        form, end = lean.format_of(buffer), buffer.shape[1]
        # The gradient of all features, completed from the last to the first.
        grad = grad.clone(memory_format=form)
        eps = ctx.layers[0][0].norm.eps
        # Per channel, the sums over the layers that read it: see above.
        sums = None if ctx.shared is None else torch.zeros_like(ctx.shared.mean).repeat(2, 1)

        def complete(begin: int, end: int) -> Tensor:
            """Return the gradient of channels after all layers that read them."""
            part = slice(begin, end)
            if sums is None or begin >= sums.shape[1]:
                return grad[:, part].contiguous(memory_format=form)
            known = ctx.shared._replace(mean=ctx.shared.mean[part], var=ctx.shared.var[part])
            return lean.through_statistics(
                grad[:, part], buffer[:, part], sums[:, part], known, eps
            )

        grads: list[Tensor | None] = []
        for steps in reversed(ctx.layers):
            begin = end - ctx.growth
            d = complete(begin, end)
            end = begin
            for i, (norm, conv, statistics, mask) in reversed(list(enumerate(steps))):
                if mask is not None:
                    d = d * masks[mask] / (1 - ctx.rate)
                x = hidden.pop() if i else buffer[:, :end].contiguous(memory_format=form)
                d, d_conv = _conv_backward(norm, conv, statistics, x, d)
                if i and statistics is not None:
                    d, d_weight, d_bias = lean.norm_backward(d, x, norm.weight, statistics, eps)
                else:
                    used = _used(norm, statistics)
                    weight = lean.as_wide(norm.weight, used[0])
                    # CUDA's channels-last kernel asserts saved statistics, and ignores empty ones.
                    empty = used[0].new_empty(0)
                    d, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
                        d, x, weight, *used, empty, empty, False, eps, [True, True, True]
                    )
                    if statistics is not None:
                        scale = (used[1] + eps).rsqrt()
                        scale = scale if weight is None else scale * weight
                        sums[:, :end] += scale * torch.stack([d_bias, d_weight])
                grads += [d_conv, d_bias, d_weight]
            grad[:, :end] += d
        dx = complete(0, end)
        needed = ctx.needs_input_grad[2:]
        grads = [g if need else None for g, need in zip(reversed(grads), needed, strict=True)]
        return None, dx, *grads


def _extended(shared: lean.Statistics | None, norm: nn.Module, x: Tensor) -> lean.Statistics:
    """Append the statistics of the channels of x that are not known yet."""
    if shared is None:
        return lean.batch_statistics(norm, x)
    new = x[:, len(shared.mean) :].contiguous(memory_format=lean.format_of(x))
    new = lean.batch_statistics(norm, new)
    mean, var = torch.cat([shared.mean, new.mean]), torch.cat([shared.var, new.var])
    return new._replace(mean=mean, var=var)


def _used(norm: nn.Module, statistics: lean.Statistics | None) -> tuple[Tensor, Tensor]:
    if statistics is None:
        return norm.running_mean, norm.running_var
    return statistics.mean, statistics.var


def _activated(norm: nn.Module, x: Tensor, statistics: lean.Statistics | None) -> Tensor:
    return F.relu_(lean.apply_norm(norm, x, *_used(norm, statistics)))


def _dropped(drop: nn.Dropout, x: Tensor) -> tuple[Tensor, Tensor | None]:
    if not (drop.training and drop.p):
        return x, None
    kept = drop(torch.ones_like(x))
    return x * kept, kept.bool()


def _conv_backward(
    norm: nn.Module,
    conv: nn.Conv2d,
    statistics: lean.Statistics | None,
    x: Tensor,
    grad: Tensor,
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of the norm's output and of the convolution's weight."""
    x = _activated(norm, x, statistics)
    needed = (True, conv.weight.requires_grad, False)
    dx, d_weight, _ = lean.conv_backward(conv, grad, x, conv.weight, needed)
    dx = dx.to(x.dtype)
    d_weight = None if d_weight is None else d_weight.to(conv.weight.dtype)
    return torch.ops.aten.threshold_backward.grad_input(dx, x, 0, grad_input=dx), d_weight
