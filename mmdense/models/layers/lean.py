"""Selective recomputation: convolution outputs are saved, the layers in between are recomputed.

A convolution needs its input for the gradient of its weight. If that input is cheap to compute from
other convolutions' outputs (concatenation, norm, activation, gate), saving these outputs is enough.
Batch statistics and gates are saved too, so running statistics are updated once, synchronized ones
exchanged once, and small layers not launched again. N images, C channels, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from timm.layers import SEModule
from torch import Tensor, nn
from torch import distributed as dist
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import get_device_states, set_device_states

from mmdense.models.layers.recompute import StatisticsUntouched

# Of every module, none of them a parameter.
ATTRIBUTES = frozenset(vars(nn.Module()))
# Modules with these forwards are replaced by their operators here.
FORWARDS = _BatchNorm.forward, nn.SyncBatchNorm.forward, nn.Conv2d.forward, SEModule.forward


class Statistics(NamedTuple):
    """Statistics of the channels of a batch."""

    mean: Tensor  # [C], in float32 at least
    var: Tensor | None  # [C], biased; None where only 1 / deviation is known
    count: int  # values per channel, in all processes that share the statistics
    group: Any  # these processes; None for a single one


def norms_by_batch(module: nn.Module) -> bool:
    """Return whether a module is torch's batch norm and uses the statistics of the batch."""
    plain = isinstance(module, _BatchNorm) and is_plain(module)
    return plain and (module.training or module.running_mean is None)


def is_plain(module: nn.Module) -> bool:
    """Return whether calling a norm, convolution or gate runs only torch's or timm's operators."""
    hooks = module._forward_hooks or module._forward_pre_hooks
    return type(module).forward in FORWARDS and not hooks


def saves_memory() -> bool:
    """Return whether a custom backward may follow: not if torch compiles or traces."""
    special = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return torch.is_grad_enabled() and not special


def batch_statistics(norm: _BatchNorm, x: Tensor) -> Statistics:
    """Return the statistics that ``norm`` uses for a batch [N, C, H, W], without recording them.

    ValueError if the batch has one value per channel.
    """
    group, count = group_of(norm, x), x.numel() // x.shape[1]
    wide = torch.promote_types(x.dtype, torch.float32)
    # Elsewhere the result has the precision of these running statistics.
    unused = (None, None) if x.is_cuda else x.new_ones(2, x.shape[1], dtype=wide)
    mean, var = torch.ops.aten.batch_norm_update_stats(x, *unused, 0.0)
    if group is not None:
        local = torch.cat([mean, var, mean.new_full((1,), count)])
        every = [torch.empty_like(local) for _ in range(dist.get_world_size(group))]
        dist.all_gather(every, local, group=group)
        means, variances, counts = torch.stack(every).split([len(mean), len(mean), 1], 1)
        shares = counts / counts.sum()
        mean = (shares * means).sum(0)
        var = (shares * (variances + (means - mean).square())).sum(0)
        count = counts.sum()  # stays on the device: reading it would wait
    return Statistics(mean, var, count, group)


def group_of(norm: _BatchNorm, x: Tensor) -> Any:
    """Return the processes that share the statistics of a batch; None for a single one."""
    if isinstance(norm, nn.SyncBatchNorm) and dist.is_available() and dist.is_initialized():
        group = norm.process_group or dist.group.WORLD
        if dist.get_world_size(group) > 1:  # each has a value: there are two or more
            return group
    if x.numel() < 2 * x.shape[1]:
        raise ValueError(f'Expected more than 1 value per channel when training, got {x.shape}')
    return None


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


class Norm(NamedTuple):
    """A batch norm as it ran, for backward."""

    module: _BatchNorm
    statistics: Statistics
    inverse: Tensor  # [C], 1 / deviation
    by_batch: bool = True  # whether the statistics are those of the batch

    @classmethod
    def of(cls, norm: _BatchNorm, statistics: Statistics, *, by_batch: bool = True) -> Norm:
        """Return a norm that runs with these statistics."""
        return cls(norm, statistics, (statistics.var + norm.eps).rsqrt(), by_batch)

    @classmethod
    def run(cls, norm: _BatchNorm, x: Tensor) -> tuple[Tensor, Norm]:
        """Normalize x by its own statistics, and update the running ones."""
        wide = torch.promote_types(x.dtype, torch.float32)
        tracks = norm.training and norm.track_running_stats and norm.running_mean is not None
        running = (norm.running_mean, norm.running_var) if tracks else ()
        same = all(t is not None and t.dtype == wide for t in (norm.weight, *running))
        if same and norm.momentum is not None and group_of(norm, x) is None:
            if tracks:
                norm.num_batches_tracked.add_(1)
            tensors = x, norm.weight, norm.bias, *(running or (None, None))
            y, mean, inverse = torch.native_batch_norm(*tensors, True, norm.momentum, norm.eps)
            return y, cls(norm, Statistics(mean, None, 0, None), inverse)
        statistics = batch_statistics(norm, x)
        record(norm, statistics)
        known = cls.of(norm, statistics)
        return known.apply(x), known

    def parameters(self) -> tuple[Tensor | None, ...]:
        """Return weight and bias."""
        return self.module.weight, self.module.bias

    def weight(self) -> Tensor:
        """Return the weight; ones if there is none, as CUDA computes no sums without one."""
        weight = self.module.weight
        return torch.ones_like(self.inverse) if weight is None else weight.to(self.inverse)

    def apply(self, x: Tensor) -> Tensor:
        """Return the output for x [N, C, H, W], with the same statistics."""
        mean, inverse = self.statistics.mean, self.inverse
        weight, bias = (p if p is None else p.to(inverse) for p in self.parameters())
        if x.is_cuda:  # F.batch_norm would launch three kernels
            return torch.batch_norm_elemt(x, weight, bias, mean, inverse, self.module.eps)
        # Not F.batch_norm, which refuses eps 0 in some versions of torch.
        return torch.batch_norm(x, weight, bias, mean, inverse.pow(-2), False, 0.0, 0.0, False)

    def backward(
        self, grad: Tensor, x: Tensor, needed: Sequence[bool], *, through: bool = True
    ) -> Sequence[Tensor | None]:
        """Return the needed gradients of x, weight and bias; the latter are of this process.

        That of x goes ``through`` the statistics too, or takes them for constants.
        """
        mean, var, count, group = self.statistics
        grad = grad.contiguous(memory_format=format_of(x))
        shared = through and group is not None
        needed = [False, True, True] if shared else needed
        plain = self.module.weight is None and not any(needed[1:])
        weight, inverse = None if plain else self.weight(), self.inverse
        running = (None, None) if through else (mean, var)
        dx, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
            *(grad, x, weight, *running, mean, inverse, through, self.module.eps),
            needed,
        )
        if shared:
            scale = weight * inverse
            sums = scale * torch.stack([d_bias, d_weight])
            dist.all_reduce(sums, group=group)
            slope = inverse * sums[1] / count
            offset = sums[0] / count - mean * slope
            scale, slope, offset = (value.view(1, -1, 1, 1) for value in (scale, slope, offset))
            # In the precision of the statistics, since the parts may almost cancel.
            dx = grad * scale - torch.addcmul(offset, x.to(mean.dtype), slope)
            dx = dx.to(grad.dtype)
        return dx, d_weight, d_bias


def conv_backward(
    conv: nn.Conv2d, grad: Tensor, x: Tensor, weight: Tensor, needed: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return the needed gradients of x, weight and bias, in the precision of ``grad``."""
    tensors = grad, x.to(grad.dtype), weight.to(grad.dtype)
    options = conv.stride, conv.padding, conv.dilation, False, [0, 0], conv.groups
    backward = torch.ops.aten.convolution_backward
    return backward(*tensors, [conv.out_channels], *options, list(needed))


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

    The chain are cheap functions that run in sequence; the result must not be a view of an input
    that is written to later. The convolution pads with zeros; ``weight`` replaces its.
    """
    if not (saves_memory() and is_plain(conv)):
        return plain_conv(chain, conv, *inputs, weight=weight)
    weight = conv.weight if weight is None else weight
    modules = _modules(chain)  # once: walking through them takes as long as a small layer
    tensors = weight, conv.bias, *inputs, *_of(modules)
    return _LeanConv.apply(chain, modules, conv, len(inputs), *tensors)


def plain_conv(
    chain: Sequence[Callable[..., Tensor]],
    conv: nn.Conv2d,
    *inputs: Tensor,
    weight: Tensor | None = None,
) -> Tensor:
    """Return the same as :func:`lean_conv`, saving what autograd saves."""
    x = _run(chain, inputs)
    on_gpu = conv.weight.is_cuda and torch.compiler.is_compiling()
    if on_gpu and conv.bias is not None and is_plain(conv):
        # Inductor would add the bias in a kernel of its own, and store the sum for backward.
        x = conv._conv_forward(x, conv.weight if weight is None else weight, None)
        return x + conv.bias.to(x.dtype).view(-1, 1, 1)
    return conv(x) if weight is None else conv._conv_forward(x, weight, conv.bias)


def _modules(chain: Sequence[Callable[..., Tensor]]) -> list[nn.Module]:
    return [m for step in chain if isinstance(step, nn.Module) for m in step.modules()]


def _of(modules: Sequence[nn.Module]) -> list[Tensor]:
    """Return the parameters of modules, once each, always in the same order."""
    parameters: dict[int, Tensor] = {}
    for module in modules:
        # FSDP and DataParallel turn parameters into plain attributes.
        others = {name: vars(module)[name] for name in vars(module).keys() - ATTRIBUTES}
        named = {**module._parameters, **others}
        tensors = [named[name] for name in sorted(named) if isinstance(named[name], Tensor)]
        parameters |= {id(tensor): tensor for tensor in tensors}
    return list(parameters.values())


class _LeanConv(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        chain: Sequence[Callable[..., Tensor]],
        modules: Sequence[nn.Module],
        conv: nn.Conv2d,
        number: int,
        weight: Tensor,
        bias: Tensor | None,
        *tensors: Tensor,
    ) -> Tensor:
        inputs = tensors[:number]  # the parameters of the chain follow
        ctx.chain, ctx.modules, ctx.conv = chain, modules, conv
        ctx.autocast = current_autocast(inputs[0].device.type)
        drops = any(isinstance(m, _DropoutNd) and m.training and m.p for m in modules)
        ctx.random = (torch.get_rng_state(), *get_device_states(inputs[0])) if drops else None
        ctx.kept = {}
        with ctx.autocast:
            x = _run(chain, inputs, ctx.kept)
            y = conv._conv_forward(x, weight, bias)
        ctx.number, ctx.modes = number, [module.training for module in modules]
        ctx.save_for_backward(weight, *tensors)  # parameters too: torch notices changes
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        weight, *inputs = ctx.saved_tensors[: 1 + ctx.number]
        needed = ctx.needs_input_grad[6:]
        if ctx.modes != [module.training for module in ctx.modules]:
            raise RuntimeError("memory='lean': the mode was changed between forward and backward")
        leaves = [x.detach().requires_grad_(need) for x, need in zip(inputs, needed, strict=False)]
        others = [step for i, step in enumerate(ctx.chain) if i not in ctx.kept]
        untouched = StatisticsUntouched([step for step in others if isinstance(step, nn.Module)])
        with torch.enable_grad(), ctx.autocast, _random_again(ctx.random), untouched:
            x = _run(ctx.chain, leaves, ctx.kept, again=True)
        conv_needs = (x.requires_grad, *ctx.needs_input_grad[4:6])
        dx, d_weight, d_bias = conv_backward(ctx.conv, grad, x.detach(), weight, conv_needs)
        grads = iter(())
        if x.requires_grad:
            of = zip([*leaves, *_of(ctx.modules)], needed, strict=False)
            of = [tensor for tensor, need in of if need]
            grads = iter(torch.autograd.grad(x, of, dx.to(x.dtype), allow_unused=True))
        grads = [next(grads, None) if need else None for need in needed]
        conv_grads = (d if d is None else d.to(weight.dtype) for d in (d_weight, d_bias))
        return None, None, None, None, *conv_grads, *grads


class _Gate(NamedTuple):
    """What a gate computed from a batch, with the graph of its derivatives."""

    modules: list[nn.Module]
    mean: Tensor  # of x, [N, C, 1, 1]
    value: Tensor  # [N, C, 1, 1]
    trained: list[Tensor]

    @classmethod
    def run(cls, se: SEModule, x: Tensor) -> tuple[Tensor, _Gate]:
        """Return x times the gate, and the gate."""
        with torch.enable_grad():
            mean = x.detach().mean((2, 3), keepdim=True).requires_grad_()
            value = se.gate(se.fc2(se.act(se.bn(se.fc1(mean)))))
        modules = list(se.modules())
        known = cls(modules, mean, value, [p for p in _of(modules) if p.requires_grad])
        return known.apply(x), known

    def apply(self, x: Tensor) -> Tensor:
        return x * self.value.detach()

    def parameters(self) -> tuple[Tensor, ...]:
        return tuple(p for p in _of(self.modules) if p.requires_grad)  # FSDP has others in backward

    def backward(self, grad: Tensor, x: Tensor, needed: Sequence[bool]) -> Sequence[Tensor]:
        _, mean, value, trained = self
        d_value = (grad * x).sum((2, 3), keepdim=True).to(value.dtype)
        # The graph stays, for a second backward pass.
        options = dict(retain_graph=True, allow_unused=True)
        d_mean, *grads = torch.autograd.grad(value, [mean, *trained], d_value, **options)
        return torch.addcmul(d_mean / x[0, 0].numel(), grad, value.detach()), *grads


class _Again(torch.autograd.Function):
    """Apply a norm or a gate again; its derivatives go through what it computed from the batch."""

    @staticmethod
    def forward(ctx: Any, known: Norm | _Gate, x: Tensor, *parameters: Tensor | None) -> Tensor:
        ctx.known = known
        ctx.save_for_backward(x)
        return known.apply(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        needed = ctx.needs_input_grad[1:]
        grads = ctx.known.backward(grad, *ctx.saved_tensors, needed)
        return None, *(g if need else None for g, need in zip(grads, needed, strict=True))


def current_autocast(device: str) -> torch.autocast:
    """Return the state of autocast for 'cpu', 'cuda', ..., to enter now and in backward.

    It has no cache of cast weights, which would have no gradients.
    """
    state = torch.get_autocast_dtype(device), torch.is_autocast_enabled(device)
    return torch.autocast(device, *state, cache_enabled=False)


@contextmanager
def _random_again(states: tuple[Tensor, list[int], list[Tensor]] | None) -> Iterator[None]:
    if states is None:
        yield
        return
    host, devices, there = states
    with torch.random.fork_rng(devices):
        torch.set_rng_state(host)
        set_device_states(devices, there)
        yield


def _run(
    chain: Sequence[Callable[..., Tensor]],
    inputs: Sequence[Tensor],
    kept: dict[int, Norm | _Gate] | None = None,
    *,
    again: bool = False,
) -> Tensor:
    """Run a chain: plainly, keeping what norms and gates computed, or again with what they kept."""
    x = inputs[0]
    for i, step in enumerate(chain):
        kind = _kind(step) if kept is not None and not again else None
        if kind is not None:
            x, kept[i] = kind.run(step, *inputs)
        elif again and i in kept:
            x = _Again.apply(kept[i], *inputs, *kept[i].parameters())
        else:
            x = step(*inputs)
        inputs = (x,)
    return x


def _kind(step: Callable[..., Tensor]) -> type[Norm] | type[_Gate] | None:
    if norms_by_batch(step):
        return Norm
    return _Gate if isinstance(step, SEModule) and is_plain(step) and not step.add_maxpool else None
