"""Where weights can come from, and reading them without running what a file may hold.

Importing this module makes mmengine read files, addresses and names of weights by the functions
here: safetensors too, and nothing that would have to be unpickled.
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import json
import os
import pickle
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import safetensors
import safetensors.torch
import timm
import torch
from mmengine.dist import barrier
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader
from mmengine.runner.checkpoint import get_torchvision_models
from torch import Tensor
from torch.hub import download_url_to_file, get_dir

from mmdense.errors import UserError
from mmdense.weights import convert

__all__ = [
    'allow_training_state',
    'fetch',
    'load_from_condensenetv2',
    'load_from_timm',
    'new_file',
    'read_checkpoint',
    'sha256_of',
    'write_checkpoint',
]

FOLDER = 'MMDENSE_WEIGHTS'
TRUST = 'TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD'  # torch's own
CONDENSENETV2 = 'https://github.com/jianghaojun/CondenseNetV2#results'
SUFFIXES = ('.safetensors', '.pth', '.bin')
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
    core = getattr(np, '_core', None) or np.core
    # numpy 2 renamed the module; files of either are read under either.
    renamed = [
        (function, f'numpy.{module}.multiarray.{function.__name__}')
        for function in (core.multiarray._reconstruct, core.multiarray.scalar)
        for module in ('core', '_core')
    ]
    dtypes = {type(np.dtype(code)) for code in '?bhilqefd'}
    torch.serialization.add_safe_globals(
        [HistoryBuffer, np.ndarray, np.dtype, *dtypes, *renamed, (_method, 'builtins.getattr')]
    )


def _method(owner: Any, name: str) -> Any:
    """Stand in for ``getattr``, by which log buffers name their statistics: for nothing else."""
    if owner is not HistoryBuffer:
        raise pickle.UnpicklingError(f'Unsupported global: GLOBAL builtins.getattr of {owner!r}')
    return getattr(owner, name)


if tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 6):
    allow_training_state()


def read_checkpoint(file: str | Path, map_location: Any = 'cpu') -> dict[str, Any]:
    """Return what a .pth or .safetensors file holds, running nothing in it.

    Besides tensors it may hold plain Python, numpy's and mmengine's values, and the arguments of a
    script. For files that hold more there is torch's own way out, named in the error. Which kind of
    file it is is read from its content.

    Args:
        file: The file.
        map_location: Device that the tensors go to.

    Returns:
        A dict; for safetensors ``dict(state_dict=..., meta=...)``, whose ``meta`` is the file's
        metadata.

    Raises:
        UserError: No file, an empty, damaged or foreign one, or one that would have to be
            unpickled.
    """
    file = Path(file).expanduser()
    if not file.is_file():
        raise UserError(f'no file {file}' + (': it is a folder' if file.is_dir() else ''))
    with file.open('rb') as opened:
        begin = opened.read(64)
    if not begin:
        raise UserError(f'{file} is empty (0 bytes): download it again')
    for mistaken, what in MISTAKEN.items():
        if begin.lstrip().startswith(mistaken):
            raise UserError(f'{file} is no checkpoint, but {what}')
    try:
        if begin[8:9] == b'{':  # behind the length of the header
            held = _read_safetensors(file, map_location)
        else:
            held = _read_torch(file, map_location)
    except UserError:
        raise
    except Exception as error:  # torch, zipfile, pickle and safetensors each raise their own
        raise UserError(f'{file} is damaged, or no checkpoint ({_reason(error)})') from error
    if not isinstance(held, dict):
        raise UserError(f'{file} holds a {type(held).__name__}, not a checkpoint')
    return held


def _read_safetensors(file: Path, map_location: Any) -> dict[str, Any]:
    with safetensors.safe_open(file, 'pt') as opened:
        meta = dict(opened.metadata() or {})
    if 'meta' in meta:  # as write_checkpoint does
        meta = json.loads(meta['meta'])
    held = {k: v.to(map_location or 'cpu') for k, v in safetensors.torch.load_file(file).items()}
    return dict(state_dict=held, meta=meta)


def _read_torch(file: Path, map_location: Any) -> Any:
    trusted = os.environ.get(TRUST, '').lower() in ('1', 'y', 'yes', 'true')
    try:
        with _arguments_allowed(), warnings.catch_warnings():
            warnings.filterwarnings('ignore', 'Environment variable TORCH_FORCE_NO_WEIGHTS')
            return torch.load(file, map_location=map_location, weights_only=not trusted)
    except pickle.UnpicklingError as error:
        # Its first words advise to load unsafely.
        refused = re.search(r'(?:GLOBAL|global:?|class) (?:GLOBAL )?([\w.]+\.[\w.]+)', str(error))
        if refused is None:
            raise
        raise UserError(
            f'{file} holds more than weights ({refused[1]}), and reading that could run any code. '
            f'If you trust where it comes from, set {TRUST}=1 once, and save its state_dict alone'
        ) from error


@contextmanager
def _arguments_allowed() -> Iterator[None]:
    """Let a file hold its script's arguments: allowed here, and not from then on."""
    allowed = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals([argparse.Namespace])
    try:
        yield
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(allowed)


def _reason(error: Exception) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return f'{type(error).__name__}: {line.partition(". ")[0]}'.rstrip(': .')


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
        UserError: As :func:`new_file`.
    """
    file = new_file(file)
    # A tensor of its own each: views would drag along what they are cut from.
    weights = {k: v.detach().cpu().contiguous().clone() for k, v in state_dict.items()}
    part = file.with_name(f'.{file.name}.part')
    try:
        if file.suffix == '.pth':
            torch.save(dict(state_dict=weights, meta=dict(meta)), part)
        else:
            text = json.dumps(
                meta, default=lambda v: v.tolist() if hasattr(v, 'tolist') else str(v)
            )
            # One entry: several would be written in an order that changes from file to file.
            safetensors.torch.save_file(weights, part, metadata=dict(meta=text))
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)


def sha256_of(file: str | Path) -> str:
    """Return the sha256 of a file's content, in hex."""
    digest = hashlib.sha256()
    with Path(file).expanduser().open('rb') as opened:
        while block := opened.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _in_folder(*names: str) -> Path | None:
    """Return the first of these files that is in the folder of the user's own weights."""
    folder = os.environ.get(FOLDER)
    if not folder:
        return None
    if not Path(folder).expanduser().is_dir():
        raise UserError(f'{FOLDER} names no folder: {folder}')
    files = [Path(folder).expanduser() / name for name in names]
    return next((file for file in files if file.is_file()), None)


def _put(name: str) -> str:
    folder = os.environ.get(FOLDER)
    where = folder or f'a folder of yours that the variable {FOLDER} names'
    return f'put it as {name} into {where}'


def fetch(url: str) -> Path:
    """Return the file of a http address, from the user's own folder, the cache, or the network.

    The cache is torch's; the first process of each machine downloads. A checksum in the file's name
    (``name-1a2b3c4d.pth``) is verified.

    Raises:
        UserError: It can be had from none of these.
    """
    name = Path(urlparse(url).path).name
    file = _in_folder(name) or Path(get_dir(), 'checkpoints', name)
    error = None
    if not file.is_file() and int(os.environ.get('LOCAL_RANK', 0)) == 0:
        checksum = re.search(r'-([0-9a-f]{8,64})\.', name)
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            download_url_to_file(url, str(file), checksum and checksum[1], progress=False)
        except Exception as caught:  # of the network, the disk, or the checksum
            error = caught
    barrier()  # also after a failure: the others wait here
    if not file.is_file():
        reason = _reason(error) if error else 'see the log of the first process'
        raise UserError(f'{url} could not be downloaded ({reason}): {_put(name)}') from error
    return file


def load_from_local(filename: str, map_location: Any = None) -> dict[str, Any]:
    return read_checkpoint(filename, map_location)


def load_from_http(filename: str, map_location: Any = None) -> dict[str, Any]:
    return read_checkpoint(fetch(filename), map_location)


def load_from_torchvision(filename: str, map_location: Any = None) -> dict[str, Any]:
    scheme, _, name = filename.partition('://')
    known = get_torchvision_models()
    if name not in known:
        close = difflib.get_close_matches(name, known, n=1)
        hint = f'; did you mean {scheme}://{close[0]}?' if close else ''
        raise UserError(f'torchvision has no weights named {name}{hint}')
    return load_from_http(known[name], map_location)


@CheckpointLoader.register_scheme(prefixes='timm://')
def load_from_timm(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Return timm's pretrained weights for ``timm://NAME``, without the classifier.

    They come from the folder that ``MMDENSE_WEIGHTS`` names (NAME.safetensors, .pth or .bin, or the
    files of the hub in a folder NAME), or else through the Hugging Face hub: from its cache, which
    is all that ``HF_HUB_OFFLINE=1`` asks, or from the network. timm checks that its own network
    takes them without exception.

    Args:
        filename: Such as ``timm://rdnet_tiny.nv_in1k``.
        map_location: Device that the tensors go to; the CPU by default.

    Raises:
        UserError: timm has no such weights, they can be had from none of these, or they don't fit.
    """
    name = filename.removeprefix('timm://')
    try:
        published = timm.models.get_pretrained_cfg(name)
    except RuntimeError:  # a network that timm knows, with a tag that it doesn't
        published = None
    if published is None or not published.has_weights:
        close = difflib.get_close_matches(name, timm.list_pretrained(), n=1)
        hint = f'; did you mean timm://{close[0]}?' if close else ''
        raise UserError(f'timm has no weights named {name}{hint}')
    file = _in_folder(
        *(name + suffix for suffix in SUFFIXES),
        f'{name}/model.safetensors',
        f'{name}/pytorch_model.bin',
    )
    try:
        overlay = dict(file=str(file)) if file else None
        net = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
    except Exception as error:  # the hub's client, the network and timm each raise their own
        if file:
            raise UserError(f'{file} does not fit {filename} ({_reason(error)})') from error
        raise UserError(
            f'{filename} could not be downloaded ({_reason(error)}): get model.safetensors of '
            f'{published.hf_hub_id} from the Hugging Face hub, and {_put(name + SUFFIXES[0])}'
        ) from error
    net.reset_classifier(0)
    return dict(state_dict={k: v.to(map_location or 'cpu') for k, v in net.state_dict().items()})


@CheckpointLoader.register_scheme(prefixes='condensenetv2://')
def load_from_condensenetv2(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Return the weights of a released CondenseNetV2 in a local file, ``condensenetv2://PATH``.

    Where there is no PATH, a file of that name in the folder that ``MMDENSE_WEIGHTS`` names is
    taken.

    What the file holds decides which network can take it: a converted model (A, B, C) is for
    ``CondenseNetV2(arch='a', 'b' or 'c', form='condensed')``, a model as it was trained (C) for
    ``form='learned'``, which ``condense()`` or ``switch_to_deploy()`` then converts. A network of
    the other form refuses it.

    Args:
        filename: Such as ``condensenetv2://weights/condensenetv2_a.pth.tar``.
        map_location: Device that the tensors go to; the CPU by default.

    Raises:
        UserError: There is no such file, or it holds no released CondenseNetV2.
    """
    path = Path(filename.removeprefix('condensenetv2://')).expanduser()
    file = path if path.is_file() else _in_folder(path.name)
    if file is None:
        raise UserError(f'no file {path}: download the model that is linked in {CONDENSENETV2}')
    try:
        return dict(state_dict=convert(read_checkpoint(file, map_location), 'condensenetv2'))
    except ValueError as error:
        raise UserError(f'{file} is no model of {CONDENSENETV2}: {error}') from error


# In place of mmengine's, which fall back to unsafe loading (the maintained one) or have no other.
for _schemes, _loader in (
    ([''], load_from_local),
    (['http://', 'https://'], load_from_http),
    (['torchvision://', 'modelzoo://'], load_from_torchvision),
):
    CheckpointLoader.register_scheme(_schemes, loader=_loader, force=True)
