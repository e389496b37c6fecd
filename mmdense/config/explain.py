"""Mistakes in a config, told by the errors that building from it ends with.

mmengine calls what is registered under a ``type`` with the other keys of the config. A name that
isn't registered and a key that is no argument end there in errors of Python; which errors those are
is read from the frames that they were raised in, so a fault inside a model keeps its traceback.
"""

from __future__ import annotations

import difflib
import inspect
import linecache
import re
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import Any

from mmengine.registry import Registry, build_from_cfg

from mmdense.errors import UserError, suggest_name

__all__ = ['arguments', 'check_keys', 'explain', 'explained', 'find']

# Where names are looked up: function -> its variables for the name and for what it found.
LOOKUPS = dict(
    build_from_cfg=('obj_type', 'obj_cls'),
    build_runner_from_cfg=('obj_type', 'runner_cls'),
    build_scheduler_from_cfg=('scheduler_type', 'scheduler_cls'),
    build_conv_layer=('layer_type', 'conv_layer'),
    build_norm_layer=('layer_type', 'norm_layer'),
    build_padding_layer=('padding_type', 'padding_layer'),
    build_plugin_layer=('layer_type', 'plugin_layer'),
    build_upsample_layer=('layer_type', 'upsample'),
)
# Their constructors refuse arguments by whatever comes to hand.
LIBRARIES = ('mmcv', 'mmdet', 'mmengine', 'mmseg', 'torch')
LISTED = 30  # names that a message lists: of a whole library there are hundreds


@contextmanager
def explained() -> Iterator[None]:
    """Turn the errors that :func:`explain` knows into :class:`.UserError`; let others through."""
    try:
        yield
    except Exception as error:
        told = explain(error)
        if told is None:
            raise
        raise told from error


def explain(error: Exception) -> UserError | None:
    """Return a mistake of the config as one line, or None where an error is none.

    Known are types that aren't registered, parts without a type, keys that are no arguments,
    arguments that are missing, and those that a constructor of ours, or one of the MM packages and
    torch, refuses itself.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    if not frames or isinstance(error, UserError):
        return None
    for look in (_not_registered, _without_type, _wrong_argument, _refused):
        if told := look(error, frames):
            return UserError(told)
    return None


def _module(frame: FrameType) -> str:
    return frame.f_globals.get('__name__', '')


def _of_library(frame: FrameType) -> bool:
    return _module(frame).partition('.')[0] in LIBRARIES


def _is_build(frame: FrameType) -> bool:
    return frame.f_code is build_from_cfg.__code__


def _not_registered(error: Exception, frames: list[FrameType]) -> str | None:
    last = frames[-1]
    said, found = last.f_locals, last.f_code.co_name
    if last.f_code is Registry.get.__code__ and isinstance(error, RuntimeError):
        registry, name = said['self'], said['key']
    elif found in LOOKUPS and _of_library(last) and isinstance(error, KeyError):
        names = LOOKUPS[found]
        registry, name = said.get('registry'), said.get(names[0])
        if not isinstance(name, str) or said.get(names[1], error) is not None:
            return None
    else:
        return None
    return f'nothing is registered as {name!r}{_closest(name, registry)}'


def _closest(name: str, registry: Registry) -> str:
    """Return what to say of the registered names: the closest one, and all if they are few."""
    scopes = registry._get_root_registry().children
    scope, dot, short = name.rpartition('.')
    named = {f'{child}.{own}' for child in scopes for own in scopes[child].module_dict}
    bare = set()
    while registry is not None:
        bare |= registry.module_dict.keys()
        registry = registry.parent
    if elsewhere := sorted(own for own in named if own.endswith(f'.{short}')):
        return f'; did you mean {elsewhere[0]!r}?'
    said = suggest_name(name, sorted(named if dot else bare))
    siblings = sorted(own for own in named if own.startswith(f'{scope}.')) if dot else sorted(bare)
    said = said.split(' (known: ')[0]
    return f'{said} (known: {siblings})' if 0 < len(siblings) <= LISTED else said


def _without_type(error: Exception, frames: list[FrameType]) -> str | None:
    last = frames[-1]
    if not _is_build(last) or not isinstance(error, KeyError | TypeError):
        return None
    part = last.f_locals['cfg']
    if not isinstance(part, dict):
        return f'{_shown(part)} stands where a dict with a type should'
    if 'type' in part or 'type' in (last.f_locals['default_args'] or {}):
        return None
    return f'a part of the config has no type: {_shown(dict(part))} (is the key that holds it new?)'


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f'{text[:97]}...'


def _wrong_argument(error: Exception, frames: list[FrameType]) -> str | None:
    if not isinstance(error, TypeError):
        return None
    last = frames[-1]
    unexpected = re.search(r"(\w+)\S* got an unexpected keyword argument '(\w+)'", str(error))
    if unexpected:
        name, key = unexpected.groups()
        while frames and not _is_build(frames[-1]) and key in _passed_on(frames[-1]):
            frames = frames[:-1]  # it came from further out
        if frames and _is_build(frames[-1]) and key in frames[-1].f_locals.get('args', ()):
            name, built = _built(frames[-1])
        elif _module(last).startswith('mmengine.') and _holds(last, key):
            built = last.f_globals.get(name)  # a loop or a loader
        else:
            return None
        known = arguments(built) if callable(built) else []
        return f'{name} has no argument {key!r}{suggest_name(key, known)}'
    missing = re.search(r'missing \d+ required [\w-]+ arguments?: (.+)', str(error))
    if missing and _is_build(last) and 'obj_cls' in last.f_locals:
        return f'{_built(last)[0]} lacks {missing[1]}'
    return None


def _passed_on(frame: FrameType) -> dict[str, Any]:
    """Return the ``**kwargs`` of a call."""
    code = frame.f_code
    if not code.co_flags & inspect.CO_VARKEYWORDS:
        return {}
    several = bool(code.co_flags & inspect.CO_VARARGS)
    name = code.co_varnames[code.co_argcount + code.co_kwonlyargcount + several]
    return frame.f_locals.get(name, {})


def _holds(frame: FrameType, key: str) -> bool:
    return any(key in value for value in frame.f_locals.values() if isinstance(value, dict))


def _built(frame: FrameType) -> tuple[str, Callable]:
    built = frame.f_locals['obj_cls']
    name = frame.f_locals['obj_type']
    return name if isinstance(name, str) else getattr(built, '__name__', str(built)), built


def arguments(built: Callable) -> list[str]:
    """Return the names that a class or function takes, those it hands on to its bases too."""
    whole = isinstance(built, type)
    functions = [k.__init__ for k in built.__mro__ if '__init__' in vars(k)] if whole else [built]
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    names: dict[str, None] = {}
    for function in functions:
        parameters = [*inspect.signature(function).parameters.values()][whole:]  # without self
        names |= {p.name: None for p in parameters if p.kind in named}
        if all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters):
            break
    return list(names)


def find(node: Mapping[str, Any], registry: Registry) -> Callable:
    """Return what a part of a config would be built from, looked for in the scope that it says.

    Raises:
        UserError: Nothing.
    """
    kind = node['type']
    with registry.switch_scope_and_registry(node.get('_scope_')) as scoped:
        found = scoped.get(kind) if isinstance(kind, str) else kind
    if found is None:
        raise UserError(f'nothing is registered as {kind!r}{_closest(kind, scoped)}')
    return found


def check_keys(node: Mapping[str, Any], registry: Registry) -> None:
    """Look for misspelt keys where ``**kwargs`` takes any, and nobody would say so.

    Raises:
        UserError: A key that isn't, but almost is, the name of an argument.
    """
    known = arguments(find(node, registry))
    for key in node:
        if key not in known and difflib.get_close_matches(key, known, n=1, cutoff=0.85):
            raise UserError(f'{node["type"]} has no argument {key!r}{suggest_name(key, known)}')


def _refused(error: Exception, frames: list[FrameType]) -> str | None:
    builds = [i for i, frame in enumerate(frames) if _is_build(frame)]
    if not builds:
        return None
    last = frames[-1]
    if _module(last).startswith('mmdense.'):  # whose ValueErrors are for users, by its rules
        known = type(error) is ValueError
    else:  # a check in the constructor itself
        direct = builds[-1] == len(frames) - 2 and last.f_code.co_name == '__init__'
        known = direct and isinstance(error, ValueError | AssertionError) and _of_library(last)
    if not known:
        return None
    said = ' '.join(str(error).split())
    if not said:  # a bare assertion: what it asserts
        (*_, (_, line)) = traceback.walk_tb(error.__traceback__)
        said = linecache.getline(last.f_code.co_filename, line).strip()
    return f'cannot build {_built(frames[builds[-1]])[0]}: {said}'
