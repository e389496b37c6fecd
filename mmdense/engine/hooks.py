"""Hooks for mmengine's runner."""

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner

from mmdense.registry import HOOKS

__all__ = ['ChannelsLastHook']


@HOOKS.register_module()
class ChannelsLastHook(Hook):
    """Run the model in channels-last memory format, in training, validation and test.

    Convolutions answer in the format of their weights, so putting the weights into it is enough:
    images need no conversion, results stay the same. Which format is the faster depends on the
    machine: measure it. Under DDP the gradients' buckets exist before the hook runs, so torch warns
    that their strides differ.
    """

    def before_run(self, runner: Runner) -> None:
        """Convert all four-dimensional weights."""
        runner.model.to(memory_format=torch.channels_last)
