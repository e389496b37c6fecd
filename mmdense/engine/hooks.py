"""Hooks for mmengine's runner."""

from __future__ import annotations

import gc
import logging
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import Runner
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from mmdense.errors import UserError
from mmdense.registry import HOOKS
from mmdense.weights.loading import check_min_loaded, load_checked

__all__ = ['ChannelsLastHook', 'CompileBackboneHook', 'LoadReportHook', 'unwrap']


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


@HOOKS.register_module(name=['LoadReportHook', 'CoverageHook'])  # the second is deprecated
class LoadReportHook(Hook):
    """Report what a checkpoint loads into the runner's model; stop the run if it is too little.

    Weights of other formats are renamed to mmdense's keys first.

    Args:
        min_loaded: Least share of the tensors, from 0 to 1; 0 only reports.
        part: Part of the model that must be loaded so, such as 'backbone' for training that starts
            from other weights, whose heads may have other classes; the whole model by default,
            and always where a run is resumed.
        min_coverage: Deprecated alias of ``min_loaded``.
    """

    priority = 'VERY_HIGH'  # before averages take the weights too

    def __init__(
        self, min_loaded: float = 1.0, part: str = '', min_coverage: float | None = None
    ) -> None:
        self.min_loaded = check_min_loaded(min_loaded, min_coverage)
        self.part = part

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Load into the model, as the runner will do again, and see what became of it."""
        if isinstance(runner.model, FullyShardedDataParallel):  # its names are not the model's
            print_log(
                'under FSDP it is not checked whether the checkpoint fills the model',
                logger='current',
                level=logging.WARNING,
            )
            return
        model = unwrap(runner.model)
        in_part = self.part and hasattr(model, self.part) and not runner._resume
        weights = load_checked(
            model,
            checkpoint,
            source='the checkpoint',
            min_loaded=self.min_loaded,
            prefix=f'{self.part}.' if in_part else '',
        )
        held = checkpoint.get('state_dict') or {}
        if held.keys() != weights.keys() or any(held[k] is not v for k, v in weights.items()):
            checkpoint['state_dict'] = weights  # averages and the runner take these


def unwrap(model: nn.Module) -> nn.Module:
    """Return the detector or segmentor inside wrappers for processes and test-time augmentation."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model
