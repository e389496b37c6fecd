"""Recomputation of activations that leaves running statistics alone."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

__all__ = ['StatisticsUntouched', 'recompute']

# Of compiled graphs: 2.12 and 2.15 do, 2.4, 2.5 and 2.8 don't; those between were not tried.
COUNTS_ONCE = torch.__version__ >= (2, 12)


def recompute(module: nn.Module | Sequence[nn.Module], *inputs: Any) -> Any:
    """Return ``module(*inputs)``, keeping the inputs alone and running it again in backward.

    Outputs, gradients, random numbers and batch norms' running statistics are those of the plain
    call: torch's ``checkpoint`` by itself would count each batch twice. In a graph that a torch
    before 2.12 compiles it is the plain call.

    Args:
        module: What to run; or several, each of which takes what the one before returns.
        *inputs: Tensors, or lists of them.
    """
    modules = [module] if isinstance(module, nn.Module) else module

    def run(*values: Any) -> Any:
        for part in modules:
            values = (part(*values),)
        return values[0]

    compiling = torch.compiler.is_compiling()
    if not torch.is_grad_enabled() or (compiling and not COUNTS_ONCE):
        return run(*inputs)
    if compiling:
        return checkpoint(run, *inputs, use_reentrant=False)
    return checkpoint(
        run,
        *inputs,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), StatisticsUntouched(modules)),
    )


class StatisticsUntouched:
    """Let batch norms record into copies: the batch was counted in the forward pass.

    torch enters it once for each backward pass through the same graph.
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        within = [norm for module in modules for norm in module.modules()]
        # By what they keep: mmcv's own synchronised norm is of another class.
        self.norms = [m for m in within if m.training and hasattr(m, 'running_mean')]
        self.records: list[dict[str, Tensor]] = []

    def __enter__(self) -> None:
        self.records = [dict(norm.named_buffers()) for norm in self.norms]
        for norm, record in zip(self.norms, self.records, strict=True):
            for name, buffer in record.items():
                setattr(norm, name, buffer.clone())

    def __exit__(self, *error: object) -> None:
        for norm, record in zip(self.norms, self.records, strict=True):
            for name, buffer in record.items():
                setattr(norm, name, buffer)
