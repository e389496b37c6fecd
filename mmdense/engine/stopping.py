"""Stopping on SIGTERM between two iterations."""

import os
import signal
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from mmengine.dist import all_reduce, is_distributed
from mmengine.hooks import Hook
from mmengine.runner import Runner

STATUS = 128 + signal.SIGTERM  # as shells report a process that SIGTERM has ended
# Seconds. torchrun forwards a signal that the scheduler may have sent to its processes as well.
ECHO = 3.0
EXCHANGE = 10  # iterations


class Stopped(Exception):
    """SIGTERM arrived during a validation."""


class StopSignal(Hook):
    """Record SIGTERM while the context is active; a second one, or Ctrl-C, ends the run at once.

    Signals within three seconds count as one. Several processes stop at the same iteration: they
    exchange whether to, with the NaN guard's numbers or every ten iterations, since they wait for
    the device. As a hook it ends a validation in a single process by :class:`Stopped`. Several
    processes may have different numbers of batches left: they call ``save`` and go on validating.
    """

    def __init__(self, save: Callable[[], None] | None = None) -> None:
        self._wanted, self._exchanged = False, 0  # the iteration
        self._save = save
        self._saved = False
        self._since: float | None = None
        self._previous: Any = None

    def __enter__(self) -> 'StopSignal':
        if threading.current_thread() is threading.main_thread():  # Python allows no other
            self._previous = signal.signal(signal.SIGTERM, self._record)
        return self

    def __exit__(self, *error: object) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGTERM, self._previous)
        self._previous = None

    def _record(self, number: int, frame: Any) -> None:
        if self._since is None:
            self._since = time.monotonic()
        elif time.monotonic() - self._since > ECHO:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def exchange(self, iteration: int, *numbers: int) -> list[int]:
        """Return the maximum of each number over all processes, which must call it together."""
        state = torch.tensor([self._since is not None, *map(int, numbers)])
        all_reduce(state, 'max')
        wanted, *numbers = state.tolist()
        self._wanted, self._exchanged = self._wanted or bool(wanted), iteration
        return numbers

    def wanted(self, iteration: int) -> bool:
        """Return whether all processes have to stop after an iteration, which counts from 1."""
        if not is_distributed() or iteration - self._exchanged >= EXCHANGE:
            self.exchange(iteration)
        return self._wanted

    def after_val_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """After SIGTERM, end the validation or save a checkpoint once."""
        if self._since is None:
            return
        if not is_distributed():
            raise Stopped
        if not self._saved:
            self._saved = True
            self._save()
