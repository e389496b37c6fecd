"""Settings on the command line, and errors in one line."""

import argparse
import subprocess
import sys

import pytest
from mmengine.config import DictAction

from mmdense import cli
from mmdense.errors import UserError, one_line


def setting(text):
    """Return the value that KEY=text gives, and the one that mmengine gives it."""
    parser, mmengine = argparse.ArgumentParser(), argparse.ArgumentParser()
    cli.add_cfg_options(parser)
    mmengine.add_argument('--cfg-options', nargs='+', action=DictAction)
    command = ['--cfg-options', f'key={text}']
    return [p.parse_args(command).cfg_options['key'] for p in (parser, mmengine)]


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
'0'
[a, b, c]
()
it's
a=b
('cat')
'a','b'
('0',cat)
/a path/with space
"""


@pytest.mark.parametrize('text', AS_IN_MMENGINE.strip().splitlines())
def test_settings_are_as_in_mmengine(text):
    value, expected = setting(text)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize(
    ('text', 'expected'),
    [
        ("('0','1')", ('0', '1')),
        ("['0', 1]", ['0', 1]),
        ("[('0',1),('true',None)]", [('0', 1), ('true', None)]),
        ("('traffic light','a, b')", ('traffic light', 'a, b')),
        ("{'type': 'SGD', 'lr': 0.1}", dict(type='SGD', lr=0.1)),
    ],
)
def test_quoted_elements_stay_text(text, expected):
    value, _ = setting(text)
    assert value == expected
    assert type(value) is type(expected)


@pytest.mark.parametrize('text', ['word', 'key=[(1]'])
def test_options_that_are_no_settings(text, capsys):
    parser = argparse.ArgumentParser()
    cli.add_cfg_options(parser)
    with pytest.raises(SystemExit, match='2'):
        parser.parse_args(['--cfg-options', text])
    assert f'--cfg-options {text}' in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    ('error', 'status', 'line'),
    [
        (UserError('no file x\x1b'), 2, 'error: no file x\\x1b\n'),
        (KeyboardInterrupt(), 130, 'interrupted\n'),  # Ctrl-C
    ],
)
def test_one_line_and_a_status(error, status, line, capsys):
    @cli.report_errors
    def main(argv=None):
        raise error

    with pytest.raises(SystemExit) as exit:
        main()
    assert (exit.value.code, capsys.readouterr().err) == (status, line)


def test_an_error_in_another_keeps_its_way_out():
    text = f'{"x" * 300}: download it'
    assert one_line(UserError(text)) == text
    assert len(one_line(ValueError(text))) == 200


def test_other_errors_keep_their_traceback():
    @cli.report_errors
    def main(argv=None):
        raise ValueError('a bug')

    with pytest.raises(ValueError, match='a bug'):
        main()


@pytest.mark.parametrize(
    ('alias', 'option'), [('--min-coverage', '--min-loaded'), ('--score-thr', '--score')]
)
def test_deprecated_aliases(alias, option, capsys):
    parser = argparse.ArgumentParser()
    cli.add_min_loaded(parser, of="model's")
    cli.add_score(parser, 1.0, 'drawn')
    values = [vars(parser.parse_args(words)) for words in ([], [option, '0.9'])]
    assert capsys.readouterr().err == ''
    assert parser.parse_args([alias, '0.9']) == argparse.Namespace(**values[1])
    assert capsys.readouterr().err == f'warning: {alias} is a deprecated alias of {option}\n'
    assert values[0] == dict(min_loaded=1, score=1)


@pytest.mark.slow
def test_ctrl_c_during_the_imports_of_a_tool():
    code = """if True:
        import sys
        class Interrupt:
            def find_spec(name, *args):
                if name == 'torch':
                    raise KeyboardInterrupt
        sys.meta_path.insert(0, Interrupt)
        import mmdense.cli
    """
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (130, 'interrupted\n')
