"""Heads for the packages that are installed: importing this package registers them."""

from importlib.util import find_spec

__all__ = []

if find_spec('mmdet'):
    from mmdense.models.heads.ssd import SSDHead  # noqa: F401

    __all__ += ['SSDHead']
if find_spec('mmseg'):
    from mmdense.models.heads.rexunet import ReXUNetDepthHead, ReXUNetHead  # noqa: F401

    __all__ += ['ReXUNetDepthHead', 'ReXUNetHead']
