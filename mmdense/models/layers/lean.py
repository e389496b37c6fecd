"""Selective recomputation: convolution outputs are saved, the layers in between are recomputed.

A convolution needs its input for the gradient of its weight. If that input is cheap to compute from
other convolutions' outputs (concatenation, norm, activation, gate), saving these outputs is enough.
Batch statistics are saved too, so running statistics are updated once and synchronized ones
exchanged once. N images, C channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from mmdense.models.layers.recompute import StatisticsUntouched

__all__ = [
    'Autocast',
    'Statistics',
    'apply_norm',
    'as_wide',
    'batch_statistics',
    'conv_backward',
    'format_of',
    'is_plain',
    'lean_conv',
    'norm_backward',
    'norms_by_batch',
    'plain_conv',
    'record',
    'saves_memory',
    'through_statistics',
]


# Modules with these forwards are replaced by their operators here.
FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward, nn.Conv2d.forward)


class Statistics(NamedTuple):
    """Statistics of the channels of a batch."""

    mean: Tensor  # [C], in float32 at least
    var: Tensor  # [C], biased
    count: int  # values per channel, in all processes that share the statistics
    group: Any  # these processes; None for a single one


def norms_by_batch(module: nn.Module) -> bool:
    """Return whether a module is torch's batch norm and uses the statistics of the batch."""
    plain = isinstance(module, _BatchNorm) and is_plain(module)
    return plain and (module.training or module.running_mean is None)


def is_plain(module: nn.Module) -> bool:
    """Return whether calling torch's norm or convolution runs only its operator."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return type(module).forward in FORWARDS and not hooks


def saves_memory() -> bool:
    """Return whether a custom backward may follow: not if torch compiles or traces."""
    special = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return torch.is_grad_enabled() and not special


def batch_statistics(norm: _BatchNorm, x: Tensor) -> Statistics:
    """Return the statistics that ``norm`` uses for a batch [N, C, H, W], without recording them.

    Raises:
        ValueError: The batch has one value per channel.
    """
    group = None
    if isinstance(norm, nn.SyncBatchNorm) and dist.is_available() and dist.is_initialized():
        group = norm.process_group or dist.group.WORLD
        group = group if dist.get_world_size(group) > 1 else None
    wide = torch.promote_types(x.dtype, torch.float32)
    # Elsewhere the result has the precision of these running statistics.
    unused = (None, None) if x.is_cuda else x.new_ones(2, x.shape[1], dtype=wide)
    mean, var = torch.ops.aten.batch_norm_update_stats(x, *unused, 0.0)
    count = x.numel() // x.shape[1]
    if group is not None:  # every process has a value: there are two or more
        local = torch.cat([mean, var, mean.new_full((1,), count)])
        every = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
        dist.all_gather(every, local, group=group)
        means, variances, counts = torch.stack(every).split([len(mean), len(mean), 1], 1)
        shares = counts / counts.sum()
        mean = (shares * means).sum(0)
        var = (shares * (variances + (means - mean).square())).sum(0)
        count = counts.sum()  # stays on the device: reading it would wait
    elif count < 2:
        raise ValueError(f'Expected more than 1 value per channel when training, got {x.shape}')
    return Statistics(mean, var, count, group)


def record(norm: _BatchNorm, statistics: Statistics) -> None:
    """Update the running statistics of a norm, if it has any and is in training."""
    if not (norm.training and norm.track_running_stats) or norm.running_mean is None:
        return
    norm.num_batches_tracked.add_(1)
    share = norm.momentum
    if share is None:
        share = norm.num_batches_tracked.to(norm.running_mean).reciprocal()
    mean, var, count, _ = statistics
    norm.running_mean.lerp_(mean.to(norm.running_mean), share)
    norm.running_var.lerp_((var * (count / (count - 1))).to(norm.running_var), share)


def apply_norm(norm: _BatchNorm, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
    """Return x [N, C, H, W] normalized by ``norm`` with the given statistics [C]."""
    weight, bias = as_wide(norm.weight, mean), as_wide(norm.bias, mean)
    return F.batch_norm(x, mean, var, weight, bias, False, 0.0, norm.eps)


def as_wide(parameter: Tensor | None, statistic: Tensor) -> Tensor | None:
    """Return a norm's parameter in the precision of its statistics; None if it has none."""
    return None if parameter is None else parameter.to(statistic.dtype)


def norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, statistics: Statistics, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias; that of x goes through the statistics too."""
    mean, var, count, group = statistics
    inverse = (var + eps).rsqrt()
    weight = as_wide(weight, mean)
    grad = grad.contiguous(memory_format=format_of(x))

    def backward(needed: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, None, None, mean, inverse, True, eps, needed
        )

    if group is None:
        return backward([True, True, True])
    _, d_weight, d_bias = backward([False, True, True])
    scale = inverse if weight is None else weight * inverse
    sums = scale * torch.stack([d_bias, d_weight])
    dx = grad * scale.view(1, -1, 1, 1)
    return through_statistics(dx, x, sums, statistics, eps).to(grad.dtype), d_weight, d_bias


def through_statistics(
    grad: Tensor, x: Tensor, sums: Tensor, statistics: Statistics, eps: float
) -> Tensor:
    """Return the gradient of x: ``grad`` plus the part that flows through the statistics of x.

    Args:
        grad: The part that doesn't flow through the statistics, [N, C, H, W].
        x: [N, C, H, W].
        sums: [2, C]: gradients of the norms' biases and weights in this process, times weight over
            deviation, summed over all norms of x.
        statistics: Of x.
        eps: Of the norms.
    """
    mean, var, count, group = statistics
    if group is not None:
        sums = sums.clone()
        dist.all_reduce(sums, group=group)
    slope = (var + eps).rsqrt() * sums[1] / count
    offset = sums[0] / count - mean * slope
    # In the precision of the statistics, since the parts may almost cancel.
    dx = grad - torch.addcmul(offset.view(1, -1, 1, 1), x.to(slope), slope.view(1, -1, 1, 1))
    return dx.to(grad.dtype)


def conv_backward(
    conv: nn.Conv2d, grad: Tensor, x: Tensor, weight: Tensor, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the needed gradients of x, weight and bias, in the precision of ``grad``."""
    return torch.ops.aten.convolution_backward(
        grad,
        x.to(grad.dtype),
        weight.to(grad.dtype),
        [conv.out_channels],
        conv.stride,
        conv.padding,
        conv.dilation,
        False,
        [0, 0],
        conv.groups,
        list(needed),
    )


def format_of(x: Tensor) -> torch.memory_format:
    """Return the memory format of x [N, C, H, W], or the closest one for other strides."""
    last = x.stride(1) == 1 and x.shape[1] > 1
    return torch.channels_last if last else torch.contiguous_format


def lean_conv(
    chain: Sequence[Callable[..., Tensor]],
    conv: nn.Conv2d,
    *inputs: Tensor,
    weight: Tensor | None = None,
) -> Tensor:
    """Return ``conv(chain(*inputs))``, saving only the inputs for backward.

    Outputs, gradients, random numbers and running statistics are those of plain calls. There are no
    second derivatives, and hooks of modules in the chain run twice. Plain calls run when compiling,
    as torch's compiler selects itself what to recompute, and for convolutions with hooks or a
    different forward.

    Args:
        chain: Cheap functions that run in sequence. The result must not be a view of an input that
            is written to later.
        conv: A convolution that pads with zeros.
        *inputs: Tensors.
        weight: Replaces the convolution's.
    """
    if not (saves_memory() and is_plain(conv)):
        return plain_conv(chain, conv, *inputs, weight=weight)
    weight = conv.weight if weight is None else weight
    return _LeanConv.apply(chain, conv, len(inputs), weight, conv.bias, *inputs, *_of(chain))


def plain_conv(
    chain: Sequence[Callable[..., Tensor]],
    conv: nn.Conv2d,
    *inputs: Tensor,
    weight: Tensor | None = None,
) -> Tensor:
    """Return the same as :func:`lean_conv`, saving what autograd saves."""
    x = _run(chain, inputs)
    return conv(x) if weight is None else conv._conv_forward(x, weight, conv.bias)


def _modules(chain: Sequence[Callable[..., Tensor]]) -> list[nn.Module]:
    return [m for step in chain if isinstance(step, nn.Module) for m in step.modules()]


def _of(chain: Sequence[Callable[..., Tensor]]) -> list[Tensor]:
    """Return the parameters of a chain, once each, always in the same order."""
    parameters: dict[int, Tensor] = {}
    for module in _modules(chain):
        # FSDP and DataParallel turn parameters into plain attributes.
        named = {**module._parameters, **vars(module)}
        parameters |= {
            id(named[k]): named[k] for k in sorted(named) if isinstance(named[k], Tensor)
        }
    return list(parameters.values())


class _LeanConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        chain: Sequence[Callable[..., Tensor]],
        conv: nn.Conv2d,
        number: int,
        weight: Tensor,
        bias: Tensor | None,
        *tensors: Tensor,
    ) -> Tensor:
        inputs = tensors[:number]  # the parameters of the chain follow
        ctx.chain, ctx.conv = chain, conv
        ctx.autocast = Autocast.of(inputs[0].device.type)
        ctx.random = _Random.of(chain, inputs[0].device)
        ctx.statistics = {}
        with ctx.autocast.entered():
            x = _run(chain, inputs, measured=ctx.statistics)
            y = conv._conv_forward(x, weight, bias)
        ctx.number, ctx.modes = number, [module.training for module in _modules(chain)]
        ctx.save_for_backward(weight, *tensors)  # parameters too: torch notices changes
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *inputs = ctx.saved_tensors[: 1 + ctx.number]
        needed = ctx.needs_input_grad[5:]
        if ctx.modes != [module.training for module in _modules(ctx.chain)]:
            raise RuntimeError("memory='lean': the mode was changed between forward and backward")
        leaves = [x.detach().requires_grad_(need) for x, need in zip(inputs, needed, strict=False)]
        others = [
            step
            for i, step in enumerate(ctx.chain)
            if isinstance(step, nn.Module) and i not in ctx.statistics
        ]
        context = ctx.autocast.entered(), ctx.random.again(), StatisticsUntouched(others)
        with torch.enable_grad(), context[0], context[1], context[2]:
            x = _run(ctx.chain, leaves, known=ctx.statistics)
        conv_needs = (x.requires_grad, *ctx.needs_input_grad[3:5])
        dx, d_weight, d_bias = conv_backward(ctx.conv, grad, x.detach(), weight, conv_needs)
        grads: list[Tensor | None] = [None] * len(needed)
        if x.requires_grad:
            of = {i: t for i, t in enumerate([*leaves, *_of(ctx.chain)]) if needed[i]}
            values = torch.autograd.grad(x, list(of.values()), dx.to(x.dtype), allow_unused=True)
            for i, value in zip(of, values, strict=True):
                grads[i] = value
        return None, None, None, _like(d_weight, weight), _like(d_bias, weight), *grads


class _Normed(torch.autograd.Function):
    """Normalize a batch by its own statistics, which are known."""

    @staticmethod
    def forward(
        ctx: Any,
        norm: _BatchNorm,
        statistics: Statistics,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.statistics, ctx.eps = statistics, norm.eps
        return apply_norm(norm, x, statistics.mean, statistics.var)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx, d_weight, d_bias = norm_backward(grad, x, weight, ctx.statistics, ctx.eps)
        affine = weight is not None
        return None, None, dx, d_weight if affine else None, d_bias if affine else None


class Autocast(NamedTuple):
    """The state of autocast in forward, for backward."""

    device: str
    dtype: torch.dtype
    enabled: bool

    @classmethod
    def of(cls, device: str) -> Autocast:
        """Return the current state for 'cpu', 'cuda', ..."""
        return cls(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))

    def entered(self) -> torch.autocast:
        """Return the context, without a cache of cast weights, which would have no gradients."""
        return torch.autocast(self.device, self.dtype, self.enabled, cache_enabled=False)


class _Random(NamedTuple):
    """Random states at the start of a chain with dropout; empty for other chains."""

    device: torch.device | None = None
    host: Tensor | None = None
    there: Tensor | None = None

    @classmethod
    def of(cls, chain: Sequence[Callable[..., Tensor]], device: torch.device) -> _Random:
        drops = [m for m in _modules(chain) if isinstance(m, _DropoutNd) and m.training and m.p]
        if not drops:
            return cls()
        there = None
        if device.type != 'cpu':
            there = getattr(torch, device.type).get_rng_state(device)
        return cls(device, torch.get_rng_state(), there)

    @contextmanager
    def again(self) -> Iterator[None]:
        if self.device is None:
            yield
            return
        kind = self.device.type
        with torch.random.fork_rng(
            [] if kind == 'cpu' else [self.device], device_type='cuda' if kind == 'cpu' else kind
        ):
            torch.set_rng_state(self.host)
            if self.there is not None:
                getattr(torch, kind).set_rng_state(self.there, self.device)
            yield


def _run(
    chain: Sequence[Callable[..., Tensor]],
    inputs: Sequence[Tensor],
    *,
    measured: dict[int, Statistics] | None = None,
    known: dict[int, Statistics] | None = None,
) -> Tensor:
    """Run a chain: plainly, recording the batch statistics of its norms, or using known ones."""
    x = inputs[0]
    for i, step in enumerate(chain):
        if measured is not None and norms_by_batch(step):
            measured[i] = batch_statistics(step, *inputs)
            record(step, measured[i])
            x = apply_norm(step, *inputs, measured[i].mean, measured[i].var)
        elif known is not None and i in known:
            x = _Normed.apply(step, known[i], *inputs, step.weight, step.bias)
        else:
            x = step(*inputs)
        inputs = (x,)
    return x


def _like(grad: Tensor | None, parameter: Tensor) -> Tensor | None:
    return None if grad is None else grad.to(parameter.dtype)
