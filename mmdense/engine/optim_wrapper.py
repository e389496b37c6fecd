"""Training in bfloat16, without a GPU too."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.optim import OptimWrapper
from mmengine.runner import autocast
from torch import nn

from mmdense.registry import OPTIM_WRAPPERS

__all__ = ['BFloat16OptimWrapper']


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """Run the model under autocast to bfloat16; weights, gradients and steps stay in float32.

    Losses are not scaled: bfloat16 has the range of float32. mmengine's AmpOptimWrapper scales
    them, and refuses to run without a GPU.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Autocast on the device that mmengine chose; with DDP, also its context for accumulation.

        Args:
            model: The model, in its wrapper if there is one.
        """
        with super().optim_context(model), autocast(dtype=torch.bfloat16):
            yield
