"""What every command line says of itself."""

import subprocess
import sys

import pytest

from support import ROOT

TOOLS = sorted(ROOT.glob('tools/*.py'))
COMMANDS = ('sweep',)


@pytest.mark.slow
@pytest.mark.parametrize(
    'command',
    [[path] for path in TOOLS if path.stem != 'benchmark']
    + [[ROOT / 'tools/benchmark.py', command] for command in COMMANDS],
    ids=lambda command: ' '.join([command[0].stem, *command[1:]]),
)
def test_help_ends_in_an_example(command):
    arguments = [sys.executable, *map(str, command), '--help']
    text = subprocess.run(arguments, capture_output=True, text=True, check=True).stdout
    assert f'python tools/{command[0].name}' in text.lower().partition('example')[2]
