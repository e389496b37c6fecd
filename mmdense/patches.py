"""The changes that mmdense makes to other libraries, all in one place."""

import functools
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from typing import Any

# Warnings of libraries that a user can do nothing about, by their beginning.
SILENCED = (
    *('Setting MKL_NUM_THREADS', 'Setting OMP_NUM_THREADS'),  # mmengine's, in each process
    '`broadcast_buffers` is deprecated',
    'faster_coco_eval is not installed',  # mmdet: a metric that is not used
    'Fail to import ``MultiScaleDeformableAttention``',  # mmcv-lite
    '"FileClient" will be deprecated',  # mmengine's own hooks use both
    '"HardDiskBackend" is the alias',
    'The prefix is not set in metric class',  # mmseg's metrics and hooks with their defaults
    'The draw is False',
)
LOGGING = ('logging', 'mmengine.logging.logger', __name__)
# Messages of libraries that the terminal shows: progress, metrics, and what a run starts from.
LIBRARIES = ('mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain', 'pycocotools')
SHOWN = re.compile(
    r'(Epoch|Iter)\((train|val)\)|(Epoch|Iter)\(test\).* eta: |per class results|\n[+|]|LR is set|'
    r'Auto resumed|Did not find|resumed epoch|Load checkpoint|The best checkpoint|the monitored'
)
EMPTY = re.compile(r'(\S*A[PR]\S*: )-1\.0+\b')  # COCO's metric if no object has the size


@functools.cache
def apply_patches() -> None:
    """Change other libraries for the whole process; called when :mod:`mmdense.models` is imported.

    - OpenCV refuses images above Pillow's limit of 178,956,970 pixels, unless
      ``OPENCV_IO_MAX_IMAGE_PIXELS`` is set (its own limit is six times as high).
    - Pillow never starts Ghostscript for a file that claims to be an image.
    - mmengine's ``CheckpointLoader`` learns ``timm://`` and ``condensenetv2://``, reads
      ``.safetensors``, and unpickles nothing but weights and training state. Object stores
      (``s3://``, ``petrel://``, ``pavi://``) stay mmengine's.
    - mmengine's ``Pretrained`` initializer accepts every known weight format and raises an error
      instead of continuing with random weights.
    - mmengine's ``ImgDataPreprocessor``, and so mmdet's, normalizes any number of channels, not
      only 1 or 3.

    Besides these, ``import mmdense`` provides ``mmcv._ext`` where mmcv's compiled operators are
    missing (:func:`mmdense.ops.install`) and calls :func:`install`; the tools run in
    :func:`quiet_terminal`.
    """
    os.environ.setdefault('OPENCV_IO_MAX_IMAGE_PIXELS', '178956970')  # read when cv2 is imported

    from mmengine.model import ImgDataPreprocessor
    from mmengine.registry import WEIGHT_INITIALIZERS
    from mmengine.runner import CheckpointLoader
    from PIL import EpsImagePlugin

    from mmdense.weights.loading import PretrainedInit
    from mmdense.weights.sources import SCHEMES

    EpsImagePlugin.gs_binary = False
    for prefix, loader in SCHEMES.items():
        CheckpointLoader.register_scheme(prefix, loader=loader, force=True)
    WEIGHT_INITIALIZERS.register_module(name='Pretrained', module=PretrainedInit, force=True)
    ImgDataPreprocessor.__init__ = _for_any_channels(ImgDataPreprocessor.__init__)


def _for_any_channels(init: Callable[..., None]) -> Callable[..., None]:
    import torch

    @functools.wraps(init)
    def wrapped(self: Any, mean: Any = None, std: Any = None, *args: Any, **kwargs: Any) -> None:
        wide = bool(mean and std) and len(mean) == len(std) and len(mean) not in (1, 3)
        init(self, *((None, None) if wide else (mean, std)), *args, **kwargs)
        if wide:
            self._enable_normalize = True
            self.register_buffer('mean', torch.tensor(mean).view(-1, 1, 1), False)
            self.register_buffer('std', torch.tensor(std).view(-1, 1, 1), False)

    return wrapped


def find_config(path: str) -> Path:
    """Return the file of a config, such as ``mmdet::FOLDER/NAME.py`` of an installed package."""
    package, _, name = path.rpartition('::')
    spec = find_spec(package) if package.isidentifier() else None
    return Path(spec.origin).parent / '.mim/configs' / name if spec and spec.origin else Path(path)


def install() -> None:
    """Announce mmdense's registries and call :func:`patch_configs` once mmengine is imported.

    Further calls have no effect. Neither torch nor mmengine is imported.
    """
    if sys.modules.get('mmengine'):
        _announce()
    elif not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def _announce() -> None:
    import mmdense.registry  # noqa: F401

    patch_configs()


class _Finder(MetaPathFinder):
    """Finds mmengine as the other finders do, and makes its loader announce the registries."""

    def find_spec(self, name: str, *args: Any) -> ModuleSpec | None:
        if name != 'mmengine':
            return None
        others = (f.find_spec(name, *args) for f in sys.meta_path if f is not self)
        spec = next(filter(None, others), None)
        if spec and spec.loader:
            load = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (load(module), _announce())
        return spec


@functools.cache
def patch_configs() -> None:
    """Let a config's ``_base_`` name those of mmdense, and of mmseg in either distribution.

    mmengine knows a fixed table of distributions, and reads all metafiles of one for each base. A
    base ``mmdense::...`` sets no scope, since most of its parts are mmdet's or mmseg's.
    """
    from mmengine.config import Config, utils

    original = Config._get_cfg_path

    def get_cfg_path(path: str, filename: str) -> tuple[str, str | None]:
        package, file = path.rpartition('::')[0], find_config(path)
        scope = None if package == 'mmdense' else package
        return (str(file), scope) if package and file.is_file() else original(path, filename)

    Config._get_cfg_path = staticmethod(get_cfg_path)
    utils.MODULE2PACKAGE['mmdense'] = 'mmdense'


@contextmanager
def quiet_terminal() -> Iterator[None]:
    """Show progress, metrics and warnings in the terminal; the log file has everything.

    Inside the context, new loggers of mmengine show only those messages of :data:`LIBRARIES` that
    are :data:`SHOWN`, and what pycocotools prints is logged.
    """
    from mmengine.logging import MMLogger, logger
    from pycocotools import coco, cocoeval

    original, printing = MMLogger.__init__, (coco, cocoeval, logger)

    @functools.wraps(original)
    def init(self: MMLogger, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        terminal = self.handlers[0]
        terminal.addFilter(_is_shown)
        terminal.formatter.info_format = '%(asctime)s %(message)s'
        terminal.format = lambda record: EMPTY.sub(r'\1-', terminal.formatter.format(record))

    MMLogger.__init__ = init
    for module in printing:
        module.print = lambda text: MMLogger.get_current_instance().info(text)
    try:
        yield
    finally:
        MMLogger.__init__ = original
        for module in printing:
            del module.print


def _is_shown(record: logging.LogRecord) -> bool:
    message, frame = record.getMessage(), sys._getframe(1)
    if record.levelno >= logging.WARNING or SHOWN.match(message):
        return not message.startswith(SILENCED)
    while (origin := frame.f_globals.get('__name__', '')) in LOGGING:
        frame = frame.f_back
    return origin.partition('.')[0] not in LIBRARIES
