"""docs/reliability.md names tests that exist, and leaves out none that provokes a fault."""

import ast
import re

import pytest

from support import ROOT

PAGE = ROOT / 'docs/reliability.md'
NAMED = re.compile(r'`([\w/]+\.py)::(\w+)`')


def functions_of(path):
    """Return the names of a file's test functions."""
    nodes = ast.walk(ast.parse(path.read_text(encoding='utf-8')))
    return {n.name for n in nodes if isinstance(n, ast.FunctionDef) and n.name.startswith('test_')}


def missing_from(text):
    """Return what a page names that isn't there, and the tests of faults that it doesn't name."""
    named = {(file, name) for file, name in NAMED.findall(text)}
    there = {
        (str(path.relative_to(ROOT / 'tests')), name)
        for path in ROOT.glob('tests/**/test_*.py')
        for name in functions_of(path)
    }
    faults = {(file, name) for file, name in there if file.startswith('reliability/')}
    return sorted(named - there), sorted(faults - named)


def test_page_and_tests_name_each_other():
    unknown, untold = missing_from(PAGE.read_text(encoding='utf-8'))
    assert not unknown, 'no such tests'
    assert not untold, 'tests of faults that the page leaves out'


@pytest.mark.parametrize('line', ['`reliability/test_no_such.py::test_x`', 'nothing'])
def test_check_finds_what_is_wrong(line):
    unknown, untold = missing_from(line)
    assert untold
    assert bool(unknown) == ('no_such' in line)
