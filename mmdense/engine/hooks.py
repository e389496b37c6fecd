"""Hooks for mmengine's runner."""

from __future__ import annotations

import gc
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mmdense.engine.coverage import unwrap
from mmdense.errors import UserError
from mmdense.registry import HOOKS

__all__ = ['ChannelsLastHook', 'CompileBackboneHook']


@HOOKS.register_module()
class ChannelsLastHook(Hook):
    """Run the model in channels-last memory format, in training, validation and test.

    Convolutions answer in the format of their weights, so putting the weights into it is enough:
    images need no conversion, results stay the same. Which format is the faster depends on the
    machine: measure it.

    DDP has laid out buckets for the gradients by then, and reads them by the weights' new strides:
    until it makes new ones, which is after the first iteration, or never with
    ``find_unused_parameters``, it would mix up each gradient. So it is made again.
    """

    def before_run(self, runner: Runner) -> None:
        """Convert all four-dimensional weights."""
        model = runner.model
        model.to(memory_format=torch.channels_last)
        if isinstance(model, DistributedDataParallel):
            runner.model = model.module
            del model
            gc.collect()  # of two that listen to the same parameters, each would wait for its own
            runner.model = runner.wrap_model(runner.cfg.get('model_wrapper_cfg'), runner.model)


@HOOKS.register_module()
class CompileBackboneHook(Hook):
    """Train with the model's backbone compiled by :meth:`torch.nn.Module.compile`.

    Batches of one size make it compile once, others a second or third time, then with sizes as
    variables. The rest of the model runs as it is; so does everything in validation and test, whose
    results are then those of any other run of the checkpoint. Names of parameters stay the same.
    """

    def __init__(self) -> None:
        self._calls: list[tuple[nn.Module, Any]] = []

    def before_train(self, runner: Runner) -> None:
        """Compile every backbone in the model; a teacher's and its student's are two.

        Raises:
            UserError: The model has none.
        """
        model = unwrap(runner.model)
        children = [getattr(module, 'backbone', None) for module in model.modules()]
        backbones = [child for child in children if isinstance(child, nn.Module)]
        if not backbones:
            raise UserError(f'{type(model).__name__} has no backbone to compile')
        for backbone in backbones:
            backbone.compile()
        self._calls = [(backbone, backbone._compiled_call_impl) for backbone in backbones]

    def before_val(self, runner: Runner) -> None:
        """Run the backbones as they are."""
        for backbone, _ in self._calls:
            backbone._compiled_call_impl = None

    def after_val(self, runner: Runner) -> None:
        """Go on with the compiled ones."""
        for backbone, call in self._calls:
            backbone._compiled_call_impl = call

    def after_train(self, runner: Runner) -> None:
        """Run the backbones as they are from here on."""
        self.before_val(runner)
        self._calls = []
