"""What the command lines under tools/ do, as functions."""

from typing import Any

from mmdense import registry  # noqa: F401  (says so if the MM packages are missing)
from mmdense.apis.errors import report_errors
from mmdense.errors import UserError

__all__ = ['UserError', 'deploy', 'report_errors']


def __getattr__(name: str) -> Any:
    """Import :func:`.deployment.deploy` when it is asked for: it brings all networks with it."""
    if name != 'deploy':
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    from mmdense.apis.deployment import deploy

    return deploy
