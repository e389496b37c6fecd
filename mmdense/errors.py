"""UserError, and the pieces that one-line messages are made of."""

import argparse
import difflib
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class UserError(RuntimeError):
    """An error that the user can fix. Its message is one line that says how."""

    def __init__(self, message: str) -> None:
        # A data loader re-raises a worker's error with the traceback before the message: drop it.
        kind = type(self)
        prefix = f'{kind.__module__}.{kind.__qualname__}: '
        super().__init__(message.rpartition(prefix)[2].rstrip())


def share(text: str) -> float:
    """Parse a share from 0 to 1, as the type of an argument."""
    share = float(text)
    if not 0 <= share <= 1:
        raise argparse.ArgumentTypeError(f'{text} is not from 0 to 1')
    return share


def positive(text: str, least: int = 1) -> int:
    """Parse an integer from 1, or from ``least``, as the type of an argument."""
    if not text.isdecimal() or int(text) < least:
        raise argparse.ArgumentTypeError(f'{text} is not an integer >= {least}')
    return int(text)


def not_negative(text: str) -> int:
    """Parse an integer from 0, as the type of an argument."""
    return positive(text, 0)


def suggest_name(name: str, known: Iterable[str]) -> str:
    """Return the end of an error message: the known name closest to ``name``, and all of them."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f'; did you mean {close[0]!r}?' if close else ''
    return f'{hint} (known: {known})'


def suggest_file(path: str | Path, pattern: str) -> str:
    """Return the end of an error message: a file with a name close to the missing ``path``.

    ``pattern`` is the glob pattern of the candidates in its folder, such as ``'*.pth'``.
    """
    path = Path(path)
    files = map(str, path.parent.glob(pattern))
    close = difflib.get_close_matches(str(path), files, n=1, cutoff=0.4)
    return f'; did you mean {close[0]}?' if close else ''


def warn(text: str) -> None:
    """Log a warning, from the main process."""
    from mmengine.dist import is_main_process
    from mmengine.logging import print_log

    if is_main_process():
        print_log(text, logger='current', level=logging.WARNING)


def first_of(items: Sequence[Any], count: int = 5) -> str:
    """Return the first items, and how many there are more."""
    more = f' and {len(items) - count} more' if len(items) > count else ''
    return ', '.join(map(str, items[:count])) + more


@contextmanager
def explain(fault: str) -> Iterator[None]:
    """Turn any error but a UserError into one, ``fault (the error in one line)``.

    For calls of libraries whose parts each raise their own.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f'{fault} ({one_line(error)})') from error


def one_line(error: Exception) -> str:
    """Return any library's error as one line of at most 200 characters; a UserError is one."""
    if isinstance(error, UserError):
        return str(error)
    first, *more = [line.strip() for line in str(error).splitlines() if line.strip()] or ['']
    if first.endswith(':') and more:
        first = f'{first} {more[0]}'
    line = f'{type(error).__name__}: {first}'.rstrip(': .')
    return line if len(line) <= 200 else f'{line[:197]}...'


def printable(text: str) -> str:
    """Return a text with line breaks and terminal control codes escaped."""
    return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in text)
