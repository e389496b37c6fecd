"""Stopping a training whose numbers have become NaN or infinite, before they are saved."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from mmengine.dist import all_gather_object, all_reduce, is_distributed
from mmengine.hooks import Hook
from mmengine.runner import Runner
from torch import Tensor

from mmdense.errors import UserError
from mmdense.registry import HOOKS

__all__ = ['FiniteHook']

SHOWN = 8  # images, and losses, in the message


@dataclass(frozen=True)
class _Found:
    """The first of several iterations in a row whose loss was not finite.

    Attributes:
        iteration: As the log counts, from 1.
        losses: Such as 'loss_bbox nan'.
        lr: The highest learning rate.
        images: Files of the batch.
    """

    iteration: int
    losses: tuple[str, ...]
    lr: float
    images: tuple[str, ...]


@HOOKS.register_module()
class FiniteHook(Hook):
    """Stop a training with NaN or infinite numbers, and keep such weights out of checkpoints.

    One line of a config, which the recipes have in ``default_hooks``::

        default_hooks = dict(finite=dict(type='mmdense.FiniteHook'))

    A loss that is not finite stops the run at once where the model's weights or statistics are not
    finite either, since these never recover; else after ``patience`` such iterations in a row: a
    loss of an empty batch, or a step that a scaler of gradients left out, may do no harm. What such
    a scaler leaves out for its gradients alone doesn't count. The error names the first of these
    iterations, its images, learning rate and losses.

    What is looked at are the numbers that mmengine has fetched for its log anyway, so nothing waits
    for the GPU. In distributed training, where all processes have to stop together, they exchange
    two numbers every ``patience`` iterations, and stop up to that much later. A checkpoint that is
    due before that, or whose weights went wrong with a finite loss, is not written either.

    Args:
        patience: How many iterations in a row without a finite loss are too many.

    Raises:
        ValueError: A patience below 1.
    """

    # Behind averages and the log, before the learning rate changes and checkpoints are written.
    priority = 'BELOW_NORMAL'

    def __init__(self, patience: int = 5) -> None:
        if patience < 1:
            raise ValueError(f'patience is {patience}, must be at least 1')
        self.patience = patience
        self._streak = 0
        self._first: _Found | None = None
        self._known: frozenset[str] = frozenset()

    def before_train(self, runner: Runner) -> None:
        """Note which tensors are meant to hold infinite numbers, such as those of masks."""
        self._streak, self._first = 0, None
        self._known = frozenset(_not_finite(runner.model.named_buffers()))

    def after_train_iter(
        self,
        runner: Runner,
        batch_idx: int,
        data_batch: Any = None,
        outputs: Mapping[str, Any] | None = None,
    ) -> None:
        """Look at the losses of an iteration.

        Raises:
            UserError: They have not been finite for too long.
        """
        bad = _bad_losses(runner, outputs or {})
        self._streak = self._streak + 1 if bad else 0
        if self._streak == 1:
            lr = max(chain.from_iterable(runner.optim_wrapper.get_lr().values()))
            self._first = _Found(runner.iter + 1, bad, lr, tuple(_image_files(data_batch)))
        distributed = is_distributed()
        if not (self.every_n_train_iters(runner, self.patience) if distributed else bad):
            return
        broken = bool(bad) and self._broken(runner)
        state = torch.tensor([self._streak, broken])
        all_reduce(state, 'max')
        streak, broken = state.tolist()
        if broken or streak >= self.patience:
            found = all_gather_object(self._first if bad else None)
            raise UserError(_message(runner, [f for f in found if f], bool(broken)))

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Keep weights that are not finite out of checkpoints.

        Raises:
            UserError: There are some.
        """
        if self._broken(runner):
            raise UserError(_message(runner, [self._first] if self._streak else [], broken=True))

    def _broken(self, runner: Runner) -> bool:
        tensors = chain(runner.model.named_parameters(), runner.model.named_buffers())
        return any(name not in self._known for name in _not_finite(tensors))


def _not_finite(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[str]:
    for name, tensor in tensors:
        if not tensor.isfinite().all():
            yield name


def _bad_losses(runner: Runner, outputs: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the losses that are not finite, as mmengine's log holds them: numbers of Python."""
    hub = runner.message_hub
    values = {n: hub.get_scalar(f'train/{n}').current() for n in outputs if 'loss' in n}
    return tuple(f'{name} {value}' for name, value in values.items() if not math.isfinite(value))


def _image_files(node: Any) -> Iterator[str]:
    """Yield the image files that the samples of a batch were read from."""
    if isinstance(node, Mapping):
        node = list(node.values())
    if isinstance(node, list | tuple):
        for child in node:
            yield from _image_files(child)
    elif path := getattr(node, 'img_path', None):
        yield path


def _message(runner: Runner, found: Sequence[_Found], broken: bool) -> str:
    """Return the line for the user: what went wrong first in any process, and what to try."""
    now = runner.iter + 1
    said = f'NaN or infinite weights at iteration {now} of {runner.max_iters}'
    if found:
        start = min(f.iteration for f in found)
        found = [f for f in found if f.iteration == start]
        said = (
            f'no finite loss since iteration {start} of {runner.max_iters} '
            f'({_joined(f.losses for f in found)}), at learning rate {found[0].lr:g}, '
            f'on {_joined(f.images for f in found) or "unknown images"}; at iteration {now} the '
            f'weights are {"not finite either" if broken else "finite"}'
        )
    wrapper = runner.optim_wrapper
    ways = ['a lower learning rate or a longer warm-up']
    if not getattr(wrapper, 'clip_grad_kwargs', None):
        ways.append('--cfg-options optim_wrapper.clip_grad.max_norm=10')
    if hasattr(wrapper, 'loss_scaler'):
        ways.append('--amp-dtype bfloat16')
    if found:
        ways.append('a look at these images and their labels')
    file = Path(runner.work_dir, 'last_checkpoint')
    kept = f'the last one is {file.read_text().strip()}' if file.is_file() else 'there is none yet'
    return f'{said}. Try {", ".join(ways)}. No such weights are in a checkpoint; {kept}'


def _joined(parts: Iterable[Sequence[str]]) -> str:
    """Return the first few of all different parts."""
    parts = list(dict.fromkeys(chain.from_iterable(parts)))
    more = f' and {len(parts) - SHOWN} more' if len(parts) > SHOWN else ''
    return ', '.join(parts[:SHOWN]) + more
