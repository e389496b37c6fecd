"""The released CondenseNetV2 checkpoints: models as they were trained, and converted ones.

Both load by their own names. What differs: a converted model scatters by a matrix of ones and
zeros, where ours has the channel of each row; masks and counters are floats, where ours are
integers.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

__all__ = ['from_condensenetv2']

CLASSIFIER = ('features.norm_last.', 'features.se_last.', 'fc.', 'classifier.')
LAYER = r'features\.denseblock_\d+\.denselayer_\d+'
NORM = r'norm\.(?:weight|bias|running_mean|running_var|num_batches_tracked)'
SHARED = re.compile(
    rf'features\.init_conv\.weight|{LAYER}\.se\.fc\.[02]\.weight|'
    rf'{LAYER}\.(?:conv_1|conv_2|sfr)\.(?:conv\.weight|{NORM})'
)
# Forms of CondenseNetV2, by what only they have in their 1x1 convolutions.
FORMS = dict(
    learned=re.compile(rf'{LAYER}\.(?:conv_1|sfr)\.(_mask|_count|_stage)'),
    condensed=re.compile(rf'{LAYER}\.(?:conv_1|sfr)\.index'),
)
INTEGERS = dict(_mask=torch.uint8, _count=torch.int64, _stage=torch.int64)


def from_condensenetv2(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """Return a released checkpoint's weights with the keys of ``mmdense.CondenseNetV2``.

    Those of a model as it was trained are of ``form='learned'``, those of a converted model of
    ``form='condensed'``. Masks are taken as they are, rounded: the released moving average covers
    them too.

    Args:
        checkpoint: With ``state_dict_ema``, which is preferred, or ``state_dict``; or a bare state
            dict. The classifier is dropped.

    Raises:
        ValueError: Keys that the released models don't have, keys of both forms or of neither, or
            a matrix that is more than a choice of channels.
    """
    mapped: dict[str, Any] = {}
    forms, unknown = set(), []
    for key, value in _state_dict(checkpoint).items():
        key = str(key).removeprefix('module.')
        if key.startswith(CLASSIFIER):
            continue
        if not isinstance(value, Tensor):
            unknown.append(key)
        elif FORMS['learned'].fullmatch(key):
            forms.add('learned')
            value = value.round().to(INTEGERS[key.rpartition('.')[2]])  # 6.9999 is stage 7
        elif FORMS['condensed'].fullmatch(key):
            forms.add('condensed')
            if '.sfr.' in key:
                value = _destinations(key, value)
        elif not SHARED.fullmatch(key):
            unknown.append(key)
        mapped[key] = value
    if unknown:
        raise ValueError(f'{len(unknown)} keys are not of CondenseNetV2, such as {unknown[:3]}')
    if len(forms) != 1:
        raise ValueError(
            'neither a trained nor a converted CondenseNetV2: '
            + ('it has both masks and indices' if forms else 'it has no masks and no indices')
        )
    return mapped


def _state_dict(checkpoint: Mapping[str, Any]) -> Mapping[str, Any]:
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f'a {type(checkpoint).__name__} is no checkpoint')
    for name in ('state_dict_ema', 'state_dict'):
        held = checkpoint.get(name)
        if held and isinstance(held, Mapping):
            return held
    return checkpoint


def _destinations(key: str, matrix: Tensor) -> Tensor:
    """Return the column of the one in each row: [rows, columns] to int64 [rows]."""
    chosen = matrix == 1
    single = matrix.ndim == 2 and bool((chosen.sum(1) == 1).all())
    if not single or matrix.count_nonzero() != len(matrix):
        raise ValueError(f'{key} must be a matrix of zeros with a single 1 in each row')
    return chosen.int().argmax(1)
