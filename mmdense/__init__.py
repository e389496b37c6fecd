"""Densely connected and rank-expanding backbones for MMDetection 3.x and MMSegmentation 1.x.

Importing this package makes ``mmcv.ops`` importable without mmcv's compiled extension (see
:mod:`mmdense.ops`) and, once mmengine is imported, announces the registries, so that
``type='mmdense.RDNet'`` can be built. By itself it imports neither torch nor mmengine.
"""

from mmdense import ops, patches

__version__ = '0.1.0'
__all__ = ['__version__']

ops.install()
patches.install()
