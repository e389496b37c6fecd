"""Random numbers that depend only on the seed and the iteration.

With mmengine, which saves no generator state, a resumed run draws other numbers. Here the main
process is seeded by (seed, rank, iteration) and each batch, whichever process loads it, by (seed,
rank, number of the batch in the run).
"""

import itertools
import multiprocessing
import random
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from os import _exit
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader


def seed_all(*key: int) -> None:
    """Seed the generators of Python, numpy and torch (on all devices) by non-negative integers."""
    words = np.random.SeedSequence(key).generate_state(4)
    random.seed(words.tobytes())
    np.random.seed(words)  # noqa: NPY002  (transforms use this generator)
    torch.manual_seed(int(words[0]) << 32 | int(words[1]))


class Batch(list):
    """The indices of a batch's samples, with the key that seeds its random numbers."""

    key: tuple[int, ...]


class NumberedBatches:
    """A batch sampler that can start at any batch, and numbers its batches.

    It replaces the loader's batch sampler. The workers then seed themselves for each batch and obey
    SIGTERM from the main process only: schedulers send it to all, but that one goes on a while.

    State that a data set keeps between samples, such as the cache of CachedMosaic, is not restored.
    The loader is changed in place, and empty until :meth:`start` is called. If ``endless``, it
    starts over at the end, as training by iterations does.
    """

    def __init__(self, loader: DataLoader, *, endless: bool) -> None:
        current = loader.batch_sampler
        numbered = isinstance(current, NumberedBatches)
        self.inner = current.inner if numbered else current
        self.endless = endless
        self._range: tuple[tuple[int, ...], int, int] | None = None
        # DataLoader refuses a plain assignment, but reads the attribute for each new iterator.
        object.__setattr__(loader, 'batch_sampler', self)
        if not numbered:
            # torch calls this attribute with the indices of a batch.
            dataset = loader.dataset
            getitems = getattr(dataset, '__getitems__', None)
            dataset.__getitems__ = partial(_fetch, dataset, getitems)
            loader.worker_init_fn = partial(_init_worker, loader.worker_init_fn)

    def start(self, key: Sequence[int], *, first: int, skip: int) -> None:
        """Let the loader's next iterator start at the batch of number ``first``.

        ``key`` seeds the batches, together with their numbers. ``skip`` of the sampler's batches
        are left out before it: drawing their indices takes about a second for a million.
        """
        self._range = tuple(key), first, skip

    def __iter__(self) -> Iterator[Batch]:
        # The original mmengine iterates over a new loader at once, before a run is resumed.
        if self._range is None:
            return
        key, first, skip = self._range
        for number, indices in enumerate(itertools.islice(self._all(), skip, None), first):
            batch = Batch(indices)
            batch.key = (*key, number)
            yield batch

    def _all(self) -> Iterator[Sequence[int]]:
        if not self.endless:
            yield from self.inner
            return
        for epoch in itertools.count():
            if hasattr(self.sampler, 'set_epoch'):
                self.sampler.set_epoch(epoch)
            yield from self.inner

    def __len__(self) -> int:
        return len(self.inner)

    @property
    def sampler(self) -> Any:
        """The sampler of single samples, on which hooks set the epoch."""
        return self.inner.sampler

    @property
    def batch_size(self) -> int:
        """Samples in a batch."""
        return self.inner.batch_size


def _fetch(dataset: Any, getitems: Callable[..., list] | None, indices: Sequence[int]) -> list:
    if isinstance(indices, Batch):  # another loader of the same data set has plain lists
        seed_all(*indices.key)
    if getitems is not None:
        return getitems(indices)
    return [dataset[i] for i in indices]


def _init_worker(init: Callable[[int], None] | None, worker: int) -> None:
    if init is not None:
        init(worker)
    if hasattr(signal, 'sigtimedwait'):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_with_main_process, daemon=True).start()


def _end_with_main_process() -> None:
    """Exit quietly when the main process sends SIGTERM or has ended.

    Its fork server, if it has one, is the worker's parent, sends nothing and lives on.
    """
    main = multiprocessing.parent_process()
    while main.is_alive():
        received = signal.sigtimedwait([signal.SIGTERM], 1.0)
        if received and received.si_pid == main.pid:
            break
    _exit(0)
