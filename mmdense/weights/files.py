"""Reading and writing checkpoint files. Reading never executes what a file contains."""

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

from mmdense.errors import UserError, explain
from mmdense.files import atomic_write

TRUST = 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'  # torch's own variable
META = 'mmdense_meta'  # entry of a safetensors file's metadata
SUFFIXES = ('.pth', '.safetensors')
# First bytes of files that are often taken for checkpoints.
LOOKALIKES = {
    b'version https://git-lfs': 'a Git LFS pointer: run git lfs pull',
    b'<': 'a web page: download the file itself',
}
_LOCK = threading.Lock()


def read_checkpoint(file: str | Path, map_location: Any = 'cpu') -> dict[str, Any]:
    """Return the content of a .pth or .safetensors file without executing anything in it.

    Besides tensors a file may hold plain Python values, values of numpy and mmengine, and a
    script's parsed arguments. The content decides which kind of file it is, not the suffix. The
    result is without ``meta['config']``; that of a safetensors file is
    ``dict(state_dict=..., meta=...)`` with the file's metadata. UserError if the file is missing,
    empty, damaged or not a checkpoint, or if reading it would mean to unpickle objects; the message
    names torch's way to read those.
    """
    file = Path(file).expanduser()
    if not file.is_file():
        raise UserError(f'no file {file}' + (': it is a folder' if file.is_dir() else ''))
    with explain(f'{file} is damaged, or not a checkpoint'):
        with file.open('rb') as stream:
            start = stream.read(64)
        if not start:
            raise UserError(f'{file} is empty (0 bytes): download it again')
        if start[8:9] == b'{' and int.from_bytes(start[:8], 'little') < file.stat().st_size:
            checkpoint = _read_safetensors(file, map_location)
        else:
            for lookalike, name in LOOKALIKES.items():
                if start.lstrip().startswith(lookalike):
                    raise UserError(f'{file} is not a checkpoint, but {name}')
            checkpoint = _read_torch(file, map_location)
    if not isinstance(checkpoint, dict):
        raise UserError(f'{file} holds a {type(checkpoint).__name__}, not a checkpoint')
    if isinstance(checkpoint.get('meta'), dict):
        # No mmengine writes this entry, but resuming would execute it as a Python program.
        checkpoint['meta'].pop('config', None)
    return checkpoint


def _read_safetensors(file: Path, map_location: Any) -> dict[str, Any]:
    with safetensors.safe_open(file, 'pt') as opened:
        meta = dict(opened.metadata() or {})
    if META in meta:
        meta = json.loads(meta[META])
    weights = safetensors.torch.load_file(file)
    return dict(state_dict={k: v.to(map_location or 'cpu') for k, v in weights.items()}, meta=meta)


def _read_torch(file: Path, map_location: Any) -> Any:
    trusted = os.environ.get(TRUST, '').lower() in ('1', 'y', 'yes', 'true')
    try:
        with file.open('rb') as stream, _safe_globals(), warnings.catch_warnings():
            warnings.simplefilter('ignore', UserWarning)  # of old protocols, and of the variable
            # As a stream: torch would go by the file's name.
            return torch.load(stream, map_location=map_location, weights_only=not trusted)
    except pickle.UnpicklingError as error:  # its first words advise to load unsafely
        name = re.search(r'(?:GLOBAL|global|class) \W*([a-z_][\w.]+)', str(error))
        if name is None:
            reason = re.search(r'WeightsUnpickler error: (.+)', str(error))
            raise ValueError(reason[1] if reason else 'no pickle') from error
        raise UserError(
            f'{file} holds more than weights ({name[1]}), and reading that could run any code. '
            f'If you trust its source, set {TRUST}=1 once, and save its state_dict alone'
        ) from error
    except RuntimeError as error:
        if 'TorchScript' in str(error):
            raise UserError(f'{file} is a TorchScript program, not a state dict') from error
        raise


@contextmanager
def _safe_globals() -> Iterator[None]:
    """Let torch's safe loading read the values that training checkpoints hold beside tensors."""
    with _LOCK:  # torch has one list for all threads
        # What the user allowed stays allowed afterwards.
        missing = [x for x in _training_values() if x not in torch.serialization.get_safe_globals()]
        if hasattr(torch.serialization, 'safe_globals'):
            with torch.serialization.safe_globals(missing):
                yield
        else:  # torch 2.4
            torch.serialization.add_safe_globals(missing)
            yield


@functools.cache
def _training_values() -> list[Any]:
    """Return the types and functions that rebuild mmengine's, numpy's and argparse's values."""
    # numpy 2 renamed the module; a file of either is readable under either.
    arrays = [
        _named(f'numpy.{module}.multiarray', value.__reduce__()[0])
        for value in (np.zeros(0), np.float64(0))
        for module in ('core', '_core')
    ]
    dtypes = {type(np.dtype(code)) for code in '?bhilqBHILQefdUM'}
    builtins = [_named('builtins', getattr), _named('_codecs', codecs.encode), bytes]
    types = [HistoryBuffer, ConfigDict, argparse.Namespace, np.ndarray, np.dtype, *dtypes]
    return [*types, *arrays, *builtins]


def _named(module: str, function: Callable) -> Callable:
    """Return a function under the name that a pickle uses; ``getattr`` for log buffers alone."""

    def named(*arguments: Any) -> Any:
        # Log buffers name their statistics by getattr.
        if function is getattr and arguments[0] is not HistoryBuffer:
            raise pickle.UnpicklingError(
                f'Unsupported global: GLOBAL builtins.getattr of {arguments[0]}'
            )
        return function(*arguments)

    named.__module__, named.__name__, named.__qualname__ = module, *[function.__name__] * 2
    return named


def check_target(file: str | Path, *, new: bool = True) -> Path:
    """Return the path of a checkpoint to write; ``new`` refuses a file that exists.

    UserError for another suffix than .pth and .safetensors, an existing file, or a missing folder.
    """
    file = Path(file).expanduser()
    if file.suffix not in SUFFIXES:
        raise UserError(f'{file} must end in {" or ".join(SUFFIXES)}')
    if new and file.exists():
        raise UserError(f'{file} exists already: choose another name')
    if not file.parent.is_dir():
        raise UserError(f'no folder {file.parent} to write {file.name} to')
    return file


def write_checkpoint(
    file: str | Path, state_dict: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> None:
    """Write a new file, completely or not at all. In .safetensors, ``meta`` is stored as JSON.

    UserError as of :func:`check_target`, :func:`serialize` and :func:`.atomic_write`.
    """
    file = check_target(file)
    atomic_write(file, serialize(file, state_dict, meta))


def serialize(
    file: Path, state_dict: Mapping[str, Tensor], meta: Mapping[str, Any]
) -> bytes | memoryview:
    """Return the content of a checkpoint file, which depends on weights and ``meta`` alone.

    UserError if JSON cannot hold ``meta``, and the file is to be .safetensors.
    """
    # Copies: views would drag along the tensors that they are cut from.
    weights = {k: v.detach().cpu().contiguous().clone() for k, v in state_dict.items()}
    if file.suffix == '.pth':
        stream = io.BytesIO()  # given a path, torch would write its name into the file
        torch.save(dict(state_dict=weights, meta=dict(meta)), stream)
        return stream.getbuffer()
    try:
        # One entry: safetensors writes several in an order that changes from file to file.
        text = json.dumps(meta, default=lambda v: v.tolist() if hasattr(v, 'tolist') else str(v))
    except TypeError as error:  # of keys
        raise UserError(f'{file}: JSON cannot hold meta ({error}); write it as .pth') from error
    return safetensors.torch.save(weights, metadata={META: text})
