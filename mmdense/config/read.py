"""Reading a config file, and saying in one line why it can't be read.

A .py config is a program and runs as one; a .json or .yaml config is data, and nothing in it runs.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any

import yaml
from mmengine.config import Config

from mmdense.config.channels import fill_channels
from mmdense.config.validate import check_options, check_sections
from mmdense.errors import UserError, one_line, suggest_file

__all__ = ['load_config', 'read_config']

# What of mmengine reads a config by its own name, not that of a copy.
NAMING = ('_file2dict', '_is_lazy_import', '_parse_lazy_import')


def read_config(path: str) -> Config:
    """Return a config as its file and its bases have it.

    Raises:
        UserError: No such file or base, or one that isn't a config; with the line, if it is Python.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f'no config {path}{suggest_file(path, "*.py")}')
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
        return f'{file} is no config ({one_line(error)})'
    if isinstance(error, ImportError) and readers and 'custom' in str(error):
        cause = error.__cause__ or error
        return f'{path}: custom_imports names what cannot be imported ({one_line(cause)})'
    programs = [f.f_code.co_filename for f, _ in frames if f.f_code.co_name == '<module>']
    if last.f_code.co_filename in programs and readers:
        return f'{last.f_code.co_filename}, line {line}: {one_line(error)}'
    if readers and readers[-1] is last:  # mmengine's own rules for configs
        return f'{file}: {one_line(error)}'
    return None


def _module(frame: FrameType) -> str:
    return frame.f_globals.get('__name__', '')


def load_config(
    path: str,
    *,
    options: Mapping[str, Any] | None = None,
    work_dir: str | None = None,
    launcher: str = 'none',
) -> Config:
    """Read a config file and apply the options that every tool has.

    Args:
        path: The config file.
        options: Overrides, as ``--cfg-options`` gives them. ``data_root`` replaces the config's own
            ``data_root`` wherever it stands: in data sets, annotation files and metrics.
        work_dir: Where logs and checkpoints go; otherwise the config's own or ``work_dirs/<name>``.
        launcher: How processes were started: 'none', 'pytorch', 'slurm' or 'mpi'.

    Raises:
        UserError: As :func:`.read_config`, :func:`.check_sections` and :func:`.check_options`, a
            config without a model, or ``in_channels='auto'`` where nothing is known to fill in.
    """
    cfg = read_config(path)
    check_sections(cfg, path)
    options = dict(options or {})
    if 'data_root' in options:
        old, new = (str(c.get('data_root') or '').rstrip('/') for c in (cfg, options))
        if not old:
            raise UserError(f'{path} has no data_root: set each data set by its own option')
        if not new:
            raise UserError('data_root is empty: name the folder that holds the data')
        for key, child in list(cfg.items()):
            cfg[key] = _move_data(child, old, new)
        del options['data_root']
    check_options(cfg, options)
    try:
        cfg.merge_from_dict(options)
    except (KeyError, TypeError) as error:  # it merges, and nothing else
        raise UserError(f'--cfg-options: {error.args[0]}') from error
    if 'model' not in cfg:
        raise UserError(f'{path} names no model: choose a config outside _base_')
    if not isinstance(cfg.model, dict):
        raise UserError(f'model must be a dict, but is {cfg.model!r}')
    fill_channels(cfg)
    cfg.launcher = launcher
    cfg.work_dir = work_dir or cfg.get('work_dir') or str(Path('work_dirs') / Path(path).stem)
    return cfg


def _move_data(node: Any, old: str, new: str) -> Any:
    """Return ``node`` with the folder ``old`` replaced by ``new`` at the head of every path."""
    if isinstance(node, str) and (node == old or node.startswith(f'{old}/')):
        return new + node[len(old) :]
    if isinstance(node, list | tuple):
        return type(node)(_move_data(child, old, new) for child in node)
    if isinstance(node, dict):
        for key, child in node.items():
            node[key] = _move_data(child, old, new)
    return node
