"""SIGTERM in this process."""

import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from mmengine.hooks import Hook
from mmengine.model import BaseModel

from mmdense.engine import stopping
from mmdense.engine.stopping import STATUS, Stopped, StopSignal
from runs import build_runner


def test_a_signal_is_recorded_and_the_handler_restored():
    before = signal.getsignal(signal.SIGTERM)
    stop = StopSignal(save=pytest.fail)
    with stop:
        assert not stop.wanted(1)
        stop.after_val_iter(None, 0)
        for _ in range(2):  # torchrun forwards it
            os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wanted(2)
        with pytest.raises(Stopped):
            stop.after_val_iter(None, 0)
    assert signal.getsignal(signal.SIGTERM) is before


def test_other_threads_handle_no_signals():
    entered = []

    def enter():
        with StopSignal(save=pytest.fail) as stop:
            entered.append(stop.wanted(1))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert entered == [False]


@pytest.mark.slow
def test_a_second_signal_ends_the_process_at_once():
    code = """if True:
    import os, signal
    from mmdense.engine import stopping
    stopping.ECHO = 0.0
    with stopping.StopSignal(save=None):
        os.kill(os.getpid(), signal.SIGTERM)
        print('first', flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        print('second')
    """
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert done.stdout == 'first\n'
    assert done.returncode == -signal.SIGTERM
    assert stopping.STATUS == 143  # as shells report it


class Model(BaseModel):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))

    def forward(self, x, mode):
        return dict(loss=(self.weight * x).mean())


class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, index):
        return dict(x=float(index))


class Terminate(Hook):
    """Send SIGTERM to the second process in the second iteration."""

    def after_train_iter(self, runner, batch_idx, data_batch=None, outputs=None):
        if runner.iter == 1 and torch.distributed.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGTERM)


PATIENCE = {None: 10, 3: 3, 25: 10}  # of the NaN guard -> iterations until all stop


def work(rank, store, folder):
    """Train as one of two processes; save when it stopped, and how often they exchanged numbers."""
    torch.distributed.init_process_group('gloo', f'file://{store}', world_size=2, rank=rank)
    calls, all_reduce = [], stopping.all_reduce
    stopping.all_reduce = lambda *args: [calls.append(args), all_reduce(*args)]
    outcomes = []
    for patience in PATIENCE:
        guard = dict(nan_guard=dict(type='mmdense.NaNGuardHook', patience=patience))
        runner = build_runner(
            folder / f'{rank}-{patience}',
            Model(),
            Data(),
            train_cfg=dict(type='mmdense.IterBasedTrainLoop', max_iters=40),
            optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.1)),
            default_hooks=guard if patience else {},
            hooks=[Terminate()],
        )
        calls.clear()
        with pytest.raises(SystemExit) as exit:
            runner.train()
        outcomes.append((exit.value.code, runner.iter, len(calls)))
    torch.save(outcomes, folder / f'{rank}.pth')


@pytest.mark.slow
def test_processes_stop_at_the_same_iteration_with_few_exchanges(tmp_path):
    """Each exchange waits for the device."""
    torch.multiprocessing.spawn(work, (tmp_path / 'store', tmp_path), nprocs=2)
    for rank in range(2):
        outcomes = torch.load(tmp_path / f'{rank}.pth')
        assert outcomes == [(STATUS, iters, 1) for iters in PATIENCE.values()]
