"""Ending a training on SIGTERM, between two iterations."""

from __future__ import annotations

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

__all__ = ['STATUS', 'StopSignal', 'Stopped']

STATUS = 128 + signal.SIGTERM  # what a shell says of a process that SIGTERM has ended
# torchrun hands on a signal that the scheduler has sent to its processes as well.
ECHO = 3.0


class Stopped(Exception):
    """Ends a validation."""


class StopSignal(Hook):
    """Take note of SIGTERM, as a context manager; a second one, or Ctrl-C, ends at once.

    Signals within three seconds count as one. As a hook it ends a validation by :class:`Stopped`,
    where there is one process. Several may have unlike numbers of batches, and finish it, if they
    are given the time: they call ``keep`` first.
    """

    def __init__(self, keep: Callable[[], None]) -> None:
        self._keep = keep
        self._kept = False
        self._since: float | None = None
        self._before: Any = None

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():  # Python allows no other
            self._before = signal.signal(signal.SIGTERM, self._take)
        return self

    def __exit__(self, *error: object) -> None:
        if self._before is not None:
            signal.signal(signal.SIGTERM, self._before)
        self._before = None

    def _take(self, number: int, frame: Any) -> None:
        if self._since is None:
            self._since = time.monotonic()
        elif time.monotonic() - self._since > ECHO:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def wanted(self) -> bool:
        """Return whether any process was told to stop: the same in all, which must all ask."""
        told = torch.tensor(float(self._since is not None))
        all_reduce(told, 'max')
        return bool(told)

    def after_val_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None
    ) -> None:
        """End the validation, or see that nothing is lost with it, if told to.

        Raises:
            Stopped: To the loop that began it.
        """
        if self._since is None:
            return
        if not is_distributed():
            raise Stopped
        if not self._kept:
            self._kept = True
            self._keep()
