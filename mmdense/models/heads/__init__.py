"""Heads for mmdet and mmseg, imported when they are built: detectors don't need mmseg."""

from collections.abc import Callable
from importlib import import_module
from typing import Any

from mmdense.registry import MODELS

HEADS = dict(
    SSDHead='mmdense.models.heads.ssd',
    ReXUNetHead='mmdense.models.heads.rexunet',
    ReXUNetDepthHead='mmdense.models.heads.rexunet',
)


def _builder(name: str, module: str) -> Callable[..., Any]:
    def build(**options: Any) -> Any:
        return getattr(import_module(module), name)(**options)

    return build


for _name, _module in HEADS.items():
    MODELS.register_module(name=_name, module=_builder(_name, _module))
