"""The Python API: predictions, ONNX export, weight conversion, inference forms."""

from importlib import import_module
from typing import Any

from mmdense import registry  # noqa: F401  (raises if the MM packages are missing)

# Name -> module, imported on first use: together they import every network.
MODULES = dict(
    Predictor='apis.predict',
    convert_weights='apis.convert',
    deploy='apis.deployment',
    export_onnx='apis.export',
    find_images='runtime.images',
    save_predictions='runtime.results',
)
__all__ = list(MODULES)


def __getattr__(name: str) -> Any:
    """Import what :data:`MODULES` names."""
    if name not in MODULES:
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
    return getattr(import_module(f'mmdense.{MODULES[name]}'), name)
