"""Reading a config file, with an error in one line if it cannot be read.

Python and YAML configs are executed: only run configs you trust.
"""

from __future__ import annotations

import ast
import json
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmdense.config.channels import fill_channels
from mmdense.config.validate import check_options, check_sections
from mmdense.errors import UserError, one_line, suggest_file

__all__ = ['load_config', 'read_config']

PARSERS = {'.py': ast.parse, '.json': json.loads}


def read_config(path: str) -> Config:
    """Return a config as its file and its bases define it.

    Raises:
        UserError: The file or a base does not exist, or is not a config; with the line, if it is
            Python.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f'no config {path}{suggest_file(path, "*.py")}')
    try:
        return Config.fromfile(file)
    except Exception as error:
        if isinstance(error, SyntaxError | ValueError | OSError | RecursionError):
            _check_files(file.resolve())
        reason = _reason(error, path)
        if reason is None:
            raise
        raise UserError(reason) from error


def _check_files(file: Path, heirs: tuple[Path, ...] = ()) -> None:
    """Find the file that mmengine could not read, which its error does not name.

    Args:
        file: A config.
        heirs: The configs that inherit it.
    """
    if file in heirs:
        raise UserError(f'{file} inherits itself')
    if not file.is_file():
        raise UserError(f'{heirs[-1]} inherits a config that does not exist: {file}')
    try:
        tree = PARSERS.get(file.suffix, str)(file.read_text(encoding='utf-8'))
    except (SyntaxError, ValueError) as error:
        line = f', line {error.lineno}' if hasattr(error, 'lineno') else ''
        raise UserError(f'{file}{line}: {one_line(error)}') from error
    for node in getattr(tree, 'body', ()):
        if isinstance(node, ast.Assign) and getattr(node.targets[0], 'id', '') == '_base_':
            try:
                bases = ast.literal_eval(node.value)
            except ValueError:  # an expression
                continue
            for base in [bases] if isinstance(bases, str) else bases:
                if '::' not in base:  # else it is in another package
                    _check_files((file.parent / base).resolve(), (*heirs, file))


def _reason(error: Exception, path: str) -> str | None:
    """Return why a config cannot be read, or None if the error is not the config's."""
    calls = traceback.extract_tb(error.__traceback__)
    if isinstance(error, ImportError) and 'custom' in str(error):
        reason = one_line(error.__cause__ or error)
        return f'{path}: custom_imports names a module that cannot be imported ({reason})'
    if calls[-1].filename in [call.filename for call in calls if call.name == '<module>']:
        return f'{calls[-1].filename}, line {calls[-1].lineno}: {one_line(error)}'
    (*_, (last, _)) = traceback.walk_tb(error.__traceback__)
    if last.f_globals.get('__name__', '').startswith(('mmengine.', 'yaml.')):
        return f'{path}: {one_line(error)}'
    return None


def load_config(
    path: str,
    *,
    options: Mapping[str, Any] | None = None,
    work_dir: str | None = None,
    launcher: str = 'none',
) -> Config:
    """Read a config file and apply the options that all tools share.

    Args:
        path: The config file.
        options: Overrides, as ``--cfg-options`` gives them. ``data_root`` replaces the config's
            ``data_root`` everywhere: in data sets, annotation files and metrics.
        work_dir: Folder of logs and checkpoints; by default the config's, or ``work_dirs/<name>``.
        launcher: How processes were started: 'none', 'pytorch', 'slurm' or 'mpi'.

    Raises:
        UserError: As :func:`read_config`, :func:`.check_sections`, :func:`.check_options` and
            :func:`.fill_channels`, or the config has no model.
    """
    cfg = read_config(path)
    check_sections(cfg, path)
    options = dict(options or {})
    if 'data_root' in options:
        old, new = (str(c.get('data_root') or '').rstrip('/') for c in (cfg, options))
        if not old:
            raise UserError(f'{path} has no data_root: override that of each data set')
        if not new:
            raise UserError('data_root is empty: name the folder that holds the data')
        for key, child in list(cfg.items()):
            cfg[key] = _move_data(child, old, new)
        del options['data_root']
    check_options(cfg, options)
    try:
        cfg.merge_from_dict(options)
    except (KeyError, TypeError) as error:
        raise UserError(f'--cfg-options: {error.args[0]}') from error
    if 'model' not in cfg:
        raise UserError(f'{path} has no model: choose a config outside _base_')
    if not isinstance(cfg.model, dict):
        raise UserError(f'model must be a dict, but is {cfg.model!r}')
    fill_channels(cfg)
    cfg.launcher = launcher
    cfg.work_dir = work_dir or cfg.get('work_dir') or str(Path('work_dirs') / Path(path).stem)
    return cfg


def _move_data(node: Any, old: str, new: str) -> Any:
    """Return a part with the folder ``old`` replaced by ``new`` at the start of every path."""
    if isinstance(node, str) and (node == old or node.startswith(f'{old}/')):
        return new + node[len(old) :]
    if isinstance(node, list | tuple):
        return type(node)(_move_data(child, old, new) for child in node)
    if isinstance(node, dict):
        for key, child in node.items():
            node[key] = _move_data(child, old, new)
    return node
