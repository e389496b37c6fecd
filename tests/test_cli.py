"""Settings on the command line."""

import argparse

import pytest
from mmengine.config import DictAction

from mmdense.cli import _Settings


def parse(action, text):
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=action)
    return parser.parse_args(['--cfg-options', f'key={text}']).cfg_options['key']


AS_IN_MMENGINE = """
3
1e-3
None
true
word
a,b
1,2.5
[1, 2]
(0.5)
((1),(2))
[(1,2),(3,4)]
'[1,2]'
"word"
'0'
[a, b, c]
()
[]
it's
a=b
{1:2}
('cat')
'a','b'
/a path/with space
"""


@pytest.mark.parametrize('text', AS_IN_MMENGINE.strip().splitlines())
def test_all_else_is_as_in_mmengine(text):
    expected = parse(DictAction, text)
    found = parse(_Settings, text)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ("('0','1')", ('0', '1')),
        ("['0', 1]", ['0', 1]),
        ('("0",cat,2)', ('0', 'cat', 2)),
        ("('0')", ('0',)),
        ("[('0',1),('true',None)]", [('0', 1), ('true', None)]),
        ("'1','2'", ['1', '2']),
        ("\"('0','1')\"", ('0', '1')),
        ("('traffic light','a, b')", ('traffic light', 'a, b')),
        ('"\'0\'"', '0'),
    ],
)
def test_quoted_elements_stay_text(text, expected):
    found = parse(_Settings, text)
    assert found == expected
    assert type(found) is type(expected)
