"""How a command ends on an error that the user can mend: with one line."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

from mmdense.errors import UserError

__all__ = ['report_errors']


def report_errors(main: Callable[[], None]) -> Callable[[], None]:
    """Make a command's ``main`` end with one line and status 2 on a :class:`.UserError`."""

    @functools.wraps(main)
    def wrapped() -> None:
        try:
            main()
        except UserError as error:
            sys.exit(_fail(str(error)))

    return wrapped


def _fail(message: str) -> int:
    sys.stderr.write(f'error: {message}\n')
    return 2
