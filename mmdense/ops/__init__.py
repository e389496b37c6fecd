"""A replacement for mmcv's compiled extension, ``mmcv._ext``, in torchvision and plain torch.

With :func:`install`, ``import mmcv.ops`` works where mmcv has no compiled extension (mmcv-lite, a
pure Python wheel) or one that doesn't load (built for another torch). An extension that loads is
used. The environment variable ``MMDENSE_OPS`` selects the operators when ``mmcv._ext`` is first
imported:

=============== ==================================================================================
``auto``        the compiled extension, or mmdense's operators if there is none or, with a
                warning, if it doesn't load
``torchvision`` mmdense's operators
``compiled``    the compiled extension; ImportError if there is none that loads
=============== ==================================================================================

Provided operators, forward and backward, on every device, in float64, float32, float16, bfloat16:

- nms, softnms, nms_match, roi_align (avg), roi_pool, sigmoid_focal_loss, ms_deform_attn, sync_bn
- deform_conv, modulated_deform_conv; masked_im2col, masked_col2im (forward only, as in mmcv)
- psamask, carafe

These are all that mmdet 3.3 and mmseg 1.2 call, except deform_roi_pool (two Faster R-CNN configs)
and line_nms (CLRNet). Every other operator exists and raises NotImplementedError when it is called:
rotated and quadrilateral boxes, points and voxels, sparse convolution, border_align, prroi_pool,
correlation, softmax_focal_loss, StyleGAN's operators and so on.
"""

import importlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

__all__ = ['backend', 'install']

NAME = 'mmcv._ext'
VARIABLE = 'MMDENSE_OPS'
CHOICES = ('auto', 'torchvision', 'compiled')
OURS = str(Path(__file__).with_name('_ext.py'))


def install() -> None:
    """Handle imports of ``mmcv._ext`` from now on. Further calls have no effect.

    The choice is made when mmcv.ops is imported. Until then, neither torch nor mmcv is imported.
    """
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def backend() -> str:
    """Return which operators mmcv uses, 'compiled' or 'torchvision'; imports them if necessary.

    ImportError if there is no mmcv, or no extension that loads with ``MMDENSE_OPS=compiled``;
    ValueError if ``MMDENSE_OPS`` has an unknown value.
    """
    module = importlib.import_module(NAME)
    return 'torchvision' if getattr(module, '__file__', None) == OURS else 'compiled'


class _Finder(importlib.abc.MetaPathFinder):
    """Finds only ``mmcv._ext``."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != NAME or path is None:
            return None
        return importlib.util.spec_from_file_location(NAME, OURS, loader=_Loader(path))


class _Loader(importlib.machinery.SourceFileLoader):
    """Loads the compiled extension on ``path``, or ``_ext.py`` of this package under its name."""

    def __init__(self, path: Sequence[str]) -> None:
        super().__init__(NAME, OURS)
        self.package_path = path
        self.compiled = None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        choice = os.environ.get(VARIABLE, 'auto')
        if choice not in CHOICES:
            raise ValueError(
                f'{VARIABLE}={choice!r} is unknown; choose one of {", ".join(CHOICES)}'
            )
        if choice == 'torchvision':
            return None
        self.compiled = importlib.machinery.PathFinder.find_spec(NAME, self.package_path)
        if self.compiled is None:
            reason = 'mmcv is installed without it'
        else:
            try:
                importlib.import_module('torch')  # the extension links against its libraries
                module = importlib.util.module_from_spec(self.compiled)
                self.compiled.loader.exec_module(module)
                return module
            except (ImportError, OSError) as error:
                detail, origin = str(error).partition('\n')[0], self.compiled.origin
                reason = f'{detail if origin in detail else f"{origin}: {detail}"} (does not load)'
                self.compiled = None
                if choice == 'auto':
                    warnings.warn(
                        f"using mmdense's operators instead of mmcv's compiled ones: {reason}",
                    )
        if choice == 'compiled':
            raise ImportError(
                f'{VARIABLE}=compiled, but there is no compiled extension of mmcv: {reason}. '
                f'Install an mmcv that was built for this torch, or set {VARIABLE}=auto',
                name=NAME,
            )
        return None

    def exec_module(self, module: ModuleType) -> None:
        if self.compiled is None:
            super().exec_module(module)
        else:
            # create_module() has run it already. The import system has set this finder's spec.
            module.__spec__, module.__loader__ = self.compiled, self.compiled.loader
