"""Reading a config file, with an error in one line if it cannot be read.

Python and YAML configs are executed: only run configs you trust.
"""

import ast
import traceback
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmengine.config import Config

from mmdense.config.channels import fill_channels
from mmdense.config.validate import check_options, check_sections
from mmdense.errors import UserError, one_line, suggest_file
from mmdense.patches import find_config


def read_config(path: str) -> Config:
    """Return a config as its file and its bases define it, or raise UserError with the place.

    ``path`` may be that of an installed package's, such as ``mmdet::FOLDER/NAME.py``.
    """
    file = find_config(path)
    if not file.is_file():
        raise UserError(f'no config {path}{suggest_file(file, "*.py")}')
    try:
        return Config.fromfile(file)
    except RecursionError as error:
        raise UserError(f'{path} inherits itself') from error
    except Exception as error:  # a config and the modules that it imports raise anything
        if isinstance(error, SyntaxError | UnicodeError):
            _check_syntax(file)
        cause = error.__cause__ or error
        while isinstance(cause.__context__, ImportError):  # the one that says what is missing
            cause = cause.__context__
        frames = traceback.extract_tb(cause.__traceback__)
        place = [frame for frame in frames if not frame.filename.startswith('<frozen')][-1]
        where = f' ({place.filename}, line {place.lineno})'
        if {'mmengine', 'importlib'} & {*Path(place.filename).parts}:
            where = ''
            if isinstance(cause, ModuleNotFoundError):  # named by custom_imports itself
                where = ': run from the folder that holds it, add that to PYTHONPATH, or install it'
        raise UserError(f'{path}: {one_line(cause)}{where}') from error


def _check_syntax(file: Path) -> None:
    """Parse a Python config and those that it inherits: mmengine's error does not name the file."""
    try:
        ast.parse(file.read_text(encoding='utf-8'))
    except (SyntaxError, UnicodeError) as error:
        raise UserError(f'{file}: {one_line(error)}') from error
    for base in Config._get_base_files(str(file)):
        if '::' not in base:  # else it is in another package
            _check_syntax(file.parent / base)


def load_config(
    path: str,
    *,
    options: Mapping[str, Any] | None = None,
    work_dir: str | None = None,
    launcher: str = 'none',
) -> Config:
    """Read a config file (see :func:`read_config`) and apply the options that all tools share.

    ``options`` are those of ``--cfg-options``; ``data_root`` replaces the config's everywhere: in
    data sets, annotation files and metrics. ``work_dir`` is by default the config's, or
    ``work_dirs/<name>``.
    """
    cfg = read_config(path)
    if cfg.get('default_scope') == 'mmpretrain' and not find_spec('mmpretrain'):
        raise UserError(f"{path} needs mmpretrain: pip install -e '.[classification]'")
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
    if cfg.get('data_preprocessor'):  # mmpretrain's configs have it beside the model
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)
    fill_channels(cfg)
    cfg.launcher = launcher
    cfg.work_dir = work_dir or cfg.get('work_dir') or f'work_dirs/{find_config(path).stem}'
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
