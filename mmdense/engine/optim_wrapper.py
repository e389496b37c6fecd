"""Mixed-precision training in bfloat16, on CPUs and GPUs."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.optim import OptimWrapper
from mmengine.runner import autocast
from torch import nn

from mmdense.registry import OPTIM_WRAPPERS


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """Run the model under bfloat16 autocast; weights, gradients and optimizer steps stay float32.

    bfloat16 has the range of float32, so losses are not scaled. mmengine's AmpOptimWrapper scales
    them and requires a GPU.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[None]:
        """Autocast on mmengine's device, inside DDP's ``no_sync`` while gradients accumulate."""
        with super().optim_context(model), autocast(dtype=torch.bfloat16):
            yield
