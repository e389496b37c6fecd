"""Random numbers that depend on the seed and the iteration alone, not on what was drawn before.

mmengine seeds the main process once and each worker as it starts, with the same number in every
epoch, and saves neither's state: a resumed run draws other numbers than the run would have. Here
the main process draws from (seed, rank, iteration), and each batch, in whatever process it is
loaded, from (seed, rank, number of the batch in the run).
"""

from __future__ import annotations

import itertools
import random
import signal
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from os import _exit, getppid
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

__all__ = ['NumberedBatches', 'seed_all']


def seed_all(*key: int) -> None:
    """Seed Python's, numpy's and torch's generators, those of all devices, by numbers from 0 up."""
    words = np.random.SeedSequence(key).generate_state(4)
    random.seed(words.tobytes())
    np.random.seed(words)  # noqa: NPY002  (data sets draw from this one)
    torch.manual_seed(int(words[0]) << 32 | int(words[1]))


class Batch(list):
    """The indices of a batch's samples, and what its random numbers are seeded by."""

    key: tuple[int, ...]


class NumberedBatches:
    """A loader's batch sampler that can begin in the middle, and numbers its batches.

    It takes the place of the sampler in the loader, whose workers then seed themselves for each
    batch, and don't end by a SIGTERM that isn't their parent's: schedulers send it to all
    processes, and the main one is to finish its iteration.

    What data sets keep between samples, such as the images that CachedMosaic mixes, is not restored
    by seeds.

    Args:
        loader: Changed in place. Nothing comes out of it until :meth:`start` is called.
        endless: Whether to begin again at the end, as for training by iterations.
    """

    def __init__(self, loader: DataLoader, *, endless: bool) -> None:
        held = loader.batch_sampler
        self.inner = held.inner if isinstance(held, NumberedBatches) else held
        self.endless = endless
        self._range: tuple[tuple[int, ...], int, int] | None = None
        # The loader refuses it once built; it looks there whenever it begins, though.
        object.__setattr__(loader, 'batch_sampler', self)
        if not isinstance(held, NumberedBatches):
            # An attribute that torch asks for whole batches.
            loader.dataset.__getitems__ = _SeededFetch(loader.dataset)
            loader.worker_init_fn = _Worker(loader.worker_init_fn)

    def start(self, key: Sequence[int], *, first: int, skip: int) -> None:
        """Say what comes out from the next time on that the loader begins.

        Args:
            key: What the run's batches are seeded by, besides their number.
            first: Number of the first batch.
            skip: How many batches of the sampler to leave out before it. None is loaded; the
                indices are drawn, some million a second.
        """
        self._range = tuple(key), first, skip

    def __iter__(self) -> Iterator[Batch]:
        # The original mmengine begins with a loader as soon as it has it, before a run is resumed.
        if self._range is None:
            return
        key, first, skip = self._range
        for number, indices in enumerate(itertools.islice(self._all(), skip, None), first):
            batch = Batch(indices)
            batch.key = (*key, number)
            yield batch

    def _all(self) -> Iterable[Sequence[int]]:
        if not self.endless:
            return self.inner
        return itertools.chain.from_iterable(self._pass(epoch) for epoch in itertools.count())

    def _pass(self, epoch: int) -> Iterable[Sequence[int]]:
        set_epoch = getattr(self.sampler, 'set_epoch', None)
        if set_epoch is not None:
            set_epoch(epoch)
        return self.inner

    def __len__(self) -> int:
        return len(self.inner)

    @property
    def sampler(self) -> Any:
        """The sampler of single samples, which hooks tell the epoch."""
        return self.inner.sampler

    @property
    def batch_size(self) -> int:
        """Samples in a batch."""
        return self.inner.batch_size


class _SeededFetch:
    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.fetch = getattr(dataset, '__getitems__', None)

    def __call__(self, indices: Sequence[int]) -> list:
        if isinstance(indices, Batch):  # not, if another loader reads the same data set
            seed_all(*indices.key)
        if self.fetch is not None:
            return self.fetch(indices)
        return [self.dataset[i] for i in indices]


class _Worker:
    def __init__(self, init: Callable[[int], None] | None) -> None:
        self.init = init

    def __call__(self, worker: int) -> None:
        if self.init is not None:
            self.init(worker)
        if hasattr(signal, 'sigwaitinfo'):  # not on macOS
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
            threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """Do as torch's own handler, which ends a worker quietly if its parent asks for it."""
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != getppid():
        pass
    _exit(0)
