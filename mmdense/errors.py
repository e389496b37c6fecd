"""The error for what a user can mend, and the way out that it names."""

import difflib
from collections.abc import Iterable

__all__ = ['UserError', 'printable', 'suggest']


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
