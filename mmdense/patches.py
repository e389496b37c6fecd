"""The changes that mmdense makes to other libraries, all in one place."""

from __future__ import annotations

import functools
import os

__all__ = ['apply_patches']


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

    Besides these, ``import mmdense`` provides ``mmcv._ext`` where mmcv's compiled operators are
    missing (:func:`mmdense.ops.install`).
    """
    os.environ.setdefault('OPENCV_IO_MAX_IMAGE_PIXELS', '178956970')  # read when cv2 is imported

    from mmengine.registry import WEIGHT_INITIALIZERS
    from mmengine.runner import CheckpointLoader
    from PIL import EpsImagePlugin

    from mmdense.weights.loading import PretrainedInit
    from mmdense.weights.sources import SCHEMES

    EpsImagePlugin.gs_binary = False
    for prefix, loader in SCHEMES.items():
        CheckpointLoader.register_scheme(prefix, loader=loader, force=True)
    WEIGHT_INITIALIZERS.register_module(name='Pretrained', module=PretrainedInit, force=True)
