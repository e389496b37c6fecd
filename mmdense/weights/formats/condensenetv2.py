"""CondenseNetV2: the released checkpoints, trained models and converted ones.

The names are mmdense's: those of a trained model load into ``form='learned'``, those of a converted
one into ``form='condensed'``. Two kinds of values differ. A converted model scatters by a matrix of
zeros and ones, mmdense by the column of the one in each row. Masks and counters are floats there
and integers in mmdense; they are rounded, as the released moving average covers them too.
"""

from typing import Any

import torch
from torch import Tensor

from mmdense.weights.formats.format import AFFINE, NORM, Format

LAYER = r'features\.denseblock_\d+\.denselayer_\d+'
INTEGERS = dict(_mask=torch.uint8, _count=torch.int64, _stage=torch.int64)


def _values(weights: dict[str, Any]) -> dict[str, Any]:
    trained, converted = (
        any(key.endswith(leaf) for key in weights) for leaf in ('._mask', '.index')
    )
    if trained == converted:
        raise ValueError(
            'neither a trained nor a converted CondenseNetV2: it has '
            + ('both masks and indices' if trained else 'no masks and no indices')
        )
    changed = {}
    for key, value in weights.items():
        leaf = key.rpartition('.')[2]
        if leaf in INTEGERS:
            value = value.round().to(INTEGERS[leaf])  # 6.9999 is stage 7
        elif key.endswith('.sfr.index') and value.is_floating_point():
            value = _destinations(key, value)
        changed[key] = value
    return changed


def _destinations(key: str, matrix: Tensor) -> Tensor:
    """Return the column of the 1 in each row: [rows, columns] to int64 [rows]."""
    chosen = matrix == 1
    single = matrix.ndim == 2 and bool((chosen.sum(1) == 1).all())
    if not single or matrix.count_nonzero() != len(matrix):
        raise ValueError(f'{key} must be a matrix of zeros with a single 1 in each row')
    return chosen.int().argmax(1)


CONDENSENETV2 = Format(
    name='condensenetv2',
    about='CondenseNetV2: the released models, converted or as trained',
    sign=rf'{LAYER}\.',
    rules=(
        (
            rf'features\.init_conv\.weight|{LAYER}\.se\.fc\.[02]\.weight|'
            rf'{LAYER}\.(?:conv_1|conv_2|sfr)\.(?:conv\.weight|norm\.{NORM})|'
            rf'{LAYER}\.(?:conv_1|sfr)\.(?:_mask|_count|_stage|index)',
            r'\g<0>',
        ),
    ),
    classifier=(
        (rf'features\.(norm|se)_last\.({NORM}|fc\.[02]\.weight)', r'neck.\1.\2'),
        (rf'fc\.{AFFINE}', r'neck.\g<0>'),
        (rf'classifier\.({AFFINE})', r'head.fc.\1'),
    ),
    values=_values,
)
