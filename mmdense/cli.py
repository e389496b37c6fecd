"""What the command lines have in common."""

from __future__ import annotations

import argparse
import functools
import re
import sys
from collections.abc import Callable
from typing import Any

from mmengine.config import Config, DictAction

from mmdense.config.read import load_config
from mmdense.errors import UserError, printable

__all__ = [
    'add_cfg_options',
    'add_min_coverage',
    'config_parser',
    'example',
    'parse_config',
    'report_errors',
]

# A quoted element of a list, and what stands for it while mmengine parses the rest.
_QUOTED = re.compile(r"""(?<![^\[(,\s])('[^']*'|"[^"]*")(?![^\]),\s])""")
_HIDDEN = '\0{}\0'


class _Settings(DictAction):
    """mmengine's KEY=VALUE, where a quoted element stays text: classes="('0','1')" names digits."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: Any, values: Any, *args: Any
    ) -> None:
        for text in values:
            if '=' not in text:
                parser.error(f'--cfg-options {text}: write KEY=VALUE')
        try:
            super().__call__(parser, namespace, values, *args)
        except (AssertionError, RecursionError):
            parser.error(f"--cfg-options {' '.join(values)[:200]}: its brackets don't match")

    @staticmethod
    def _parse_iterable(val: str) -> Any:
        if _QUOTED.fullmatch(val):  # quotes around the whole mean nothing, as in mmengine
            val = val[1:-1]
        words = {}

        def hide(quoted: re.Match) -> str:
            key = _HIDDEN.format(len(words))
            words[key] = quoted[1][1:-1]
            return key

        def show(value: Any) -> Any:
            if isinstance(value, list | tuple):
                return type(value)(map(show, value))
            return words.get(value, value) if isinstance(value, str) else value

        return show(DictAction._parse_iterable(_QUOTED.sub(hide, val)))


def example(arguments: str) -> dict[str, Any]:
    """Return what makes a parser's help end in an example, and keep its lines as they are.

    Args:
        arguments: The command line behind ``python``.
    """
    return dict(
        epilog=f'example:\n  python {arguments}',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def config_parser(description: str | None, arguments: str) -> argparse.ArgumentParser:
    """Return a parser for a command on a config file; the command adds its own arguments.

    Args:
        description: What the command does.
        arguments: Of an :func:`example`.
    """
    parser = argparse.ArgumentParser(description=description, **example(arguments))
    parser.add_argument('config', help='config file')
    parser.add_argument('--work-dir', help='logs and checkpoints (work_dirs/<config>)')
    add_cfg_options(parser)
    parser.add_argument(
        '--launcher',
        choices=('none', 'pytorch', 'slurm', 'mpi'),
        default='none',
        help='how the processes were started (%(default)s)',
    )
    return parser


def add_cfg_options(parser: argparse.ArgumentParser) -> None:
    """Add the option that overrides settings of a config."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=_Settings,
        metavar='KEY=VALUE',
        help='override settings of the config; data_root=FOLDER moves all data sets',
    )


def add_min_coverage(parser: argparse.ArgumentParser, of: str) -> None:
    """Add the option for weights that fill a model in part."""
    parser.add_argument(
        '--min-coverage',
        type=_share,
        default=1.0,
        metavar='SHARE',
        help=f'share of the {of} tensors that the checkpoint must fill, 0 to 1 (%(default)s)',
    )


def _share(text: str) -> float:
    share = float(text)
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f'{text} is not from 0 to 1')
    return share


def parse_config(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, Config]:
    """Parse the command line and read the config that it names.

    Raises:
        UserError: As :func:`.load_config`.
    """
    args = parser.parse_args()
    cfg = load_config(
        args.config, options=args.cfg_options, work_dir=args.work_dir, launcher=args.launcher
    )
    return args, cfg


def report_errors(main: Callable[[], None]) -> Callable[[], None]:
    """Make a command's ``main`` end with one line and status 2 on a mistake that users can mend.

    That is a :class:`.UserError`, or an error of building from a config that
    :func:`mmdense.mistakes.explain` knows. All others keep their traceback.
    """

    @functools.wraps(main)
    def wrapped() -> None:
        try:
            main()
        except UserError as error:
            sys.exit(_fail(str(error)))
        except Exception as error:
            told = _explain(error)
            if told is None:
                raise
            sys.exit(_fail(str(told)))

    return wrapped


def _explain(error: Exception) -> UserError | None:
    if 'mmengine' not in sys.modules:  # nothing was built from a config
        return None
    from mmdense.config.explain import explain

    return explain(error)


def _fail(message: str) -> int:
    sys.stderr.write(f'error: {printable(message)}\n')
    return 2
