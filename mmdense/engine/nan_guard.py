"""Stop training on NaN or infinite losses and weights, before they reach a checkpoint."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

from mmengine.dist import all_gather_object, is_distributed
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor
from torch.utils._pytree import tree_leaves

from mmdense.engine.checkpoint_hook import last_checkpoint
from mmdense.engine.stopping import StopSignal
from mmdense.errors import UserError, first_of
from mmdense.registry import HOOKS

SHOWN = 8  # images, and losses, in the message


@dataclass(frozen=True)
class _BadIteration:
    """The first of several consecutive iterations whose loss was not finite."""

    iteration: int  # as in the log, from 1
    losses: tuple[str, ...]  # such as 'loss_bbox nan'
    lr: float  # the highest
    images: tuple[str, ...]  # files


@HOOKS.register_module(name=['NaNGuardHook', 'FiniteHook'])  # the second is deprecated
class NaNGuardHook(Hook):
    """Stop training on NaN or infinite numbers, and keep such weights out of checkpoints.

    The recipes have it in ``default_hooks``::

        default_hooks = dict(nan_guard=dict(type='mmdense.NaNGuardHook'))

    If the loss is not finite and the model's weights or statistics are not finite either, the run
    stops at once, since it cannot recover. If the weights are finite, it stops after ``patience``
    (from 1) such iterations in a row: the loss of an empty batch or a step skipped by a gradient
    scaler may be harmless. The UserError names the first such iteration, its images, learning rate
    and losses.

    The hook reads the numbers that mmengine has fetched for the log anyway, so it never waits for
    the GPU. In distributed training all processes must stop together: they exchange their numbers
    every ``patience`` iterations, so the run stops up to that much later. A checkpoint that is due
    before then is not written if its weights are not finite.
    """

    # After averaging and logging, before the learning rate changes and checkpoints are written.
    priority = 'BELOW_NORMAL'

    def __init__(self, patience: int = 5) -> None:
        if patience < 1:
            raise ValueError(f'patience is {patience}, must be at least 1')
        self.patience = patience
        self._streak = 0
        self._first: _BadIteration | None = None
        self._ignored: frozenset[str] = frozenset()

    def before_train(self, runner: Runner) -> None:
        """Note which buffers hold infinite numbers on purpose, such as attention masks."""
        self._streak, self._first = 0, None
        self._ignored = frozenset(_not_finite(runner.model.named_buffers()))

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Mapping[str, Any] | None = None,
    ) -> None:
        hub = runner.message_hub  # mmengine's log, of Python numbers
        values = {n: hub.get_scalar(f'train/{n}').current() for n in outputs or () if 'loss' in n}
        bad = tuple(f'{n} {value}' for n, value in values.items() if not math.isfinite(value))
        self._streak = self._streak + 1 if bad else 0
        if self._streak == 1:
            lr = max(chain.from_iterable(runner.optim_wrapper.get_lr().values()))
            paths = [getattr(leaf, 'img_path', None) for leaf in tree_leaves(data_batch)]
            self._first = _BadIteration(runner.iter + 1, bad, lr, tuple(filter(None, paths)))
        distributed = is_distributed()
        if not (self.every_n_train_iters(runner, self.patience) if distributed else bad):
            return
        broken = bool(bad) and self._weights_broken(runner)
        signals = (hook for hook in runner.hooks if isinstance(hook, StopSignal))
        streak, broken = next(signals, StopSignal()).exchange(runner.iter + 1, self._streak, broken)
        if broken or streak >= self.patience:
            firsts = all_gather_object(self._first if bad else None)
            raise UserError(_message(runner, [first for first in firsts if first], bool(broken)))

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        if self._weights_broken(runner):
            firsts = [self._first] if self._streak else []
            raise UserError(_message(runner, firsts, broken=True))

    def _weights_broken(self, runner: Runner) -> bool:
        tensors = chain(runner.model.named_parameters(), runner.model.named_buffers())
        return any(name not in self._ignored for name in _not_finite(tensors))


def _not_finite(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
    for name, tensor in tensors:
        if not tensor.isfinite().all():
            yield name


def _message(runner: Runner, firsts: Sequence[_BadIteration], broken: bool) -> str:
    """Return the line for the user: what went wrong first in any process, and what to try."""
    now = runner.iter + 1
    problem = f'NaN or infinite weights at iteration {now} of {runner.max_iters}'
    if firsts:
        start = min(first.iteration for first in firsts)
        firsts = [first for first in firsts if first.iteration == start]
        losses = [*dict.fromkeys(loss for first in firsts for loss in first.losses)]
        images = [*dict.fromkeys(image for first in firsts for image in first.images)]
        problem = (
            f'no finite loss since iteration {start} of {runner.max_iters} '
            f'({first_of(losses, SHOWN)}), at learning rate {firsts[0].lr:g}, '
            f'on {first_of(images, SHOWN) or "unknown images"}; at iteration {now} the '
            f'weights are {"not finite either" if broken else "finite"}'
        )
    wrapper = runner.optim_wrapper
    remedies = ['a lower learning rate or a longer warm-up']
    if not getattr(wrapper, 'clip_grad_kwargs', None):
        remedies.append('--cfg-options optim_wrapper.clip_grad.max_norm=10')
    if hasattr(wrapper, 'loss_scaler'):
        remedies.append('--amp-dtype bfloat16')
    if firsts:
        remedies.append('checking these images and their labels')
    last = last_checkpoint(runner.work_dir) or 'none yet'
    advice = f'Try {", ".join(remedies)}. These weights were not saved'
    return f'{problem}. {advice}; last checkpoint: {last}'
