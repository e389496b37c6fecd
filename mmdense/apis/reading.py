"""Reading a config file, and saying in one line why it can't be read.

A .py config is a program and runs as one; a .json or .yaml config is data, and nothing in it runs.
"""

from __future__ import annotations

import difflib
import inspect
import json
import traceback
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import FrameType
from typing import Any

import mmengine.registry
import yaml
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.fileio.handlers import YamlHandler, register_handler
from mmengine.registry import Registry
from mmengine.runner import FlexibleRunner, Runner

from mmdense.engine.files import reason_of
from mmdense.errors import UserError, suggest

__all__ = ['SECTIONS', 'check_options', 'check_sections', 'did_you_mean', 'read_config']

# What somebody reads at the top of a config: mmengine's runners, their methods, and the tools.
SECTIONS = sorted(
    {*inspect.signature(Runner).parameters, *inspect.signature(FlexibleRunner).parameters} - {'cfg'}
    | {'activation_checkpointing', 'efficient_conv_bn_eval', 'find_unused_parameters'}
    | {'custom_imports', 'model_wrapper_cfg', 'runner_type', 'sync_bn'}
    | {'data_root', 'tta_model', 'tta_pipeline'}
)
# What of mmengine reads a config by its own name, not that of a copy.
NAMING = ('_file2dict', '_is_lazy_import', '_parse_lazy_import')
# Common names of variables that are like those of sections.
VARIABLES = ('data_root', 'tta_pipeline')
TYPES = ('type', 'runner_type', 'constructor')  # keys whose values are looked up
LARGEST = 1_000_000  # values in a YAML file: aliases can stand for more than memory holds


@register_handler(['yaml', 'yml'])
class DataHandler(YamlHandler):
    """In place of mmengine's, whose YAML may name Python objects to make and functions to call."""

    def load_from_fileobj(self, file: Any, **kwargs: Any) -> Any:
        """Return the data of a YAML file.

        Raises:
            yaml.YAMLError: It is no YAML, holds more than data, or more of it than fits.
        """
        held = yaml.load(file, Loader=getattr(yaml, 'CSafeLoader', yaml.SafeLoader))
        if _size(held, {}) > LARGEST:
            raise yaml.YAMLError('its aliases stand for too many values, or for themselves')
        return held


def _size(node: Any, sizes: dict[int, float]) -> float:
    """Return how many values there are with every alias written out."""
    if not isinstance(node, dict | list):
        return 1
    if id(node) not in sizes:
        sizes[id(node)] = float('inf')  # should it hold itself
        children = node.values() if isinstance(node, dict) else node
        sizes[id(node)] = 1 + sum(_size(child, sizes) for child in children)
    return sizes[id(node)]


def did_you_mean(path: str | Path, pattern: str) -> str:
    """Return the end of an error message: a file beside a missing one that is named like it."""
    path = Path(path)
    close = difflib.get_close_matches(
        str(path), map(str, path.parent.glob(pattern)), n=1, cutoff=0.4
    )
    return f'; did you mean {close[0]}?' if close else ''


def read_config(path: str) -> Config:
    """Return a config as its file and its bases have it.

    Raises:
        UserError: No such file or base, or one that isn't a config; with the line, if it is Python.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f'no config {path}{did_you_mean(path, "*.py")}')
    try:
        return Config.fromfile(file)
    except Exception as error:
        told = _reason(error, path)
        if told is None:
            raise
        raise UserError(told) from error


def _reason(error: Exception, path: str) -> str | None:
    """Return why a config can't be read, or None where the fault isn't the config's."""
    frames = list(traceback.walk_tb(error.__traceback__))
    readers = [frame for frame, _ in frames if _module(frame).startswith('mmengine.config')]
    last, line = frames[-1]
    files = [f.f_locals['filename'] for f in readers if f.f_code.co_name in NAMING]
    file = files[-1] if files else path
    if isinstance(error, FileNotFoundError):
        return f'{path} inherits a config that does not exist: {error}'
    if isinstance(error, RecursionError):
        return f'{path} inherits itself, or is nested too deeply'
    if isinstance(error, SyntaxError):
        return f'{file}, line {error.lineno}: {error.msg}'
    if isinstance(error, UnicodeDecodeError | json.JSONDecodeError | yaml.YAMLError):
        return f'{file} is no config ({reason_of(error)})'
    if isinstance(error, ImportError) and readers and 'custom' in str(error):
        cause = error.__cause__ or error
        return f'{path}: custom_imports names what cannot be imported ({reason_of(cause)})'
    programs = [f.f_code.co_filename for f, _ in frames if f.f_code.co_name == '<module>']
    if last.f_code.co_filename in programs and readers:
        return f'{last.f_code.co_filename}, line {line}: {reason_of(error)}'
    if readers and readers[-1] is last:  # mmengine's own rules for configs
        return f'{file}: {reason_of(error)}'
    return None


def _module(frame: FrameType) -> str:
    return frame.f_globals.get('__name__', '')


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
                f'--cfg-options {key}: nothing reads {section!r}{suggest(section, SECTIONS)}'
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
                    f'--cfg-options {key}: there is no {name!r} yet{suggest(name, node)}'
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
