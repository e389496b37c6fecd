"""The size of a config's training images."""

from collections.abc import Sequence

import numpy as np
from mmengine.config import Config

from mmdense.errors import UserError

DIVISOR = 32  # sides are padded to a multiple


def training_size(cfg: Config) -> tuple[int, int]:
    """Return the sides of the largest training images, the shorter first, padded to 32 pixels.

    UserError if the config does not state it.
    """
    size = cfg.model.get('data_preprocessor', {}).get('size')  # crops are padded to it
    data = None if size else (cfg.get('train_dataloader') or {}).get('dataset')
    while data and not size:  # a wrapper's pipeline runs after the wrapped one
        size = _last_size(data.get('pipeline', ()))
        data = data.get('dataset') or next(iter(data.get('datasets', ())), None)
    if not size or min(size) < 1:
        raise UserError(f'{cfg.filename} does not state the size of its images: add --size H W')
    return tuple(-(-side // DIVISOR) * DIVISOR for side in sorted(size))


def _last_size(pipeline: Sequence[dict]) -> tuple[int, int] | None:
    """Return the largest size after a pipeline's last resizing or cropping step."""
    size = None
    for step in pipeline:
        if 'transforms' in step:  # branches, or the steps of a wrapper
            inner = step['transforms']
            branches = [inner] if isinstance(inner, dict) else inner
            branches = [b if isinstance(b, list) else [b] for b in branches]
            sizes = [branch_size for branch_size in map(_last_size, branches) if branch_size]
            size = max(sizes, key=np.prod, default=size)
        elif 'crop_size' in step and step.get('crop_type', 'absolute') == 'absolute':
            size = _pair(step['crop_size'])
        elif step.get('scales') or step.get('scale'):
            scales = step.get('scales') or step['scale']
            short = step.get('resize_type') == 'ResizeShortestEdge'  # each is a shorter side
            if isinstance(scales, int) or (isinstance(scales[0], int) and not short):
                scales = [scales]
            size = max(map(_pair, scales), key=np.prod)
        elif step.get('type') == 'Pad' and step.get('size'):
            size = _pair(step['size'])
    return size


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else tuple(size)
