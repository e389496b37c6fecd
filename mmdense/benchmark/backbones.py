"""Backbones by name: mmdense's, timm's, and those of config files."""

import ast
import copy
import difflib
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm

from mmdense.config.read import load_config, read_config
from mmdense.errors import UserError, suggest_name
from mmdense.models import CondenseNetV2
from mmdense.models.backbones import FAMILIES, Backbone

TIMM = 'timm:'
PRUNING = 'mmdense.CondenseScheduleHook'
ROW = ('backbone', 'name', 'arguments', 'weights', 'epochs', 'iters', 'options')
SHORT = dict(tiny='t', small='s', base='b', large='l')


@dataclass(frozen=True)
class BackboneSpec:
    """A backbone that can be put into a config."""

    name: str  # of its row
    family: str  # 'RDNet', 'timm' and so on
    config: dict[str, Any]
    hooks: tuple[dict[str, Any], ...] = ()  # that its training needs
    preprocessor: dict[str, Any] = field(default_factory=dict)  # settings that its weights need
    settings: dict[str, Any] = field(default_factory=dict)  # of its row alone, see read_rows()
    checkpoint: str | None = None  # of the complete model, which is tested, not trained


def known_backbones() -> dict[str, tuple[type[Backbone], str]]:
    """Return class and arch of mmdense's backbones, by the names FAMILY-ARCH."""
    return {
        f'{name}-{SHORT.get(arch, arch)}': (family, arch)
        for name, family in FAMILIES.items()
        for arch in family.archs
    }


def read_rows(path: str, *, pretrained: bool, detection: bool = True) -> list[BackboneSpec]:
    """Return the backbones of a YAML or Python file, with settings of their own.

    Its ``rows`` are dicts with a ``backbone`` as :func:`find_backbone` takes it, and optionally
    the ``name`` of the row, ``arguments`` of the backbone, ``weights`` (an address; None for random
    ones), ``epochs`` or ``iters``, and ``options`` as of ``--cfg-options``. UserError for others.
    """
    rows = read_config(path).get('rows')
    if not isinstance(rows, list) or not all(isinstance(r, dict) and 'backbone' in r for r in rows):
        raise UserError(f'{path} has no list of rows, which are dicts with a backbone')
    for key in {key for row in rows for key in row} - {*ROW}:
        raise UserError(f'{path}: nothing reads {key!r} of a row{suggest_name(key, ROW)}')
    specs = []
    for row in rows:
        start = pretrained and 'weights' not in row
        spec = find_backbone(row['backbone'], pretrained=start, detection=detection)
        config = spec.config | (row.get('arguments') or {})
        if row.get('weights'):
            config['init_cfg'] = dict(type='Pretrained', checkpoint=row['weights'])
        settings = {key: row[key] for key in ROW[2:] if key in row}
        specs.append(
            replace(spec, name=row.get('name', spec.name), config=config, settings=settings)
        )
    return specs


def find_backbone(name: str, *, pretrained: bool, detection: bool = True) -> BackboneSpec:
    """Return the backbone of a name, with the recipes' settings except stochastic depth.

    Args:
        name: One of :func:`known_backbones`, a network of timm as ``timm:NAME`` or with arguments
            ``timm:NAME?drop_path_rate=0.1&...``, or a config file; UserError if it is unknown. With
            ``@CHECKPOINT``, the file or URL of a complete model, it needs no training.
        pretrained: Start from the recipes' ImageNet weights, else UserError. A CondenseNetV2
            without them learns its connections.
        detection: For a detector, else for a segmentor.
    """
    name, _, checkpoint = name.partition('@')
    if name.endswith('.py'):
        spec = _from_file(name, pretrained)
    elif name.startswith(TIMM):
        spec = _from_timm(name, pretrained)
    else:
        spec = _from_name(name, pretrained, detection)
    if checkpoint:
        return replace(spec, name=f'{spec.name}@{checkpoint}', checkpoint=checkpoint)
    if pretrained and not spec.config.get('init_cfg'):
        raise UserError(f'{name} has no weights to start from: add --from-scratch')
    return spec


def _from_name(name: str, pretrained: bool, detection: bool) -> BackboneSpec:
    known = known_backbones()
    if name not in known:
        raise UserError(
            f'unknown backbone {name!r}{suggest_name(name, known)}; also possible: timm:NETWORK, '
            'or a config file to take the backbone from'
        )
    family, arch = known[name]
    kind = family.__name__
    config = dict(type=f'mmdense.{kind}', arch=arch, **family.recipe)
    if detection:
        config |= family.detector_recipe
    if not pretrained:
        hooks = (dict(type=PRUNING),) if family is CondenseNetV2 else ()
        return BackboneSpec(name, kind, config, hooks)
    config |= family.pretrained_recipe
    if arch in family.weights:
        config['init_cfg'] = dict(type='Pretrained', checkpoint=family.weights[arch])
    return BackboneSpec(name, kind, config)


def _from_timm(name: str, pretrained: bool) -> BackboneSpec:
    model, _, query = name.removeprefix(TIMM).partition('?')
    if not timm.is_model(model):
        close = difflib.get_close_matches(model, timm.list_models(), n=3)
        hint = f'; close: {", ".join(close)}' if close else ''
        raise UserError(f'timm has no network {model!r}{hint}')
    config, preprocessor = dict(type='mmdense.TimmBackbone', model_name=model), {}
    if query:
        pairs = (pair.partition('=') for pair in query.split('&'))
        config['model_kwargs'] = {key: _value(text) for key, _, text in pairs}
    if pretrained:
        cfg = timm.models.get_pretrained_cfg(model)
        mean, std = ([255 * value for value in values] for values in (cfg.mean, cfg.std))
        preprocessor = dict(mean=mean, std=std, bgr_to_rgb=True)
        config['init_cfg'] = dict(type='Pretrained', checkpoint=f'timm://{model}')
    return BackboneSpec(name, 'timm', config, preprocessor=preprocessor)


def _value(text: str) -> Any:
    """Return the Python value of a text, such as False or 0.1, or else the text."""
    with suppress(ValueError, SyntaxError):
        return ast.literal_eval(text)
    return text


def _from_file(path: str, pretrained: bool) -> BackboneSpec:
    cfg = load_config(path)
    config = copy.deepcopy(dict(cfg.model.get('backbone') or {}))
    if not config.get('type'):
        raise UserError(f'{path} has no backbone')
    if not pretrained:
        config.pop('init_cfg', None)
    hooks = tuple(hook for hook in cfg.get('custom_hooks') or [] if hook['type'] == PRUNING)
    number = 1 if cfg.get('default_scope') == 'mmpretrain' else 2  # {algorithm}_{backbone}_...
    name = Path(path).stem.split('_')[:number][-1]
    return BackboneSpec(name, str(config['type']).removeprefix('mmdense.'), config, hooks)
