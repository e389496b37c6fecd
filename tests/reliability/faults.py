"""Trainings with injected faults, in forked processes that skip the slow imports."""

import multiprocessing
import os
import resource
import runpy
import signal
import sys

from mmengine.hooks import Hook
from mmengine.registry import HOOKS

from support import ROOT

# Forks each training from a process that has imported everything.
SERVER = multiprocessing.get_context('forkserver')
SERVER.set_forkserver_preload(['faults', 'mmdense.apis', 'mmdet.apis', 'mmseg.apis'])


def train(config, *arguments, project):
    """Run tools/train.py in a process; return (status, output).

    As in Python's subprocess, the status is negative if a signal ended the process.
    """
    output = project / 'output.txt'
    command = ['tools/train.py', *map(str, (config, *arguments))]
    process = SERVER.Process(target=_train, args=(command, project, output))
    process.start()
    process.join(600)
    assert process.exitcode is not None, output.read_text()
    return process.exitcode, output.read_text()


def _train(command, project, output):
    os.setpgid(0, 0)  # so that signals to the group reach only this training
    os.chdir(project)
    with output.open('w') as opened:
        for stream in (1, 2):
            os.dup2(opened.fileno(), stream)
    sys.argv = command
    runpy.run_path(str(ROOT / command[0]), run_name='__main__')


@HOOKS.register_module()
class SendSignal(Hook):
    """Send a signal to the process group, including workers, at an iteration."""

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
    """Limit the size of files from an iteration on.

    Args:
        deadly: Whether the system kills the process in the middle of the write, or refuses the
            write as on a full disk.
    """

    def __init__(self, size, at, deadly):
        self.size, self.at, self.deadly = size, at, deadly

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.at:
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL if self.deadly else signal.SIG_IGN)
