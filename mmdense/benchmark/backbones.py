"""Backbones by the names that sweeps give them: ours, timm's, and those of config files."""

from __future__ import annotations

import copy
import difflib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import timm

from mmdense.config.read import load_config
from mmdense.errors import UserError, suggest_name
from mmdense.models import CondenseNetV2
from mmdense.models.backbones import FAMILIES, Backbone

__all__ = ['PRUNING', 'Named', 'known_backbones', 'named_backbone']

TIMM = 'timm:'
PRUNING = 'mmdense.CondenseScheduleHook'
PRUNED = (dict(type=PRUNING),)  # hooks of a CondenseNetV2 that learns its connections
SHORT = dict(tiny='t', small='s', base='b', large='l')


@dataclass(frozen=True)
class Named:
    """A backbone that can be put into a config.

    Attributes:
        name: That of its row.
        family: 'RDNet', 'timm' and so on.
        config: The backbone's config.
        hooks: Hooks that it is trained with.
        pixels: What the data preprocessor has to say, if that isn't the config's.
    """

    name: str
    family: str
    config: dict[str, Any]
    hooks: tuple[dict[str, Any], ...] = ()
    pixels: dict[str, Any] = field(default_factory=dict)


def known_backbones() -> dict[str, tuple[type[Backbone], str]]:
    """Return class and arch of mmdense's backbones, by their names FAMILY-ARCH."""
    return {
        f'{name}-{SHORT.get(arch, arch)}': (family, arch)
        for name, family in FAMILIES.items()
        for arch in family.archs
    }


def named_backbone(name: str, *, pretrained: bool, detects: bool = True) -> Named:
    """Return the backbone of a name, with the recipes' settings but for stochastic depth.

    Args:
        name: One of :func:`known_backbones`; ``timm:`` and a network of timm's; or a config file
            whose backbone is meant.
        pretrained: Let it start from the ImageNet weights that the recipes take. Without them a
            CondenseNetV2 learns its connections.
        detects: Whether it is for a detector.

    Raises:
        UserError: An unknown name, a backbone without published weights, or a config that can't be
            read.
    """
    if name.endswith('.py'):
        return _from_file(name, pretrained)
    if name.startswith(TIMM):
        model = name.removeprefix(TIMM)
        if not timm.is_model(model):
            close = difflib.get_close_matches(model, timm.list_models(), n=3)
            raise UserError(
                f'timm has no network {model!r}' + (f'; close: {", ".join(close)}' if close else '')
            )
        config = dict(type='mmdense.TimmBackbone', model_name=model)
        config |= _weights(f'timm://{model}', pretrained)
        return Named(name, 'timm', config, pixels=_pixels(model) if pretrained else {})
    known = known_backbones()
    if name not in known:
        raise UserError(
            f'unknown backbone {name!r}{suggest_name(name, known)}; besides: timm:NETWORK, or a '
            'config file whose backbone is meant'
        )
    family, arch = known[name]
    kind = family.__name__
    config = dict(type=f'mmdense.{kind}', arch=arch, **family.recipe)
    if detects:
        config |= family.detector_recipe
    if not pretrained:
        return Named(name, kind, config, PRUNED if family is CondenseNetV2 else ())
    if arch not in family.weights:
        raise UserError(f'{name} has no published weights: leave it out, or add --from-scratch')
    config |= family.pretrained_recipe | _weights(family.weights[arch], pretrained)
    return Named(name, kind, config)


def _pixels(model: str) -> dict[str, Any]:
    """Return what timm's weights of a network were trained on, in pixels from 0 to 255."""
    said = timm.models.get_pretrained_cfg(model)
    mean, std = ([255 * value for value in values] for values in (said.mean, said.std))
    return dict(mean=mean, std=std, bgr_to_rgb=True)


def _weights(address: str, pretrained: bool) -> dict[str, Any]:
    return dict(init_cfg=dict(type='Pretrained', checkpoint=address)) if pretrained else {}


def _from_file(path: str, pretrained: bool) -> Named:
    cfg = load_config(path)
    config = copy.deepcopy(dict(cfg.model.get('backbone') or {}))
    kind = config.get('type')
    if not kind:
        raise UserError(f'{path} has no backbone')
    if not pretrained:
        config.pop('init_cfg', None)
    elif not config.get('init_cfg'):
        raise UserError(f'the backbone of {path} has no weights to begin with: add --from-scratch')
    hooks = [h for h in cfg.get('custom_hooks') or [] if h['type'] == PRUNING]
    # {algorithm}_{backbone}_...
    fields = Path(path).stem.split('_')
    family = str(kind).removeprefix('mmdense.')
    return Named(fields[1] if len(fields) > 1 else fields[0], family, config, tuple(hooks))
