"""How a command ends on an error that the user can mend: with one line."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable

from mmdense.errors import UserError, printable

__all__ = ['report_errors']


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
    from mmdense.mistakes import explain

    return explain(error)


def _fail(message: str) -> int:
    sys.stderr.write(f'error: {printable(message)}\n')
    return 2
