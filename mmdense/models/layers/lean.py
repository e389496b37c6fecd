"""Training that keeps what convolutions put out, and makes again what lies between them.

A convolution needs its input for the gradient of its weight. Where that input is made cheaply from
another one's output (concatenated, normed, activated, gated), keeping the output is enough. Batch
statistics are kept, so running ones are recorded once, and synchronised ones exchanged once.
N images, C channels, H x W pixels.
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


# What of torch's is done here by its operator.
FORWARDS = (_BatchNorm.forward, nn.SyncBatchNorm.forward, nn.Conv2d.forward)


class Statistics(NamedTuple):
    """Of the channels of a batch.

    Attributes:
        mean: [C], of float32 at least.
        var: [C], biased.
        count: Values per channel, of all processes that share the statistics.
        group: Those processes; None if there is one.
    """

    mean: Tensor
    var: Tensor
    count: int
    group: Any

    def part(self, channels: slice) -> Statistics:
        """Return those of some channels."""
        return self._replace(mean=self.mean[channels], var=self.var[channels])


def norms_by_batch(module: nn.Module) -> bool:
    """Return whether a module is torch's batch norm, in use with the statistics of the batch."""
    plain = isinstance(module, _BatchNorm) and is_plain(module)
    return plain and (module.training or module.running_mean is None)


def is_plain(module: nn.Module) -> bool:
    """Return whether calling torch's norm or convolution does nothing else than its operator."""
    own = type(module).forward not in FORWARDS
    return not (own or module._forward_hooks or module._forward_pre_hooks)


def saves_memory() -> bool:
    """Return whether a backward pass of ours may follow: not if torch compiles or traces."""
    special = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return torch.is_grad_enabled() and not special


def batch_statistics(norm: _BatchNorm, x: Tensor) -> Statistics:
    """Return those that ``norm`` uses for a batch [N, C, H, W]; nothing is recorded.

    Raises:
        ValueError: One value per channel.
    """
    group = None
    if isinstance(norm, nn.SyncBatchNorm) and dist.is_available() and dist.is_initialized():
        group = norm.process_group or dist.group.WORLD
        group = group if dist.get_world_size(group) > 1 else None
    wide = torch.promote_types(x.dtype, torch.float32)
    # Where there are running ones, theirs is the precision of the result.
    unused = x.new_zeros(x.shape[1], dtype=wide), x.new_ones(x.shape[1], dtype=wide)
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
    """Count a batch in the running statistics of a norm, if it keeps some and is in training."""
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
    """Return x [N, C, H, W] normed by given statistics [C], as ``norm`` does by its own."""
    weight, bias = as_wide(norm.weight, mean), as_wide(norm.bias, mean)
    return F.batch_norm(x, mean, var, weight, bias, False, 0.0, norm.eps)


def as_wide(parameter: Tensor | None, statistic: Tensor) -> Tensor | None:
    """Return a norm's parameter in its statistics' precision, if it has it."""
    return None if parameter is None else parameter.to(statistic.dtype)


def norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, statistics: Statistics, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias; that of x goes through the statistics too."""
    mean, var, count, group = statistics
    inverse = (var + eps).rsqrt()
    weight = as_wide(weight, mean)
    grad = grad.contiguous(memory_format=format_of(x))

    def backward(wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
        return torch.ops.aten.native_batch_norm_backward(
            grad, x, weight, None, None, mean, inverse, True, eps, wanted
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
    """Return the gradient of x, whose part that doesn't go through its statistics is known.

    Args:
        grad: That part, [N, C, H, W].
        x: [N, C, H, W].
        sums: [2, C]: gradients of the norms' biases and weights in this process, times weight over
            deviation, summed over all norms of x.
        statistics: Of x.
        eps: Of all the norms.
    """
    mean, var, count, group = statistics
    if group is not None:
        sums = sums.clone()
        dist.all_reduce(sums, group=group)
    slope = (var + eps).rsqrt() * sums[1] / count
    offset = sums[0] / count - mean * slope
    # In the statistics' precision: the parts may almost cancel.
    dx = grad - torch.addcmul(offset.view(1, -1, 1, 1), x.to(slope), slope.view(1, -1, 1, 1))
    return dx.to(grad.dtype)


def conv_backward(
    conv: nn.Conv2d, grad: Tensor, x: Tensor, weight: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the gradients of x, weight and bias, those that are wanted, in grad's precision."""
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
        list(wanted),
    )


def format_of(x: Tensor) -> torch.memory_format:
    """Return the memory format that a map [N, C, H, W] is next to."""
    last = x.stride(1) == 1 and x.shape[1] > 1
    return torch.channels_last if last else torch.contiguous_format


def lean_conv(
    chain: Sequence[Callable[..., Tensor]],
    conv: nn.Conv2d,
    *inputs: Tensor,
    weight: Tensor | None = None,
) -> Tensor:
    """Return ``conv`` of what ``chain`` makes of the inputs, keeping the inputs alone for backward.

    Outputs, gradients, random numbers and running statistics are those of plain calls. There are no
    second derivatives, and hooks of what the chain holds run twice. It is the plain call when
    compiling, as torch's compiler chooses itself what to make again, and for a convolution with
    hooks or a forward of its own.

    Args:
        chain: What is called on the inputs and then on one another's results; cheap. The last
            results must not be views of an input that is written to later.
        conv: A convolution that pads with zeros.
        *inputs: Tensors.
        weight: In place of the convolution's.
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
    """Return the same as :func:`lean_conv` without its economy."""
    x = _run(chain, inputs)
    return conv(x) if weight is None else conv._conv_forward(x, weight, conv.bias)


def _modules(chain: Sequence[Callable[..., Tensor]]) -> list[nn.Module]:
    return [m for step in chain if isinstance(step, nn.Module) for m in step.modules()]


def _of(chain: Sequence[Callable[..., Tensor]]) -> list[Tensor]:
    """Return the parameters of a chain, once each, in the same order at any time."""
    found: dict[int, Tensor] = {}
    for module in _modules(chain):
        # FSDP and DataParallel turn parameters into plain attributes.
        named = {**module._parameters, **vars(module)}
        found |= {id(named[k]): named[k] for k in sorted(named) if isinstance(named[k], Tensor)}
    return list(found.values())


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
        ctx.save_for_backward(weight, *tensors)  # parameters too: torch sees if they change
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
        wanted = (x.requires_grad, *ctx.needs_input_grad[3:5])
        dx, d_weight, d_bias = conv_backward(ctx.conv, grad, x.detach(), weight, wanted)
        grads: list[Tensor | None] = [None] * len(needed)
        if x.requires_grad:
            of = {i: t for i, t in enumerate([*leaves, *_of(ctx.chain)]) if needed[i]}
            found = torch.autograd.grad(x, list(of.values()), dx.to(x.dtype), allow_unused=True)
            for i, value in zip(of, found, strict=True):
                grads[i] = value
        return None, None, None, _like(d_weight, weight), _like(d_bias, weight), *grads


class _Normed(torch.autograd.Function):
    """A batch normed by its own statistics, which are known."""

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
    """The state of autocast, to go on with in backward."""

    device: str
    dtype: torch.dtype
    enabled: bool

    @classmethod
    def of(cls, device: str) -> Autocast:
        """Return the state at this moment for 'cpu', 'cuda', ..."""
        return cls(device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))

    def entered(self) -> torch.autocast:
        """Return the context. Narrow weights that it makes without gradients are not kept."""
        return torch.autocast(self.device, self.dtype, self.enabled, cache_enabled=False)


class _Random(NamedTuple):
    """Random states that a chain with dropout began with, if it has any."""

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
    """Call a chain: plainly, or noting the batch statistics of its norms, or by known ones."""
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
