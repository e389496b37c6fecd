"""Command lines: help, shell scripts, and each tool in a process of its own."""

import argparse
import subprocess
import sys

import pytest

from mmdense.errors import not_negative, positive
from support import ROOT, load_tool

TOOLS = sorted(file.stem for file in ROOT.glob('tools/*.py'))


@pytest.mark.parametrize(
    ('name', 'command'),
    [(name, None) for name in TOOLS if name != 'benchmark'] + [('benchmark', 'sweep')],
)
def test_help_ends_in_an_example(name, command, call_tool):
    status, output, _ = call_tool(name, *filter(None, [command]), '--help')
    assert status == 0
    assert f'python tools/{name}.py' in output.lower().partition('example')[2]


@pytest.mark.parametrize('name', [name for name in TOOLS if name != 'make_demo_dataset'])
def test_no_option_takes_a_negative_number(name):
    """make_demo_dataset.py checks its numbers where it uses them."""
    parsers = [load_tool(name).parser()]
    for parser in parsers:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                parsers += action.choices.values()
            elif action.type in (int, positive, not_negative) and not action.choices:
                with pytest.raises(argparse.ArgumentTypeError, match='-3 is not an integer >= '):
                    action.type('-3')


@pytest.mark.parametrize(
    ('command', 'message'),
    [
        ('export_onnx c --out o --rounds -3', 'argument --rounds: -3 is not an integer >= 1'),
        (
            'export_onnx c --out o --max-per-img 0',
            'argument --max-per-img: 0 is not an integer >= 1',
        ),
        ('check_dataset c --workers 0', 'argument --workers: 0 is not an integer >= 1'),
        ('benchmark sweep --pictures x', 'argument --pictures: x is not an integer >= 0'),
    ],
)
def test_a_wrong_number_ends_in_one_line(command, message, call_tool):
    status, _, errors = call_tool(*command.split())
    assert (status, errors.splitlines()[-1].partition('error: ')[2]) == (2, message)


@pytest.mark.slow
@pytest.mark.parametrize('name', TOOLS)
def test_tools_run_from_another_folder(name, tmp_path):
    command = [sys.executable, ROOT / f'tools/{name}.py', '--help']
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f'usage: {name}.py')


BEFORE_TORCH = """
import os, runpy, sys

class Finder:
    def find_spec(name, *_):
        if name == 'torch':
            os._exit(os.environ.get('OMP_WAIT_POLICY') != 'passive')

sys.meta_path.insert(0, Finder)
runpy.run_path(sys.argv[1], run_name='__main__')
"""


@pytest.mark.slow
@pytest.mark.parametrize('name', TOOLS)
def test_waiting_threads_sleep_by_default(name, monkeypatch):
    """OpenMP reads the setting when torch is loaded."""
    monkeypatch.delenv('OMP_WAIT_POLICY', raising=False)
    command = [sys.executable, '-c', BEFORE_TORCH, ROOT / f'tools/{name}.py', '--help']
    assert subprocess.run(command, stdout=subprocess.DEVNULL).returncode == 0


@pytest.mark.parametrize('script', ['dist_train.sh', 'dist_test.sh', 'slurm_train.sh'])
def test_scripts_print_their_usage(run_tool, script):
    status, output = run_tool(ROOT / 'tools' / script)
    assert status == 2
    assert f'tools/{script}' in output


def test_slurm_script_passes_everything_on(run_tool, tmp_path):
    srun = tmp_path / 'srun'
    srun.write_text('#!/bin/sh\nfor word; do echo "[$word]"; done\n')
    srun.chmod(0o755)
    env = dict(PATH=f'{tmp_path}:/usr/bin:/bin', GPUS='16', SRUN_ARGS='--qos high')
    arguments = ['gpu', 'a job', 'c.py', 'w', '--amp']
    status, output = run_tool(ROOT / 'tools/slurm_train.sh', *arguments, **env)
    assert status == 0, output
    words = output.split('\n')
    assert words[:4] == ['[--partition]', '[gpu]', '[--job-name]', '[a job]']
    assert words[words.index('[--ntasks]') + 1] == '[16]'
    assert words[words.index('[--qos]') + 1] == '[high]'
    assert words[-7:-1] == ['[c.py]', '[--work-dir]', '[w]', '[--launcher]', '[slurm]', '[--amp]']
