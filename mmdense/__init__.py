"""Densely connected and rank-expanding backbones for MMDetection 3.x and MMSegmentation 1.x.

Importing this package makes ``mmcv.ops`` importable without mmcv's compiled extension (see
:mod:`mmdense.ops`) and announces the registries, so that ``type='mmdense.RDNet'`` can be built.
"""

from importlib.util import find_spec

from mmdense import ops

__version__ = '0.1.0'
__all__ = ['__version__']

ops.install()
if find_spec('mmengine'):  # without it the operators and the metadata still work
    from mmdense import registry  # noqa: F401
    from mmdense.patches import patch_configs

    patch_configs()
