"""Shared fixtures."""

import functools
import logging
import os
import subprocess
import sys

import pytest
import torch
from mmengine.config import utils

from mmdense.datasets import make_digits
from support import ROOT, forget_runs, load_tool

# mmengine reads a hundred metafiles for each base such as 'mmdet::_base_/default_runtime.py'.
utils.load = functools.cache(utils.load)


@pytest.fixture(scope='session')
def project(tmp_path_factory):
    """A working folder with demo data, enough for two iterations, where the configs expect it."""
    folder = tmp_path_factory.mktemp('project')
    make_digits(folder / 'data/digits', train=16, val=4)
    return folder


@pytest.fixture(scope='session')
def crops(project):
    """The demo's class folders of digits, where the configs expect them."""
    folder = project / 'data/digit_crops'
    for split in ('train', 'val'):
        load_tool('make_demo_dataset').crop_digits(project / 'data/digits', split, folder / split)
        for digit in range(10):
            (folder / split / str(digit)).mkdir(exist_ok=True)
    return folder


@pytest.fixture(scope='session')
def run_tool(project):
    """Return a function that runs a command in the working folder.

    It returns the exit status and the output, stdout and stderr together.
    """

    def run(*command, **env):
        paths = env.pop('PYTHONPATH', ''), str(ROOT)
        env['PYTHONPATH'] = os.pathsep.join(filter(None, paths))
        done = subprocess.run(
            [str(part) for part in command],
            cwd=project,
            env={**os.environ, 'PYTHON': sys.executable, **env},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )
        return done.returncode, done.stdout

    return run


@pytest.fixture
def call_tool(project, monkeypatch, capsys):
    """Run main() of tools/NAME.py in this process; return (status, stdout, stderr)."""

    def call(name, *arguments):
        monkeypatch.chdir(project)
        capsys.readouterr()
        forget_runs()
        status = 0
        try:
            load_tool(name).main([str(argument) for argument in arguments])
        except SystemExit as error:
            status = error.code or 0
        return status, *capsys.readouterr()

    return call


@pytest.fixture
def log(monkeypatch):
    """Return the list of warnings that are logged."""
    lines = []

    def print_log(text, logger=None, level=logging.INFO):
        if level == logging.WARNING:
            lines.append(text)

    monkeypatch.setattr('mmengine.logging.print_log', print_log)
    return lines


class FakeGPU(list):
    """The calls that a GPU's counters get. ``bytes`` are allocated now; ``peak`` were since."""

    bytes, peak = 300, 9000


@pytest.fixture
def gpu(monkeypatch):
    """A stand-in for a GPU's queue and allocator; its device may be 'meta'."""
    calls = FakeGPU()

    def reset():
        calls.append('reset')
        calls.peak = calls.bytes

    monkeypatch.setattr(torch.cuda, 'synchronize', lambda: calls.append('wait'))
    monkeypatch.setattr(torch.cuda, 'memory_allocated', lambda: calls.bytes)
    monkeypatch.setattr(torch.cuda, 'reset_peak_memory_stats', reset)
    monkeypatch.setattr(torch.cuda, 'max_memory_allocated', lambda: calls.peak)
    return calls
