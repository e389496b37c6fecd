"""What the command lines under tools/ do, as functions."""

import os
from importlib import import_module
from typing import Any

from mmdense import registry  # noqa: F401  (says so if the MM packages are missing)
from mmdense.apis.errors import report_errors
from mmdense.errors import UserError

# OpenCV gives up where Pillow does, half a gigabyte in colour: its own limit, read when it is
# imported, is three.
os.environ.setdefault('OPENCV_IO_MAX_IMAGE_PIXELS', '178956970')

__all__ = ['Predictor', 'UserError', 'deploy', 'report_errors']

# Imported when they are asked for: they bring all networks with them.
LAZY = dict(deploy='deployment', Predictor='predict')


def __getattr__(name: str) -> Any:
    """Import what is in :data:`LAZY`."""
    if name not in LAZY:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(f'{__name__}.{LAZY[name]}'), name)
