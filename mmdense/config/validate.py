"""Mistakes in a config, found before a run starts, each as one line with the way out."""

from __future__ import annotations

import copy
import difflib
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import mmengine.registry
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.registry import DATASETS, HOOKS, METRICS, Registry
from mmengine.runner import FlexibleRunner, Runner
from torch import nn

from mmdense.config.channels import readers
from mmdense.config.explain import arguments, check_keys, find
from mmdense.datasets.files import iter_dataset_configs
from mmdense.errors import UserError, suggest_name

__all__ = [
    'SECTIONS',
    'check_channels',
    'check_classes',
    'check_data',
    'check_keys_of',
    'check_neck',
    'check_options',
    'check_sections',
]

# What somebody reads at the top of a config: mmengine's runners, their methods, and the tools.
SECTIONS = sorted(
    {*inspect.signature(Runner).parameters, *inspect.signature(FlexibleRunner).parameters} - {'cfg'}
    | {'activation_checkpointing', 'efficient_conv_bn_eval', 'find_unused_parameters'}
    | {'custom_imports', 'model_wrapper_cfg', 'runner_type', 'sync_bn'}
    | {'data_root', 'tta_model', 'tta_pipeline'}
)
# Common names of variables that are like those of sections.
VARIABLES = ('data_root', 'tta_pipeline')
TYPES = ('type', 'runner_type', 'constructor')  # keys whose values are looked up


def check_sections(cfg: Config, path: str) -> None:
    """Look for a section whose name is misspelt, which nothing would read.

    Raises:
        UserError: A name that isn't, but almost is, that of a section.
    """
    names = [name for name in SECTIONS if name not in VARIABLES]
    for name, value in cfg.items():
        items = value if isinstance(value, list | tuple) else [value]
        if name in SECTIONS or not items or not all(isinstance(item, dict) for item in items):
            continue
        if close := difflib.get_close_matches(name, names, n=1, cutoff=0.88):
            raise UserError(
                f'{path}: nothing reads {name!r}; did you mean {close[0]!r}? (If it is a variable '
                'of your own, give it another name.)'
            )


def check_options(cfg: Config, options: Mapping[str, Any]) -> None:
    """Refuse options that nothing would read, or that would run what no registry knows.

    Args:
        cfg: The config before the options.
        options: Dotted keys -> values, as ``--cfg-options`` gives them.

    Raises:
        UserError: An option whose key nothing reads, as far as that can be told before building,
            or a type that isn't registered.
    """
    for key, value in options.items():
        section, *_ = names = key.split('.')
        if section == 'custom_imports':
            raise UserError(
                f'--cfg-options {key}: modules are imported while a config is read: name them in a '
                'config file of your own'
            )
        if section not in SECTIONS:
            if section in cfg:
                raise UserError(
                    f'--cfg-options {key}: {section!r} is a variable of {cfg.filename}, which has '
                    'used it already: set what it is used for'
                )
            raise UserError(
                f'--cfg-options {key}: nothing reads {section!r}{suggest_name(section, SECTIONS)}'
            )
        _check_key(cfg, key, names)
        for kind in _types(names[-1], value):
            _check_type(cfg, key, kind)


def _check_key(cfg: Mapping[str, Any], key: str, names: Iterable[str]) -> None:
    """Compare a new key with those beside it; what has a type has a constructor that does so."""
    node = cfg
    for name in names:
        if isinstance(node, list | tuple) and name.isdigit() and int(name) < len(node):
            node = node[int(name)]
            continue
        if not isinstance(node, dict | Config):
            return
        if name not in node:
            close = difflib.get_close_matches(name, [*node], n=1, cutoff=0.85)
            if close and 'type' not in node and node is not cfg:
                raise UserError(
                    f'--cfg-options {key}: there is no {name!r} yet{suggest_name(name, node)}'
                )
            return
        node = node[name]


def _types(key: str, value: Any) -> Iterator[str]:
    if key in TYPES and isinstance(value, str):
        yield value
    if isinstance(value, dict):
        for name, child in value.items():
            yield from _types(name, child)
    elif isinstance(value, list | tuple):
        for child in value:
            yield from _types('', child)


def _check_type(cfg: Config, key: str, name: str) -> None:
    """Let through what is registered, and words that cannot be imported or evaluated.

    mmengine imports any other name and calls what it finds, and mmcv evaluates an operator's.
    """
    scope, _, short = name.rpartition('.')
    known = _registered(scope, cfg.get('default_scope'))
    if short in known or (name.isidentifier() and find_spec(name) is None):
        return
    close = difflib.get_close_matches(short, known, n=1)
    hint = f'; did you mean {name.removesuffix(short)}{close[0]}?' if close else ''
    raise UserError(
        f'--cfg-options {key}={name}: nothing is registered under that name{hint} (What is not '
        'registered can be named in a config file alone.)'
    )


def _registered(scope: str, default_scope: str | None) -> set[str]:
    """Return the names of every registry of a scope, or of all scopes."""
    for package in {scope, default_scope} & {*MODULE2PACKAGE, 'mmdense'}:
        import_module(f'{package}.registry')
    names = set()
    for root in vars(mmengine.registry).values():
        if isinstance(root, Registry):
            for registry in (root, *root.children.values()):
                if scope in ('', registry.scope):
                    registry.import_from_location()
                    names |= registry.module_dict.keys()
    return names


# What reads all maps of a detector's neck alike, and the attribute that says how many channels.
BEHIND_NECK = {
    re.compile(r'rpn_head|bbox_head'): 'in_channels',
    re.compile(r'roi_head\.(bbox|mask)_roi_extractor(\.\d+)?'): 'out_channels',
}


def check_data(cfg: Config, loaders: tuple[str, ...]) -> None:
    """Look whether the annotation files and folders of data sets are there.

    Args:
        cfg: As :func:`.load_config` returns it.
        loaders: Whose data sets: of 'train', 'val' and 'test'.

    Raises:
        UserError: One is not.
    """
    for loader in loaders:
        place = f'{loader}_dataloader'
        for where, data in iter_dataset_configs(cfg.get(place), place):
            root = data.get('data_root') or ''
            prefixes = [p for p in (data.get('data_prefix') or {}).values() if isinstance(p, str)]
            for name in [data.get('ann_file'), *prefixes]:
                path = Path(root, name or '')
                if '://' in root or '://' in str(name) or path.exists():
                    continue
                raise UserError(
                    f'{path} not found (wanted by {where}): if the data are elsewhere, add '
                    '--cfg-options data_root=FOLDER'
                )


def check_channels(model: nn.Module, cfg: Mapping[str, Any]) -> None:
    """Compare what the backbone announces with what the config says of those that read it."""
    announced = getattr(getattr(model, 'backbone', None), 'out_channels', None)
    if not isinstance(announced, tuple):  # not a backbone of ours
        return
    for reader in readers(cfg, announced):
        if not reader.fits:
            raise UserError(
                f'{reader.name} expects {reader.node[reader.key]} channels, but the backbone gives '
                f"{reader.channels}: set model.{reader.name}.{reader.key}='auto'"
            )


def check_neck(model: nn.Module) -> None:
    """Compare what a detector's neck puts out with what the heads that read it were built for."""
    given = _channels(getattr(model, 'neck', None), 'out_channels')
    for name, part in model.named_modules():
        key = next((key for places, key in BEHIND_NECK.items() if places.fullmatch(name)), '')
        wanted = _channels(part, key)
        if given and wanted and given != wanted:
            raise UserError(
                f'model.{name}.{key} is {wanted}, but the neck puts out {given}: '
                'make one fit the other (model.neck.out_channels)'
            )


def _channels(part: nn.Module | None, key: str) -> int | list[int] | None:
    channels = getattr(part, key, None)
    return list(channels) if isinstance(channels, list | tuple) else channels


def check_keys_of(cfg: Config, loaders: tuple[str, ...]) -> None:
    """Compare keys with arguments where they would be handed on, and read late or never."""
    evaluators = [cfg.get(f'{loader}_evaluator') for loader in loaders]
    hooks = [*(cfg.get('default_hooks') or {}).values(), cfg.get('custom_hooks')]
    for registry, parts in ((METRICS, evaluators), (HOOKS, hooks)):
        for part in parts:
            for node in part if isinstance(part, list | tuple) else [part]:
                if isinstance(node, dict) and 'type' in node:
                    check_keys(node, registry)


def check_classes(model: nn.Module, cfg: Config, loaders: tuple[str, ...]) -> None:
    """Compare the heads' numbers of classes with the data sets', before these read their files."""
    for loader in loaders:
        place = f'{loader}_dataloader'
        for where, node in iter_dataset_configs(cfg.get(place), place):
            if 'lazy_init' in arguments(find(node, DATASETS)):  # or it would read its files
                data = DATASETS.build({**copy.deepcopy(node), 'lazy_init': True})
                _compare_classes(model, data.metainfo, where)


def _compare_classes(model: nn.Module, meta: Mapping[str, Any], where: str) -> None:
    classes = meta.get('classes')
    if isinstance(classes, str):
        raise UserError(
            f'{where}: classes is a text: for a class of that name write ({classes!r},)'
        )
    if classes is None or hasattr(model, 'language_model'):  # whose classes are words
        return
    things = meta.get('thing_classes', classes)
    for name, head in model.named_modules():
        if {'', 'backbone', 'rpn_head'} & {*name.split('.')}:  # ImageNet's, objects or none
            continue
        said = {
            key: getattr(head, key, None)
            for key in ('num_things_classes', 'num_stuff_classes', 'num_classes')
        }
        if said['num_things_classes'] is None:
            wanted = dict(num_classes=len(things))
        elif 'thing_classes' in meta:
            wanted = dict(num_things_classes=len(things))
            wanted['num_stuff_classes'] = len(meta['stuff_classes'])
        else:  # a panoptic head on other data
            said['num_classes'] = said['num_things_classes'] + said['num_stuff_classes']
            wanted = dict(num_classes=len(classes))
        if said['num_classes'] == 1 == getattr(head, 'out_channels', None):  # depth
            continue
        for key, number in wanted.items():
            known = isinstance(said[key], int) and type(head).__name__ != 'FusedSemanticHead'
            if known and said[key] != number:  # (HTC's has classes of its own)
                raise UserError(
                    f'model.{name}.{key} is {said[key]}, but {where} has {number} such classes: '
                    "make one fit the other (the data set's are in its metainfo.classes)"
                )
