"""Hooks for channels-last training, compiled backbones and the load report."""

import gc
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import Runner
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn.parallel import DistributedDataParallel

from mmdense.engine.resume import compare_settings
from mmdense.errors import UserError, warn
from mmdense.registry import HOOKS
from mmdense.weights.loading import check_min_loaded, load_checked


@HOOKS.register_module()
class ChannelsLastHook(Hook):
    """Run the model in channels-last memory format, in training, validation and test.

    Results stay the same up to rounding. Which format is faster depends on the machine: measure it.
    """

    def before_run(self, runner: Runner) -> None:
        """Convert the weights; convolutions return the memory format of theirs."""
        model = runner.model
        model.to(memory_format=torch.channels_last)
        # DDP's gradient buckets still have the old strides, which would scramble the gradients.
        if isinstance(model, DistributedDataParallel):
            runner.model = model.module
            del model
            gc.collect()  # otherwise the old wrapper's gradient hooks would still run
            runner.model = runner.wrap_model(runner.cfg.get('model_wrapper_cfg'), runner.model)


@HOOKS.register_module()
class CompileBackboneHook(Hook):
    """Train with the model's backbone compiled by :meth:`torch.nn.Module.compile`.

    A new image size compiles again, after two or three of them with dynamic shapes. The rest of
    the model, and everything in validation and test, runs uncompiled, so metrics don't depend on
    this hook. Parameter names stay the same.
    """

    def __init__(self) -> None:
        self._calls: list[tuple[nn.Module, Any]] = []

    def before_train(self, runner: Runner) -> None:
        """Compile every backbone in the model, such as a teacher's; UserError if it has none."""
        model = unwrap(runner.model)
        children = [getattr(module, 'backbone', None) for module in model.modules()]
        backbones = [child for child in children if isinstance(child, nn.Module)]
        if not backbones:
            raise UserError(f'{type(model).__name__} has no backbone to compile')
        for backbone in backbones:
            backbone.compile()
        self._calls = [(backbone, backbone._compiled_call_impl) for backbone in backbones]

    def before_val(self, runner: Runner) -> None:
        for backbone, _ in self._calls:
            backbone._compiled_call_impl = None

    def after_val(self, runner: Runner) -> None:
        for backbone, call in self._calls:
            backbone._compiled_call_impl = call

    def after_train(self, runner: Runner) -> None:
        self.before_val(runner)
        self._calls = []


@HOOKS.register_module(name=['LoadReportHook', 'CoverageHook'])  # the second is deprecated
class LoadReportHook(Hook):
    """Report what a checkpoint loads into the runner's model; stop the run if it is too little.

    Weights of other formats are renamed to mmdense's keys first.

    ``min_loaded`` is the least share of the tensors, from 0 to 1; 0 only reports. ``part`` must be
    loaded so, such as 'backbone' for training that starts from other weights, whose heads may have
    other classes: the whole model by default, and always where a run is resumed. ``min_coverage``
    is a deprecated alias of ``min_loaded``.
    """

    priority = 'VERY_HIGH'  # before EMAHook reads the weights

    def __init__(
        self, min_loaded: float = 1.0, part: str = '', min_coverage: float | None = None
    ) -> None:
        self.min_loaded = check_min_loaded(min_loaded, min_coverage)
        self.part = part

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Load the weights, as the runner will do again, and check the load report."""
        if isinstance(runner.model, FullyShardedDataParallel):  # it renames the parameters
            warn('the load report is not available under FSDP: missing weights go unnoticed')
            return
        model = unwrap(runner.model)
        in_part = self.part and hasattr(model, self.part) and not runner._resume
        weights = load_checked(
            model,
            checkpoint,
            source='the checkpoint',
            min_loaded=self.min_loaded,
            part=f'{self.part}.' if in_part else '',
        )
        if runner._resume and isinstance(runner, Runner):
            compare_settings(runner, checkpoint)
        state = checkpoint.get('state_dict') or {}
        if state.keys() != weights.keys() or any(state[k] is not v for k, v in weights.items()):
            checkpoint['state_dict'] = weights  # for EMAHook and the runner


def unwrap(model: nn.Module) -> nn.Module:
    """Return the detector or segmentor inside DDP, test-time augmentation and torch.compile."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel) or hasattr(model, '_orig_mod'):
        model = model._orig_mod if hasattr(model, '_orig_mod') else model.module
    return model
