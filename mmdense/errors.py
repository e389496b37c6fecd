"""The error for what a user can mend, and the way out that it names."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path

__all__ = ['UserError', 'did_you_mean', 'printable', 'reason_of', 'suggest']


class UserError(RuntimeError):
    """A mistake that the user can mend: its text is one line that says how."""

    def __init__(self, text: str) -> None:
        # torch makes a worker's error again with its traceback in front: that leaves the line.
        kind = type(self)
        super().__init__(text.rpartition(f'{kind.__module__}.{kind.__qualname__}: ')[2].rstrip())


def suggest(name: str, known: Iterable[str]) -> str:
    """Return the end of an error message: the known name closest to a wrong one, and all."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    hint = f'; did you mean {close[0]!r}?' if close else ''
    return f'{hint} (known: {known})'


def printable(text: str) -> str:
    """Return a text with line breaks, and codes that a terminal obeys, escaped: names hold any."""
    return ''.join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def reason_of(error: Exception) -> str:
    """Return an error of whatever library in one line, of 200 letters at most."""
    first, *more = [line.strip() for line in str(error).splitlines() if line.strip()] or ['']
    if first.endswith(':') and more:
        first = f'{first} {more[0]}'
    line = f'{type(error).__name__}: {first}'.rstrip(': .')
    return line if len(line) <= 200 else f'{line[:197]}...'


def did_you_mean(path: str | Path, pattern: str) -> str:
    """Return the end of an error message: a file beside a missing one that is named like it."""
    path = Path(path)
    close = difflib.get_close_matches(
        str(path), map(str, path.parent.glob(pattern)), n=1, cutoff=0.4
    )
    return f'; did you mean {close[0]}?' if close else ''
