"""The schedule that CondenseNetV2's connections are pruned by while it trains."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from mmengine.dist import broadcast
from mmengine.hooks import EMAHook, Hook
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import nn

from mmdense.errors import UserError
from mmdense.models.backbones.condensenetv2 import CondenseNetV2
from mmdense.models.layers import LearnedGroupConv, SparseReactivation, pruning_stage
from mmdense.registry import HOOKS

__all__ = ['CondenseScheduleHook']

LOSS = 'loss_group_lasso'


@HOOKS.register_module()
class CondenseScheduleHook(Hook):
    """Prune the model's CondenseNetV2, which must be of the learned form, stage by stage.

    One line of a config::

        custom_hooks = [dict(type='mmdense.CondenseScheduleHook')]

    The stages are spread over the first half of the run, by epochs or by iterations: the last one
    is reached in the middle, with every weight trained on for the other half (a run of a single
    iteration has no second half, and prunes nothing). Each gets a line in the log, which shows the
    share of the connections that is left as ``connections``.

    Masks are part of the checkpoint and the hook stores nothing: a resumed run continues where it
    was, and one from weights that are fully pruned needs no hook. Mind that ``save_best`` can pick
    a checkpoint from before the pruning was complete, which can't be condensed in full.

    Pruning happens before the iteration runs, so that the hooks after it, which average and save
    weights, see the new masks at any priority. Averages get them at once: EMAHook with
    ``update_buffers=True`` averages floats and leaves integers as they were.

    Args:
        group_lasso: Weight of the group lasso, a loss by which whole groups of weights vanish, as
            ``loss_group_lasso`` among the model's losses until the pruning is complete. 0, as
            published, for none.

    Raises:
        ValueError: A weight that is negative or not finite.
    """

    def __init__(self, *, group_lasso: float = 0.0) -> None:
        if not 0 <= group_lasso < math.inf:
            raise ValueError(f'group_lasso is {group_lasso}, must be a finite number from 0 up')
        self.group_lasso = group_lasso
        self._handle = None

    def before_train(self, runner: Runner) -> None:
        """Find the network, and how far it is pruned.

        Raises:
            UserError: Nothing that can be pruned, several networks, or frozen layers that are not
                fully pruned.
        """
        self._net = _network(runner.model)
        _check_frozen(self._net)
        # From here on Python numbers: to ask the buffers would wait for the device.
        self._stage = self._net.stage
        self._share = self._net.connections()
        self._remove()  # what a run that was interrupted has left
        if self.group_lasso:
            self._handle = _unwrapped(runner.model).register_forward_hook(
                self._add_loss, with_kwargs=True
            )

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Prune what is due at the share of the training that has been done."""
        net = self._net
        progress = runner.iter / runner.max_iters
        stage = pruning_stage(progress, net.arch.factor)
        if stage > self._stage:
            net.prune_to(progress)
            # Processes on unlike devices may rank equal weights differently, and DDP as mmengine
            # sets it up doesn't share buffers.
            for layer in _layers(net):
                for buffer in layer.buffers(recurse=False):
                    broadcast(buffer)
            _copy_to_averages(runner)
            self._stage, self._share = stage, net.connections()
            runner.logger.info(
                f'condense: stage {stage} of {net.last_stage} at iteration {runner.iter} of '
                f'{runner.max_iters}, {100 * self._share:.1f} % of the connections left'
            )
        runner.message_hub.update_scalar('train/connections', self._share)
        if self.group_lasso and self._stage == net.last_stage:
            # The log would go on to show the last values.
            runner.message_hub.update_scalar(f'train/{LOSS}', 0.0)

    def after_train(self, runner: Runner) -> None:
        """Take the loss off the model."""
        self._remove()

    def _remove(self) -> None:
        if self._handle is not None:
            self._handle.remove()
        self._handle = None

    def _add_loss(
        self, model: nn.Module, args: tuple, kwargs: Mapping[str, Any], output: Any
    ) -> Any:
        # Stays on the model to the end: compiled code doesn't notice that a hook was removed.
        wanted = model.training and kwargs.get('mode') == 'loss' and isinstance(output, dict)
        if not wanted or self._stage == self._net.last_stage:
            return output
        return {**output, LOSS: self.group_lasso * self._net.group_lasso()}


def _unwrapped(model: nn.Module) -> nn.Module:
    """Return the model inside wrappers for processes and of torch.compile."""
    while True:
        if is_model_wrapper(model):
            model = model.module
        elif hasattr(model, '_orig_mod'):
            model = model._orig_mod
        else:
            return model


def _network(model: nn.Module) -> CondenseNetV2:
    """Return the network that is to be pruned."""
    found = [module for module in model.modules() if isinstance(module, CondenseNetV2)]
    learned = [net for net in found if net.form == 'learned']
    if len(learned) > 1:
        raise UserError(
            f'CondenseScheduleHook prunes one CondenseNetV2, not {len(learned)}: a teacher and its '
            'student would keep different connections'
        )
    if learned:
        return learned[0]
    way_out = "give the backbone form='learned', or take the hook out of custom_hooks"
    if found:
        raise UserError(
            f'CondenseScheduleHook cannot prune a CondenseNetV2 of form {found[0].form!r}: '
            f'{way_out}'
        )
    raise UserError(
        'CondenseScheduleHook finds no CondenseNetV2 to prune in '
        f"{type(_unwrapped(model)).__name__}: take backbone.type='mmdense.CondenseNetV2' with "
        "form='learned', or take the hook out of custom_hooks"
    )


def _layers(model: nn.Module) -> list[LearnedGroupConv | SparseReactivation]:
    kinds = (LearnedGroupConv, SparseReactivation)
    return [module for module in model.modules() if isinstance(module, kinds)]


def _check_frozen(net: CondenseNetV2) -> None:
    if net.frozen_stages < 1:
        return
    frozen = [layer.stage for layer in _layers(net) if not layer.conv.weight.requires_grad]
    if min(frozen, default=net.last_stage) < net.last_stage:
        raise UserError(
            f'backbone.frozen_stages={net.frozen_stages} freezes layers at stage {min(frozen)} of '
            f'{net.last_stage} of pruning, which cannot adapt to what is pruned: set '
            'backbone.frozen_stages to -1 or 0, or load weights that are fully pruned'
        )


def _copy_to_averages(runner: Runner) -> None:
    """Copy masks, counts and stages to the averages of the model."""
    for hook in runner.hooks:
        if isinstance(hook, EMAHook):
            pairs = zip(_layers(hook.src_model), _layers(hook.ema_model.module), strict=True)
            for layer, average in pairs:
                for name, buffer in layer.named_buffers(recurse=False):
                    average.get_buffer(name).copy_(buffer)
