"""Fixtures that several test files use."""

import os
import subprocess
import sys

import pytest

from mmdense.datasets import make_digits
from support import load_tool


@pytest.fixture(scope='session')
def project(tmp_path_factory):
    """A working folder with demo data for two training iterations where configs expect them."""
    folder = tmp_path_factory.mktemp('project')
    make_digits(folder / 'data/digits', train=16, val=4)
    return folder


@pytest.fixture(scope='session')
def run_tool(project):
    """Run a script in the working folder; return (status, everything that it said)."""

    def run(*command, **env):
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
        status = 0
        try:
            load_tool(name).main([str(argument) for argument in arguments])
        except SystemExit as error:
            status = error.code or 0
        return status, *capsys.readouterr()

    return call
