"""Validating a config: each mistake is one line that says how to fix it, a UserError.

``loaders`` are those that will run, of 'train', 'val' and 'test'; ``model`` is a detector or
segmentor.
"""

from __future__ import annotations

import copy
import difflib
import inspect
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import DATASETS
from mmengine.runner import FlexibleRunner, Runner
from torch import nn

from mmdense.config.channels import readers
from mmdense.config.parts import arguments, find
from mmdense.datasets.files import iter_dataset_configs
from mmdense.errors import UserError, suggest_name

__all__ = [
    'check_channels',
    'check_classes',
    'check_data_files',
    'check_neck',
    'check_options',
    'check_sections',
]

# All that mmengine's runners, their methods and mmdense's tools read at the top of a config.
SECTIONS = sorted(
    {*inspect.signature(Runner).parameters, *inspect.signature(FlexibleRunner).parameters} - {'cfg'}
    | {'activation_checkpointing', 'efficient_conv_bn_eval', 'find_unused_parameters'}
    | {'custom_imports', 'model_wrapper_cfg', 'runner_type', 'sync_bn'}
    | {'data_root', 'tta_model', 'tta_pipeline'}
)
# Parts that read all feature maps of a detector's neck -> the attribute with their channels.
NECK_READERS = {
    re.compile(r'rpn_head|bbox_head'): 'in_channels',
    re.compile(r'roi_head\.(bbox|mask)_roi_extractor(\.\d+)?'): 'out_channels',
}


# Before anything is built


def check_sections(cfg: Config, path: str) -> None:
    """Refuse a misspelt section, which nothing would read."""
    # Without those that are close to common variables: data_roots, tta_pipelines.
    names = [name for name in SECTIONS if name not in ('data_root', 'tta_pipeline')]
    for name, value in cfg.items():
        items = value if isinstance(value, list | tuple) else [value]
        if name in SECTIONS or not items or not all(isinstance(item, dict) for item in items):
            continue
        if close := difflib.get_close_matches(name, names, n=1, cutoff=0.88):
            raise UserError(
                f'{path}: nothing reads {name!r}; did you mean {close[0]!r}? (If it is a variable '
                'of yours, give it another name.)'
            )


def check_options(cfg: Config, options: Mapping[str, Any]) -> None:
    """Refuse options of ``--cfg-options`` that would have no effect on a config.

    Misspelt arguments are left to :func:`.check_parts`, which sees them when all are merged.
    """
    for key in options:
        section, *_ = names = key.split('.')
        if section == 'custom_imports':
            raise UserError(
                f'--cfg-options {key}: modules are imported while the config is read, so they must '
                'be named in a config file'
            )
        if section not in SECTIONS:
            if section in cfg:
                raise UserError(
                    f'--cfg-options {key}: {section!r} is a variable of {cfg.filename}, which has '
                    'used it already: override the settings that it is used for'
                )
            raise UserError(
                f'--cfg-options {key}: nothing reads {section!r}{suggest_name(section, SECTIONS)}'
            )
        _check_key(cfg, key, names)


def _check_key(cfg: Mapping[str, Any], key: str, names: Sequence[str]) -> None:
    """Compare a new key with its siblings, unless they are arguments."""
    node = cfg
    for name in names:
        if isinstance(node, list | tuple) and name.isdigit() and int(name) < len(node):
            node = node[int(name)]
        elif isinstance(node, dict | Config) and name in node:
            node = node[name]
        else:
            siblings = node if isinstance(node, dict) and 'type' not in node else ()
            if difflib.get_close_matches(name, siblings, n=1, cutoff=0.85):
                raise UserError(
                    f'--cfg-options {key}: there is no {name!r} yet{suggest_name(name, siblings)}'
                )
            return


def check_data_files(cfg: Config, loaders: Sequence[str]) -> None:
    """Check that the annotation files and folders of the data sets exist."""
    for loader in loaders:
        place = f'{loader}_dataloader'
        for where, dataset in iter_dataset_configs(cfg.get(place), place):
            root = dataset.get('data_root') or ''
            prefixes = (dataset.get('data_prefix') or {}).values()
            for name in [dataset.get('ann_file'), *(p for p in prefixes if isinstance(p, str))]:
                path = Path(root, name or '')
                if '://' in root or '://' in str(name) or path.exists():
                    continue
                raise UserError(
                    f'{path} not found (for {where}): if the data are elsewhere, add '
                    '--cfg-options data_root=FOLDER'
                )


# After the model is built


def check_channels(model: nn.Module, cfg: Mapping[str, Any]) -> None:
    """Compare the channels of the backbone's feature maps with those in the model's config."""
    channels = getattr(getattr(model, 'backbone', None), 'out_channels', None)
    if not isinstance(channels, tuple):  # not one of mmdense's backbones
        return
    for reader in readers(cfg, channels):
        if not reader.fits:
            raise UserError(
                f'{reader.name} expects {reader.node[reader.key]} channels, but the backbone gives '
                f"{reader.channels}: set model.{reader.name}.{reader.key}='auto'"
            )


def check_neck(model: nn.Module) -> None:
    """Compare the output channels of a detector's neck with those that its heads expect."""
    given = _channels(getattr(model, 'neck', None), 'out_channels')
    for name, part in model.named_modules():
        key = next((key for places, key in NECK_READERS.items() if places.fullmatch(name)), '')
        expected = _channels(part, key)
        if given and expected and given != expected:
            raise UserError(
                f'model.{name}.{key} is {expected}, but the neck gives {given}: make them equal '
                '(model.neck.out_channels)'
            )


def _channels(part: nn.Module | None, key: str) -> int | list[int] | None:
    channels = getattr(part, key, None)
    return list(channels) if isinstance(channels, list | tuple) else channels


def check_classes(model: nn.Module, cfg: Config, loaders: Sequence[str]) -> None:
    """Compare the heads' numbers of classes with the data sets', before any file is read."""
    for loader in loaders:
        place = f'{loader}_dataloader'
        for where, node in iter_dataset_configs(cfg.get(place), place):
            scope = node.get('_scope_', cfg.get('default_scope'))
            kind = find(node['type'], [DATASETS], scope)
            if kind and 'lazy_init' in arguments(kind):  # any other would read its files
                with DATASETS.switch_scope_and_registry(scope) as registry:
                    dataset = registry.build({**copy.deepcopy(node), 'lazy_init': True})
                compare_classes(model, dataset.metainfo, where)


def compare_classes(model: nn.Module, metainfo: Mapping[str, Any], where: str) -> None:
    """Compare the heads' numbers of classes with those of one data set, unless it is panoptic."""
    classes = metainfo.get('classes')
    if isinstance(classes, str):
        raise UserError(f'{where}: classes must be a tuple: for one class write ({classes!r},)')
    if classes is None or 'thing_classes' in metainfo or hasattr(model, 'language_model'):
        return
    for name, head in model.named_modules():
        number = getattr(head, 'num_classes', None)
        if {'', 'backbone', 'rpn_head'} & {*name.split('.')}:  # ImageNet's, objectness or none
            continue
        if number == 1 == getattr(head, 'out_channels', None):  # depth
            continue
        stuff = type(head).__name__ == 'FusedSemanticHead'  # HTC's, on COCO stuff
        if isinstance(number, int) and number != len(classes) and not stuff:
            raise UserError(
                f'model.{name}.num_classes is {number}, but {where} has {len(classes)} classes: '
                'make them equal (the classes are in its metainfo.classes)'
            )
