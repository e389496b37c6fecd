"""Activation checkpointing that counts each batch once in running statistics."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

# Compiled graphs of torch 2.12 and 2.15 do, those of 2.4, 2.5 and 2.8 don't; others are untested.
COUNTS_ONCE = torch.__version__ >= (2, 12)
# What stands for statistics that are updated, but not read: no kernel is launched for it.
UNREAD = dict(
    running_mean=torch.empty_like, running_var=torch.empty_like, num_batches_tracked=lambda _: None
)


def recompute(
    module: nn.Module | Sequence[nn.Module], *inputs: Any, call: Callable[..., Any] | None = None
) -> Any:
    """Return ``module(*inputs)``, saving only the inputs and recomputing it in backward.

    Outputs, gradients, random numbers and running statistics are those of the plain call; torch's
    ``checkpoint`` alone would count each batch twice. Before torch 2.12 compiled graphs contain the
    plain call. Several modules run in sequence; inputs are tensors, or lists of them. ``call`` runs
    a module in another way than by calling it.
    """
    modules = [module] if isinstance(module, nn.Module) else module

    def run(*values: Any) -> Any:
        for part in modules:
            values = (part(*values),)
        return values[0]

    compiling = torch.compiler.is_compiling()
    run = call or run
    if not torch.is_grad_enabled() or (compiling and not COUNTS_ONCE):
        return run(*inputs)
    contexts = dict(context_fn=lambda: (nullcontext(), StatisticsUntouched(modules)))
    return checkpoint(run, *inputs, use_reentrant=False, **({} if compiling else contexts))


class StatisticsUntouched:
    """Let batch norms update copies of their statistics, since forward counted the batch already.

    torch enters it once for each backward pass through the same graph.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        inner = [m for module in modules for m in module.modules()]
        # Not by class: mmcv's synchronized norm has another one.
        self.norms = [m for m in inner if m.training and hasattr(m, 'running_mean')]
        self.records: list[dict[str, Tensor]] = []

    def __enter__(self) -> None:
        self.records = [dict(norm.named_buffers()) for norm in self.norms]
        for norm, record in zip(self.norms, self.records, strict=True):
            copies = UNREAD if _reads_none(norm) else {}
            for name, buffer in record.items():
                setattr(norm, name, copies.get(name, Tensor.clone)(buffer))

    def __exit__(self, *error: object) -> None:
        for norm, record in zip(self.norms, self.records, strict=True):
            for name, buffer in record.items():
                setattr(norm, name, buffer)


def _reads_none(norm: nn.Module) -> bool:
    """Return whether a norm in training is torch's, without hooks that might read statistics."""
    hooks = norm._forward_hooks or norm._forward_pre_hooks
    return type(norm).forward is _BatchNorm.forward and not hooks
