"""Trainings that something happens to, in processes that need not import everything again."""

import multiprocessing
import os
import resource
import runpy
import signal
import sys

from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from support import ROOT

# Starts a process for each training, by forking one that has imported what they need.
SERVER = multiprocessing.get_context('forkserver')
SERVER.set_forkserver_preload(['faults', 'mmdense.apis', 'mmdet.apis', 'mmseg.apis'])


def train(config, *arguments, project):
    """Run tools/train.py in a process; return (status, everything that it said).

    The status is negative, as of Python's subprocesses, where a signal ended it.
    """
    said = project / 'said.txt'
    command = ['tools/train.py', *map(str, (config, *arguments))]
    process = SERVER.Process(target=_train, args=(command, project, said))
    process.start()
    process.join(600)
    assert process.exitcode is not None, said.read_text()
    return process.exitcode, said.read_text()


def _train(command, project, said):
    os.setpgid(0, 0)  # signals to the group reach this training alone
    os.chdir(project)
    with said.open('w') as opened:
        for stream in (1, 2):
            os.dup2(opened.fileno(), stream)
    sys.argv = command
    runpy.run_path(str(ROOT / command[0]), run_name='__main__')


@HOOKS.register_module()
class SendSignal(Hook):
    """Send the whole process group, workers included, a signal once a run is at an iteration."""

    def __init__(self, number, at, validating=False):
        self.number, self.at, self.validating = signal.Signals(number), at, validating

    def _send(self, runner, validating):
        if runner.iter == self.at and self.validating == validating:
            os.killpg(0, self.number)

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        self._send(runner, False)

    def before_val_iter(self, runner, batch_idx, data_batch=None):
        self._send(runner, True)


@HOOKS.register_module()
class LimitFiles(Hook):
    """Let no file grow beyond a size from an iteration on.

    Args:
        deadly: Whether the system ends the process that tries, in the middle of the write, or
            refuses, as it does when a disk is full.
    """

    def __init__(self, size, at, deadly):
        self.size, self.at, self.deadly = size, at, deadly

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.at:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL if self.deadly else signal.SIG_IGN)
