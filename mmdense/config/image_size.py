"""The size of the training images that a config asks for."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from mmengine.config import Config

from mmdense.errors import UserError

__all__ = ['training_size']

DIVISOR = 32  # which sides are padded to


def training_size(cfg: Config) -> tuple[int, int]:
    """Return height and width of the largest training images, padded to 32, the longer side last.

    Raises:
        UserError: The config doesn't tell.
    """
    size = cfg.model.get('data_preprocessor', {}).get('size')  # what crops are padded to
    data = None if size else (cfg.get('train_dataloader') or {}).get('dataset')
    while data and not size:  # a wrapper's own pipeline comes behind that of what it wraps
        size = _last_size(data.get('pipeline', ()))
        data = data.get('dataset') or next(iter(data.get('datasets', ())), None)
    if not size or min(size) < 1:
        raise UserError(f'{cfg.filename} does not tell the size of its images: give --size H W')
    return tuple(-(-side // DIVISOR) * DIVISOR for side in sorted(size))


def _last_size(pipeline: Sequence[dict]) -> tuple[int, int] | None:
    """Return the largest size that a pipeline's last resizing or cropping step gives."""
    size = None
    for step in pipeline:
        if 'transforms' in step:  # branches, or the steps that a wrapper takes
            inner = step['transforms']
            branches = [inner] if isinstance(inner, dict) else inner
            branches = [b if isinstance(b, list) else [b] for b in branches]
            sizes = [found for found in map(_last_size, branches) if found]
            size = max(sizes, key=np.prod, default=size)
        elif 'crop_size' in step and step.get('crop_type', 'absolute') == 'absolute':
            size = _pair(step['crop_size'])
        elif step.get('scales') or step.get('scale'):
            scales = step.get('scales') or step['scale']
            short = step.get('resize_type') == 'ResizeShortestEdge'  # each a shorter side
            if isinstance(scales, int) or (isinstance(scales[0], int) and not short):
                scales = [scales]
            size = max(map(_pair, scales), key=np.prod)
        elif step.get('type') == 'Pad' and step.get('size'):
            size = _pair(step['size'])
    return size


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)
