"""Random numbers by iteration in the main process and in workers."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.dataset import DefaultSampler, InfiniteSampler
from torch.utils.data import DataLoader, Dataset

from mmdense.engine.seeding import NumberedBatches, seed_all


def draws():
    return [random.random(), np.random.rand(), torch.rand(1).item()]  # noqa: NPY002


def test_every_generator_depends_on_every_number_of_the_key():
    seed_all(1, 2)
    one = draws()
    seed_all(1, 2)
    assert draws() == one
    for key in ((1, 3), (2, 2), (1,)):
        seed_all(*key)
        other = draws()
        assert all(a != b for a, b in zip(one, other, strict=True))


class Drawing(Dataset):
    """Samples of their index and one number from each generator."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return [index, *draws()]


class BatchDrawing(Drawing):
    """Loads whole batches."""

    def __getitems__(self, indices):
        return [[-index, *draws()] for index in indices]


def load(sampler, *, workers=0, skip=0, count=5, data=None, key=(1,), **more):
    """Return ``count`` batches from number ``skip`` on."""
    data = data or Drawing()
    loader = DataLoader(
        data, 2, sampler=sampler(data, seed=3), num_workers=workers, collate_fn=list, **more
    )
    batches = NumberedBatches(loader, endless=sampler is InfiniteSampler)
    assert list(loader) == []  # before start()
    batches.start(key, first=skip, skip=skip)
    assert len(loader) == 5
    return [batch for batch, _ in zip(loader, range(count), strict=False)]


@pytest.mark.parametrize('sampler', [DefaultSampler, InfiniteSampler])
def test_a_batch_depends_only_on_its_number(sampler):
    plain = load(sampler)
    assert len(plain) == 5
    samples = [sample for batch in plain for sample in batch]
    assert sorted(sample[0] for sample in samples) == list(range(10))
    assert len({sample[1] for sample in samples}) == 10
    assert load(sampler, skip=3) == plain[3:] + load(sampler, skip=5, count=3)
    assert load(sampler, key=(2,)) != plain


@pytest.mark.slow
@pytest.mark.parametrize('persistent', [False, True])
def test_workers_draw_the_same_numbers_as_the_main_process(persistent):
    plain = load(InfiniteSampler, count=8)
    more = dict(workers=2, persistent_workers=persistent)
    assert load(InfiniteSampler, count=8, **more) == plain
    assert load(InfiniteSampler, skip=3, **more) == plain[3:]


def test_an_endless_sampler_sets_the_epoch_of_each_pass():
    data = Drawing()
    loader = DataLoader(data, 2, sampler=DefaultSampler(data, seed=3), collate_fn=list)
    batches = NumberedBatches(loader, endless=True)
    batches.start((1,), first=0, skip=0)
    stream = [sample[0] for batch, _ in zip(loader, range(10), strict=False) for sample in batch]
    assert sorted(stream) == sorted([*range(10)] * 2)
    assert stream[:10] != stream[10:]
    batches.start((1,), first=7, skip=7)
    assert [s[0] for batch, _ in zip(loader, range(3), strict=False) for s in batch] == stream[14:]


def test_data_sets_with_getitems_and_a_second_loader():
    data = BatchDrawing()
    plain = load(DefaultSampler, data=data)
    assert all(sample[0] <= 0 for batch in plain for sample in batch)
    assert load(DefaultSampler, data=BatchDrawing()) == plain
    other = next(iter(DataLoader(data, 2, collate_fn=list)))
    assert [sample[0] for sample in other] == [0, -1]


def test_a_loader_can_be_numbered_twice():
    data = Drawing()
    loader = DataLoader(data, 2, sampler=DefaultSampler(data, seed=3), collate_fn=list)
    first = NumberedBatches(loader, endless=False)
    second = NumberedBatches(loader, endless=False)
    assert second.inner is first.inner
    assert second.sampler is loader.sampler
    assert second.batch_size == 2


LOADER = """
import multiprocessing, os, signal, sys
import torch.utils.data._utils.worker as worker
from torch.utils.data import DataLoader, Dataset
from mmdense.engine.seeding import NumberedBatches

class Numbers(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        worker.MP_STATUS_CHECK_INTERVAL = 1e6  # after which an orphan would end by itself
        return index

if __name__ == '__main__':
    method, kill = sys.argv[1:]
    multiprocessing.set_start_method(method)
    loader = DataLoader(Numbers(), 2, num_workers=1, persistent_workers=True)
    NumberedBatches(loader, endless=False).start((0,), first=0, skip=0)
    assert sum(batch.sum().item() for batch in loader) == 6
    print(multiprocessing.active_children()[0].pid, flush=True)
    if kill == 'True':
        os.kill(os.getpid(), signal.SIGKILL)
    sys.modules['__main__'].kept = loader  # the worker is terminated at the very end
"""


@pytest.mark.slow
@pytest.mark.parametrize('killed', [False, True])
@pytest.mark.parametrize('method', ['fork', 'spawn', 'forkserver'])
def test_workers_end_with_the_main_process(method, killed, tmp_path):
    """A fork server is the parent of its workers, sends them no signal and outlives the process."""
    (tmp_path / 'loader.py').write_text(LOADER)
    command = [sys.executable, tmp_path / 'loader.py', method, str(killed)]
    output = tmp_path / 'output'
    with output.open('w') as opened:
        status = subprocess.run(command, stdout=opened, timeout=120).returncode
    assert status == (-signal.SIGKILL if killed else 0)
    worker = int(output.read_text())
    end = time.monotonic() + 60
    while Path(f'/proc/{worker}').exists():
        assert time.monotonic() < end
        time.sleep(0.1)
