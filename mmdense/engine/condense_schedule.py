"""The schedule by which CondenseNetV2's connections are pruned during training."""

from typing import Any

from mmengine.dist import broadcast
from mmengine.hooks import EMAHook, Hook
from mmengine.runner import Runner
from torch import nn

from mmdense.engine.hooks import unwrap
from mmdense.errors import UserError
from mmdense.models.backbones.condensenetv2 import CondenseNetV2
from mmdense.models.layers import pruning_stage
from mmdense.registry import HOOKS


@HOOKS.register_module()
class CondenseScheduleHook(Hook):
    """Prune the model's CondenseNetV2, in its learned form, stage by stage.

    In a config::

        custom_hooks = [dict(type='mmdense.CondenseScheduleHook')]

    The stages are spread evenly over the first half of the run, by epochs or by iterations, and the
    remaining weights train on for the second half. (A run of one iteration prunes nothing.) Each
    stage is logged, and the log shows the share of remaining connections as ``connections``.

    Checkpoints hold the masks: a resumed run continues where it stopped, and training from
    fully pruned weights needs no hook. ``save_best`` may pick a checkpoint from before the last
    stage, which can't be condensed completely.

    Pruning happens before the iteration, so that hooks that average or save weights after it see
    the new masks. They are copied to averaged models, since EMAHook ignores buffers of integers.
    """

    def before_train(self, runner: Runner) -> None:
        self._net = _find_network(runner.model)
        # As Python numbers, since reading the buffers would wait for the device.
        self._stage = self._net.stage
        self._share = self._net.connections()

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        net = self._net
        progress = runner.iter / runner.max_iters
        stage = pruning_stage(progress, net.arch.factor)
        if stage > self._stage:
            net.prune_to(progress)
            # Different devices may rank equal weights differently, and mmengine's DDP doesn't
            # broadcast buffers.
            for layer in net.learned_layers():
                for buffer in layer.buffers(recurse=False):
                    broadcast(buffer)
            _copy_to_averages(runner)
            self._stage, self._share = stage, net.connections()
            runner.logger.info(
                f'condense: stage {stage} of {net.last_stage} at iteration {runner.iter} of '
                f'{runner.max_iters}, {100 * self._share:.1f} % of the connections left'
            )
        runner.message_hub.update_scalar('train/connections', self._share)


def _find_network(model: nn.Module) -> CondenseNetV2:
    """Return the only CondenseNetV2 in its learned form."""
    networks = [module for module in model.modules() if isinstance(module, CondenseNetV2)]
    learned = [net for net in networks if net.form == 'learned']
    if len(learned) != 1:  # a teacher and its student would keep different connections
        raise UserError(
            'CondenseScheduleHook prunes exactly one CondenseNetV2, but '
            f'{type(unwrap(model)).__name__} has {len(learned)} that can be pruned: set '
            "backbone.type='mmdense.CondenseNetV2' and backbone.form='learned', or remove the hook "
            'from custom_hooks'
        )
    return learned[0]


def _copy_to_averages(runner: Runner) -> None:
    """Copy masks, counts and stages to the averaged models."""
    for hook in runner.hooks:
        if isinstance(hook, EMAHook):
            nets = map(_find_network, (hook.src_model, hook.ema_model.module))
            for layer, average in zip(*(net.learned_layers() for net in nets), strict=True):
                for name, buffer in layer.named_buffers(recurse=False):
                    average.get_buffer(name).copy_(buffer)
