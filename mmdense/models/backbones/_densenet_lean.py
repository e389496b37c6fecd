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

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from mmdense.models.layers import lean


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


def _norm_of(module: _BatchNorm, x: Tensor) -> lean.Norm:
    """Return a norm with the statistics that it uses for x, without recording them."""
    if lean.norms_by_batch(module):
        return lean.Norm.of(module, lean.batch_statistics(module, x))
    wide = torch.promote_types(x.dtype, torch.float32)
    running = module.running_mean.to(wide), module.running_var.to(wide)
    return lean.Norm.of(module, lean.Statistics(*running, count=0, group=None), by_batch=False)


def _activated(norm: lean.Norm, x: Tensor) -> Tensor:
    return F.relu_(norm.apply(x))


class _Step(NamedTuple):
    """Norm, ReLU, convolution and dropout, as they ran."""

    norm: lean.Norm
    conv: nn.Conv2d
    mask: int | None  # index of the dropout mask, if dropout ran


class _LeanBlock(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, block: nn.Sequential, x: Tensor, *parameters: Tensor) -> Tensor:
        first, form = x.shape[1], lean.format_of(x)
        growth = _steps(block[0])[-1][1].out_channels
        size = (len(x), first + len(block) * growth, *x.shape[2:])
        buffer = torch.empty(size, dtype=x.dtype, device=x.device, memory_format=form)
        buffer[:, :first] = x
        by_batch = [layer.norm1 for layer in block if lean.norms_by_batch(layer.norm1)]
        # Mean, variance and 1 / deviation of the channels that a layer reads.
        wide = torch.promote_types(x.dtype, torch.float32)
        table = torch.empty(3, size[1] - growth, dtype=wide, device=x.device)
        batch, layers, hidden, masks = None, [], [], []
        with lean.current_autocast(x.device.type):
            for layer, end in zip(block, range(first, size[1], growth), strict=True):
                if by_batch:
                    batch = lean.batch_statistics(by_batch[0], x)
                    mean, var, inverse = table[:, end - x.shape[1] : end]
                    torch._foreach_copy_([mean, var], [batch.mean, batch.var])
                    torch.add(var, by_batch[0].eps, out=inverse).rsqrt_()
                    mean, var, inverse = table[:, :end]
                    known = batch._replace(mean=mean, var=var)
                x = buffer[:, :end]
                if not x.is_cuda:  # whose norms are fast on slices too
                    x = x.contiguous(memory_format=form)
                steps = []
                for i, (module, conv) in enumerate(_steps(layer)):
                    if module in by_batch:
                        norm = lean.Norm(module, known, inverse)
                    else:
                        norm = _norm_of(module, x)
                    if i:
                        hidden.append(x)
                    x, kept = _dropped(layer.drop, conv(_activated(norm, x)))
                    steps.append(_Step(norm, conv, None if kept is None else len(masks)))
                    if kept is not None:
                        masks.append(kept)
                buffer[:, end : end + growth] = x
                layers.append(steps)
        norms = [step.norm for steps in layers for step in steps if step.norm.by_batch]
        record_all([(norm.module, norm.statistics) for norm in norms])
        ctx.layers, ctx.growth, ctx.rate = layers, growth, block[0].drop.p
        ctx.batch, ctx.table = batch, table
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
        form, end, batch = lean.format_of(buffer), buffer.shape[1], ctx.batch
        # The gradient of all features, completed from the last to the first.
        grad = grad.clone(memory_format=form)
        # Per channel, the sums over the layers that read it: see above.
        mean, sums = ctx.table[0], torch.zeros_like(ctx.table[:2])

        def complete(begin: int, end: int) -> Tensor:
            """Return the gradient of channels after all layers that read them."""
            d, x = grad[:, begin:end], buffer[:, begin:end]
            if batch is None or begin == len(mean):
                return d.contiguous(memory_format=form)
            offset, slope = parts = sums[:, begin:end] / batch.count
            if batch.group is not None:
                dist.all_reduce(parts, group=batch.group)
            offset.addcmul_(mean[begin:end], slope, value=-1)
            # In the precision of the statistics, since the parts may almost cancel.
            through = torch.addcmul(offset.view(1, -1, 1, 1), x, slope.view(1, -1, 1, 1))
            return torch.sub(d, through, out=torch.empty_like(d, memory_format=form))

        grads: list[Tensor | None] = []
        for steps in reversed(ctx.layers):
            begin = end - ctx.growth
            d = complete(begin, end)
            end = begin
            for i, (norm, conv, mask) in reversed(list(enumerate(steps))):
                if mask is not None:
                    d = d * masks[mask] / (1 - ctx.rate)
                x = hidden.pop() if i else buffer[:, :end].contiguous(memory_format=form)
                d, d_conv = _conv_backward(norm, conv, x, d)
                if i:
                    d, d_weight, d_bias = norm.backward(d, x, [True] * 3, through=norm.by_batch)
                else:
                    direct = x.is_cuda or x.dtype == mean.dtype  # else slow on a CPU
                    needed = [not direct, True, True]
                    dx, d_weight, d_bias = norm.backward(d, x, needed, through=False)
                    scale = norm.weight() * norm.inverse
                    if direct:
                        grad[:, :end].addcmul_(d, scale.view(1, -1, 1, 1))
                    else:
                        grad[:, :end].add_(dx)
                    if norm.by_batch:
                        scales = [scale, scale * norm.inverse]
                        parts = [row[:end] for row in sums]
                        torch._foreach_addcmul_(parts, [d_bias, d_weight], scales)
                grads += [d_conv, d_bias, d_weight]
        dx = complete(0, end)
        needed = ctx.needs_input_grad[2:]
        grads = [g if need else None for g, need in zip(reversed(grads), needed, strict=True)]
        return None, dx, *grads


def record_all(norms: Sequence[tuple[_BatchNorm, lean.Statistics]]) -> None:
    """Update the running statistics of norms that used those of the batch, in a few launches."""
    tracked = [(n, s) for n, s in norms if n.training and n.track_running_stats]
    momenta = {n.momentum for n, _ in tracked}
    if len(momenta) != 1 or None in momenta or any(s.group for _, s in tracked):
        for norm, statistics in norms:
            lean.record(norm, statistics)
        return
    old = [n.running_mean for n, _ in tracked] + [n.running_var for n, _ in tracked]
    count = tracked[0][1].count
    scaled = torch._foreach_mul([s.var for _, s in tracked], count / (count - 1))
    new = [*(s.mean for _, s in tracked), *scaled]
    new = [value.to(running) for value, running in zip(new, old, strict=True)]
    torch._foreach_lerp_(old, new, momenta.pop())
    torch._foreach_add_([n.num_batches_tracked for n, _ in tracked], 1)


def _dropped(drop: nn.Dropout, x: Tensor) -> tuple[Tensor, Tensor | None]:
    if not (drop.training and drop.p):
        return x, None
    kept = drop(torch.ones_like(x))
    return x * kept, kept.bool()


def _conv_backward(
    norm: lean.Norm, conv: nn.Conv2d, x: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return the gradients of the norm's output and of the convolution's weight."""
    x = _activated(norm, x)
    needed = (True, conv.weight.requires_grad, False)
    dx, d_weight, _ = lean.conv_backward(conv, grad, x, conv.weight, needed)
    dx = dx.to(x.dtype)
    d_weight = None if d_weight is None else d_weight.to(conv.weight.dtype)
    return torch.ops.aten.threshold_backward.grad_input(dx, x, 0, grad_input=dx), d_weight
