"""The rooms of the package, in the order of CONTRIBUTING's table: imports point upwards in it."""

import ast
import re

import pytest

from support import ROOT

PACKAGE = ROOT / 'mmdense'
ROW = re.compile(r'^\| `(\w+)(?:/|\.py)?` \|', re.MULTILINE)
ROOMS = ROW.findall((ROOT / 'CONTRIBUTING.md').read_text(encoding='utf-8'))
ENTRANCES = ('__init__', '__main__')  # of the package itself, which may import anything
FILES = [f for f in sorted(PACKAGE.rglob('*.py')) if f.relative_to(PACKAGE).stem not in ENTRANCES]


def room(path):
    """Return the room of a file or of a dotted name inside the package."""
    return path[0].removesuffix('.py')


def imported(file):
    """Yield the rooms that a file imports anywhere, inside functions too."""
    for node in ast.walk(ast.parse(file.read_text(encoding='utf-8'))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f'{file}: relative import'
            names = [f'{node.module}.{alias.name}' for alias in node.names]
        else:
            continue
        for name in names:
            package, *path = name.split('.')
            if package == 'mmdense' and path:
                yield room(path)


def test_the_table_lists_every_room_once():
    found = {room(f.relative_to(PACKAGE).parts) for f in PACKAGE.rglob('*.py')} - {*ENTRANCES}
    assert sorted(ROOMS) == sorted(found)


@pytest.mark.parametrize('file', FILES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_come_from_rooms_above_in_the_table(file):
    own = room(file.relative_to(PACKAGE).parts)
    for other in imported(file):
        if other in ROOMS and other != own:
            assert ROOMS.index(other) < ROOMS.index(own), f'{own} imports {other}'
