"""Validating a config: loops, samplers, hooks and schedules that have to agree."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mmengine.config import Config
from mmengine.registry import DATA_SAMPLERS, LOOPS
from mmengine.runner import IterBasedTrainLoop

from mmdense.config.parts import find
from mmdense.errors import UserError

ENDLESS = {'InfiniteSampler', 'MultiSourceSampler'}  # mmengine's and mmdet's
# Arguments of hooks and schedules that count epochs.
EPOCHS = ('by_epoch', 'begin_epoch', 'num_last_epochs', 'switch_epoch')


def is_endless(sampler: Any) -> bool:
    """Return whether a class of samplers starts over at the end."""
    return any(base.__name__ in ENDLESS for base in getattr(sampler, '__mro__', ()))


def check_loops(cfg: Config, loaders: Sequence[str]) -> None:
    """Refuse loops that would not end, not validate, or never get to what counts epochs."""
    scope, train = cfg.get('default_scope'), cfg.get('train_cfg') or {}
    loop = find(train.get('type'), [LOOPS], scope)
    by_iter = isinstance(loop, type) and issubclass(loop, IterBasedTrainLoop)
    for loader in loaders:
        place = f'{loader}_dataloader'
        node = cfg.get(place) or {}
        sampler = find((node.get('sampler') or {}).get('type'), [DATA_SAMPLERS], scope)
        if is_endless(sampler) and not (by_iter and loader == 'train'):
            raise UserError(
                f'{place}.sampler: {sampler.__name__} never ends, so an epoch would not either: '
                f'add --cfg-options {place}.sampler.type=DefaultSampler'
            )
        if loader != 'train' and node.get('drop_last') and node.get('batch_size', 1) > 1:
            raise UserError(
                f'{place}.drop_last would leave images out of the metrics: add --cfg-options '
                f'{place}.drop_last=False'
            )
    if 'train' not in loaders:
        return
    for key in ('max_epochs', 'max_iters', 'val_interval'):
        if train.get(key, 1) < 1:
            way = '; without validation: val_dataloader=None val_cfg=None val_evaluator=None'
            way = way if key == 'val_interval' else ''
            raise UserError(f'train_cfg.{key} is {train[key]}, must be at least 1{way}')
    for section in ('default_hooks', 'custom_hooks', 'param_scheduler') if by_iter else ():
        parts = cfg.get(section) or {}
        items = parts.items() if isinstance(parts, dict) else enumerate(parts)
        for key, part in [('', parts)] if 'type' in parts else items:
            if isinstance(part, dict) and 'type' in part:
                _check_unit(f'{section}.{key}'.rstrip('.'), part)


def _check_unit(place: str, part: dict[str, Any]) -> None:
    """Refuse a hook or schedule that counts epochs, of which training by iterations has one."""
    default = 'CheckpointHook' in str(part['type']) or place.startswith('param_scheduler')
    names = [name for name in EPOCHS if part.get(name, default and name == 'by_epoch')]
    if names and not part.get('convert_to_iter_based') and part.get('interval') != -1:
        remedy = 'take EpochBasedTrainLoop'
        if names[0] == 'by_epoch':
            remedy = f'add --cfg-options {place}.by_epoch=False, and count in iterations'
        raise UserError(
            f'{place} counts epochs ({names[0]}), but training by iterations has only one: {remedy}'
        )
