"""The Python API: predictions, ONNX export, converted weights, inference forms."""

from importlib import import_module
from typing import Any

from mmdense import registry  # noqa: F401  (raises if the MM packages are missing)

__all__ = ['Predictor', 'convert_weights', 'deploy', 'export_onnx']

# Imported when they are asked for: they import every network.
LAZY = dict(
    Predictor='predict', convert_weights='convert', deploy='deployment', export_onnx='export'
)


def __getattr__(name: str) -> Any:
    """Import what is in :data:`LAZY`."""
    if name not in LAZY:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(f'{__name__}.{LAZY[name]}'), name)
