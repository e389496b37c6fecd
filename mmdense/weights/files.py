"""Reading and writing files of weights, without running what a file may hold."""

from __future__ import annotations

import argparse
import codecs
import functools
import io
import json
import os
import pickle
import re
import threading
import warnings
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from mmengine.config import ConfigDict
from mmengine.logging import HistoryBuffer
from torch import Tensor

from mmdense.errors import UserError, one_line
from mmdense.files import atomic_write

try:
    from numpy._core import multiarray
except ImportError:  # numpy 1
    from numpy.core import multiarray

__all__ = ['allow_training_state', 'new_file', 'read_checkpoint', 'write_checkpoint']

TRUST = 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'  # torch's own
_LOCK = threading.Lock()
META = 'mmdense_meta'  # entry of a safetensors file's metadata
TAR_AT, TAR = 257, b'ustar'
# Tensors may share values, such as tied weights, and averages at the start: so often at most.
REPEATED = 16
SMALL = 1 << 26  # bytes that nobody minds
# How files begin that are taken for weights by mistake.
MISTAKEN = {
    b'version https://git-lfs': 'a Git LFS pointer: run git lfs pull',
    b'<': 'a web page: download the file itself',
}


def allow_training_state() -> None:
    """Let torch's safe loading read what mmengine saves beside the weights: its log buffers.

    Since torch 2.6 ``torch.load`` refuses objects that it doesn't know; the original mmengine can't
    load its own checkpoints there. (The maintained one opens a list of its own for each load, and
    takes those entries off torch's list after it, ours too.)
    """
    # numpy 2 renamed the module; files of either are read under either.
    renamed = [
        _known_as(f'numpy.{module}.multiarray', function)
        for function in (multiarray._reconstruct, multiarray.scalar)
        for module in ('core', '_core')
    ]
    dtypes = {type(np.dtype(code)) for code in '?bhilqBHILQefdUM'}
    builtin = [_known_as('builtins', getattr), _known_as('_codecs', codecs.encode), bytes]
    torch.serialization.add_safe_globals(
        [HistoryBuffer, ConfigDict, np.ndarray, np.dtype, *dtypes, *renamed, *builtin]
    )


@functools.cache  # one object each, however often they are allowed
def _known_as(module: str, function: Callable) -> Callable:
    """Return a function that is allowed under a name: of ``getattr`` no more than is needed."""

    def named(*arguments: Any) -> Any:
        # Log buffers name their statistics by getattr.
        if function is getattr and arguments[0] is not HistoryBuffer:
            raise pickle.UnpicklingError(
                f'Unsupported global: GLOBAL builtins.getattr of {arguments[0]}'
            )
        return function(*arguments)

    named.__module__, named.__name__, named.__qualname__ = module, *[function.__name__] * 2
    return named


def read_checkpoint(file: str | Path, map_location: Any = 'cpu') -> dict[str, Any]:
    """Return what a .pth or .safetensors file holds, running nothing in it.

    Besides tensors it may hold plain Python, numpy's and mmengine's values, and the arguments of a
    script. For files that hold more there is torch's own way out, named in the error. Which kind of
    file it is is read from its content.

    Args:
        file: The file.
        map_location: Device that the tensors go to.

    Returns:
        A dict, without ``meta['config']``; for safetensors ``dict(state_dict=..., meta=...)``,
        whose ``meta`` is the file's metadata.

    Raises:
        UserError: No file, an empty, damaged or foreign one, one that would have to be unpickled,
            or one that would take far more memory than its size.
    """
    file = Path(file).expanduser()
    try:
        if not file.is_file():
            raise UserError(f'no file {file}' + (': it is a folder' if file.is_dir() else ''))
        with file.open('rb') as opened:
            begin = opened.read(TAR_AT + len(TAR))
        if not begin:
            raise UserError(f'{file} is empty (0 bytes): download it again')
        if begin[8:9] == b'{' and int.from_bytes(begin[:8], 'little') < file.stat().st_size:
            held = _read_safetensors(file, map_location)
        else:
            for mistaken, what in MISTAKEN.items():
                if begin.lstrip().startswith(mistaken):
                    raise UserError(f'{file} is no checkpoint, but {what}')
            if begin[TAR_AT:] == TAR:  # torch would unpack it, links and all
                raise UserError(f'{file} is a tar archive: unpack it, and name the file inside')
            if zipfile.is_zipfile(file):
                _check_archive(file)
            held = _read_torch(file, map_location)
            _check_tensors(held, file)
    except UserError:
        raise
    except Exception as error:  # the system, torch, zipfile and safetensors each raise their own
        raise UserError(f'{file} is damaged, or no checkpoint ({one_line(error)})') from error
    if not isinstance(held, dict):
        raise UserError(f'{file} holds a {type(held).__name__}, not a checkpoint')
    if isinstance(held.get('meta'), dict):
        # mmengine would run it as a Python program when it resumes; no version of it writes that.
        held['meta'].pop('config', None)
    return held


def _check_archive(file: Path) -> None:
    """Refuse an archive that unpacks to more than there is: torch compresses nothing."""
    with zipfile.ZipFile(file) as archive:
        size = sum(entry.file_size for entry in archive.infolist())
    if size > file.stat().st_size:
        raise UserError(
            f'{file} has {file.stat().st_size / 1e6:.3g} MB, but would unpack to {size / 1e6:.3g} '
            'MB: torch writes no such files'
        )


def _check_tensors(held: Any, file: Path) -> None:
    """Refuse tensors without values, and those that repeat a few values a million times."""
    todo, seen, size = [held], set(), 0
    while todo:
        value = todo.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Mapping):
            todo += value.values()
        elif isinstance(value, list | tuple):
            todo += value
        elif isinstance(value, Tensor):
            if value.is_meta:
                raise UserError(f'{file} holds tensors without values')
            size += value.numel() * value.element_size()
    if size > max(REPEATED * file.stat().st_size, SMALL):
        raise UserError(
            f'{file} has {file.stat().st_size / 1e6:.3g} MB, but its tensors would take '
            f'{size / 1e6:.3g} MB: it is damaged, or made to fill the memory'
        )


def _read_safetensors(file: Path, map_location: Any) -> dict[str, Any]:
    with safetensors.safe_open(file, 'pt') as opened:
        meta = dict(opened.metadata() or {})
    if META in meta:
        meta = json.loads(meta[META])
    held = {k: v.to(map_location or 'cpu') for k, v in safetensors.torch.load_file(file).items()}
    return dict(state_dict=held, meta=meta)


def _read_torch(file: Path, map_location: Any) -> Any:
    trusted = os.environ.get(TRUST, '').lower() in ('1', 'y', 'yes', 'true')
    try:
        with file.open('rb') as opened, _allowed(), warnings.catch_warnings():
            warnings.simplefilter('ignore', UserWarning)  # of old protocols, and of the variable
            # Opened here: torch would go by the name.
            return torch.load(opened, map_location=map_location, weights_only=not trusted)
    except pickle.UnpicklingError as error:
        # Its first words advise to load unsafely.
        refused = re.search(r'(?:GLOBAL|global|class) \W*([a-z_][\w.]+)', str(error))
        if refused is None:
            found = re.search(r'WeightsUnpickler error: (.+)', str(error))
            raise UserError(
                f'{file} is damaged, or no checkpoint ({found[1] if found else "no pickle"})'
            ) from error
        raise UserError(
            f'{file} holds more than weights ({refused[1]}), and reading that could run any code. '
            f'If you trust where it comes from, set {TRUST}=1 once, and save its state_dict alone'
        ) from error
    except RuntimeError as error:
        if 'TorchScript' in str(error):
            raise UserError(f'{file} is a TorchScript program, not a state dict') from error
        raise


@contextmanager
def _allowed() -> Iterator[None]:
    """Allow training state, and a script's arguments: those not from then on."""
    with _LOCK:  # torch's list is one for all threads
        allow_training_state()  # again: mmengine may have taken it off
        allowed = [*dict.fromkeys(torch.serialization.get_safe_globals())]
        torch.serialization.add_safe_globals([argparse.Namespace])
        try:
            yield
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(allowed)


def new_file(file: str | Path) -> Path:
    """Return the path of a checkpoint that can be written.

    Raises:
        UserError: A file that is there already, another suffix, or a folder that isn't there.
    """
    file = Path(file).expanduser()
    if file.suffix not in ('.pth', '.safetensors'):
        raise UserError(f'{file} must end in .pth or .safetensors')
    if file.exists():
        raise UserError(f'{file} is there already: choose another name')
    if not file.parent.is_dir():
        raise UserError(f'no folder {file.parent} to write {file.name} to')
    return file


def write_checkpoint(
    file: str | Path, state_dict: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> None:
    """Write weights to a new file, which is there whole or not at all.

    Args:
        file: NAME.pth, or NAME.safetensors, which holds ``meta`` as JSON.
        state_dict: The weights.
        meta: What else is known of them; what :func:`read_checkpoint` returns as ``meta``.

    Raises:
        UserError: As :func:`new_file` and :func:`atomic_write`, or ``meta`` that JSON cannot hold.
    """
    file = new_file(file)
    # A tensor of its own each: views would drag along what they are cut from.
    weights = {k: v.detach().cpu().contiguous().clone() for k, v in state_dict.items()}
    if file.suffix == '.pth':
        held = io.BytesIO()  # given a name, torch would write it into the file
        torch.save(dict(state_dict=weights, meta=dict(meta)), held)
        atomic_write(file, held.getbuffer())
    else:
        # One entry: several would be written in an order that changes from file to file.
        atomic_write(file, safetensors.torch.save(weights, metadata={META: _json(meta, file)}))


def _json(meta: Mapping[str, Any], file: Path) -> str:
    try:
        return json.dumps(meta, default=lambda v: v.tolist() if hasattr(v, 'tolist') else str(v))
    except TypeError as error:  # of keys
        raise UserError(f'{file}: meta is not for JSON ({error}); write it as .pth') from error
