"""What all commands share: parsers, --cfg-options and errors in one line."""

import argparse
import ast
import functools
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from typing import Any

# Before torch is loaded: waiting threads sleep instead of spinning (docs/decisions.md).
os.environ.setdefault('OMP_WAIT_POLICY', 'passive')

if sys.excepthook is sys.__excepthook__:  # as report_errors, during the imports

    def _report_interrupt(kind: type[BaseException], *error: Any) -> None:
        if kind is not KeyboardInterrupt:
            return sys.__excepthook__(kind, *error)
        sys.stderr.write('interrupted\n')
        os._exit(130)

    sys.excepthook = _report_interrupt

import torch
from mmengine.config import Config, DictAction
from mmengine.logging import MMLogger

from mmdense.config.parts import build_error
from mmdense.config.read import load_config
from mmdense.errors import UserError, printable, share
from mmdense.patches import SILENCED, quiet_terminal

INTERRUPTED = 128 + signal.SIGINT  # as shells report a process that Ctrl-C has ended

for text in SILENCED:
    warnings.filterwarnings('ignore', re.escape(text))


class _Settings(DictAction):
    """mmengine's KEY=VALUE, where quoted elements stay text: classes="('0','1')" names digits."""

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
        if val.startswith(('(', '[', '{')) and {*'"\''} & {*val}:  # all else as mmengine has it
            with suppress(ValueError, SyntaxError, RecursionError):
                value = ast.literal_eval(val)
                if isinstance(value, list | tuple | dict):
                    return value
        return DictAction._parse_iterable(val)


def example(arguments: str) -> dict[str, Any]:
    """Return parser settings that end the help in an example: ``python`` and ``arguments``."""
    return dict(
        epilog=f'example:\n  python {arguments}',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def config_parser(description: str | None, arguments: str) -> argparse.ArgumentParser:
    """Return a parser for a command on a config file, with an :func:`example`."""
    parser = argparse.ArgumentParser(description=description, **example(arguments))
    parser.add_argument('config', help='config file')
    parser.add_argument('--work-dir', help='folder of logs and checkpoints (work_dirs/CONFIG)')
    add_cfg_options(parser)
    parser.add_argument(
        '--launcher',
        choices=('none', 'pytorch', 'slurm', 'mpi'),
        default='none',
        help='how the processes are started (%(default)s)',
    )
    parser.add_argument('--verbose', action='store_true', help='show all that goes to the log file')
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


def add_device(parser: argparse.ArgumentParser) -> None:
    """Add the option for the device that is measured."""
    default = 'cuda' if torch.cuda.is_available() else 'cpu'
    parser.add_argument(
        '--device', choices=('cpu', 'cuda'), default=default, help='to measure on (%(default)s)'
    )


def add_min_loaded(parser: argparse.ArgumentParser, of: str) -> None:
    """Add the option to accept weights that fill only a part of the model."""
    parser.add_argument(
        '--min-loaded',
        type=share,
        default=1.0,
        metavar='SHARE',
        help=f'share of the {of} tensors that the checkpoint must fill, 0 to 1 (%(default)s)',
    )
    _add_deprecated(parser, '--min-coverage', '--min-loaded')


def add_score(parser: argparse.ArgumentParser, default: float, what: str) -> None:
    """Add the option for the lowest score of instances; ``what`` is done with them."""
    text = f'lowest score of the instances that are {what}, 0 to 1 (%(default)s)'
    parser.add_argument('--score', type=share, default=default, help=text)
    _add_deprecated(parser, '--score-thr', '--score')


def _add_deprecated(parser: argparse.ArgumentParser, alias: str, option: str) -> None:
    def parse(text: str) -> float:
        sys.stderr.write(f'warning: {alias} is a deprecated alias of {option}\n')
        return share(text)

    name = option.strip('-').replace('-', '_')
    hidden = dict(default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    parser.add_argument(alias, dest=name, type=parse, **hidden)


def parse_config(
    parser: argparse.ArgumentParser, argv: Sequence[str] | None = None
) -> tuple[argparse.Namespace, Config]:
    """Parse a command line by a :func:`config_parser`, and load the config that it names."""
    args = parser.parse_args(argv)
    cfg = load_config(
        args.config, options=args.cfg_options, work_dir=args.work_dir, launcher=args.launcher
    )
    return args, cfg


def report_errors(main: Callable[..., None]) -> Callable[..., None]:
    """Make a command's ``main(argv=None)`` end a user's mistake with one line and status 2.

    That is a :class:`.UserError` or a :func:`.build_error`. Other errors keep their traceback.
    Without ``--verbose``, the command runs in a :func:`.quiet_terminal`.
    Ctrl-C ends with one line and status 130, SIGTERM with 143, both after ending what was started.
    """

    @functools.wraps(main)
    def wrapped(argv: Sequence[str] | None = None) -> None:
        with suppress(ValueError):  # not in the main thread
            signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
        verbose = any(word.startswith('--verb') for word in argv or sys.argv[1:])
        try:
            with nullcontext() if verbose else quiet_terminal():
                main(argv)
        except Exception as error:
            message = str(error) if isinstance(error, UserError) else build_error(error)
            if message is None:
                raise
            sys.stderr.write(f'error: {printable(message)}\n')
            sys.exit(2)
        except KeyboardInterrupt:
            sys.stderr.write('interrupted\n')
            sys.exit(INTERRUPTED)

    return wrapped


def silence_libraries() -> None:
    """Silence warnings and logs of libraries that a measurement would repeat for every model."""
    os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # the profiler logs each start and stop
    MMLogger.get_current_instance().setLevel('WARNING')  # optimizers list their settings
    warnings.simplefilter('ignore', UserWarning)  # mmseg recommends losses
