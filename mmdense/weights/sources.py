"""Where weights come from: files, URLs, and names such as ``timm://rdnet_tiny.nv_in1k``.

:func:`mmdense.patches.apply_patches` makes mmengine load weights by the functions in
:data:`SCHEMES`.
"""

from __future__ import annotations

import difflib
import hashlib
import os
import re
import sys
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import timm
from huggingface_hub import hf_hub_url, try_to_load_from_cache
from mmengine.dist import barrier
from mmengine.runner import CheckpointLoader
from mmengine.runner.checkpoint import (
    _get_mmengine_home,
    get_deprecated_model_names,
    get_external_models,
    get_mmcls_models,
    get_torchvision_models,
)
from torch.hub import download_url_to_file, get_dir

from mmdense.errors import UserError, one_line
from mmdense.weights.files import read_checkpoint
from mmdense.weights.formats import convert, state_dict_of

__all__ = ['SCHEMES', 'fetch', 'load_from_condensenetv2', 'load_from_timm', 'locate']

FOLDER = 'MMDENSE_WEIGHTS'
CONDENSENETV2 = 'https://github.com/jianghaojun/CondenseNetV2#results'
SUFFIXES = ('.safetensors', '.pth', '.bin')
HUB_FILES = ('model.safetensors', 'pytorch_model.bin')
CHECKSUM = re.compile(r'-(?=\d*[a-f])([0-9a-f]{8,64})\.')  # digits alone may be a date


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
    (``name-1a2b3c4d.pth``) is verified; files without one have a folder for each address.

    Raises:
        UserError: It can be had from none of these.
    """
    name = Path(urlparse(url).path).name
    checksum = CHECKSUM.search(name)
    file = _place(url)
    error = None
    if not file.is_file() and int(os.environ.get('LOCAL_RANK', 0)) == 0:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            progress = sys.stderr.isatty()
            download_url_to_file(url, str(file), checksum and checksum[1], progress)
        except Exception as caught:  # of the network, the disk, or the checksum
            error = caught
    barrier()  # also after a failure: the others wait here
    if not file.is_file():
        reason = one_line(error) if error else 'see the log of the first process'
        raise UserError(f'{url} could not be downloaded ({reason}): {_put(name)}') from error
    return file


def _place(url: str) -> Path:
    """Return where the file of an address is, or goes to."""
    name = Path(urlparse(url).path).name
    cache = Path(get_dir(), 'checkpoints')
    if not CHECKSUM.search(name):
        cache /= Path('mmdense', hashlib.sha256(url.encode()).hexdigest()[:16])
    return _in_folder(name) or cache / name


def locate(filename: str) -> Path | str:
    """Return where weights would be taken from, without loading them or asking the network.

    Args:
        filename: As a config names them: a file, an address, or SCHEME://NAME.

    Returns:
        A file, which is there; or the address that it would be downloaded from.

    Raises:
        UserError: There is no such file, or a scheme doesn't know the name.
    """
    scheme, separator, name = filename.partition('://')
    if scheme == 'timm':
        published, file = _published_by_timm(name)
        if file:
            return file
        if not published.hf_hub_id:
            return published.url
        cached = (try_to_load_from_cache(published.hf_hub_id, own) for own in HUB_FILES)
        file = next((file for file in cached if isinstance(file, str)), None)
        return Path(file) if file else hf_hub_url(published.hf_hub_id, HUB_FILES[0])
    if scheme == 'condensenetv2':
        return _condensenetv2_file(name)
    where: Path | str = filename if separator else Path(filename).expanduser()
    if scheme in ('torchvision', 'modelzoo'):
        where = _address(filename, get_torchvision_models())
    elif scheme in ('openmmlab', 'open-mmlab'):
        where = _of_openmmlab(filename)
    elif scheme == 'mmcls':
        where = _address(filename, get_mmcls_models())
    elif separator and scheme not in ('http', 'https'):
        raise _no_scheme(filename)
    if isinstance(where, str):
        return _place(where) if _place(where).is_file() else where
    if not where.is_file():
        raise UserError(f'no checkpoint {where}')
    return where


def _no_scheme(filename: str) -> UserError:
    known = sorted(p for p in CheckpointLoader._schemes if re.fullmatch(r'[\w-]+://', p))
    return UserError(f'{filename}: no such scheme (known: {", ".join(known)})')


def load_from_local(filename: str, map_location: Any = None) -> dict[str, Any]:
    if '://' in filename:
        raise _no_scheme(filename)
    return read_checkpoint(filename, map_location)


def load_from_http(filename: str, map_location: Any = None) -> dict[str, Any]:
    return read_checkpoint(fetch(filename), map_location)


def load_from_torchvision(filename: str, map_location: Any = None) -> dict[str, Any]:
    return load_from_http(_address(filename, get_torchvision_models()), map_location)


def load_from_openmmlab(filename: str, map_location: Any = None) -> dict[str, Any]:
    where = _of_openmmlab(filename)
    load = load_from_http if isinstance(where, str) else read_checkpoint
    return load(where, map_location)


def _of_openmmlab(filename: str) -> Path | str:
    scheme, _, name = filename.partition('://')
    name = get_deprecated_model_names().get(name, name)
    address = _address(f'{scheme}://{name}', get_external_models())
    # Of the user's own list, some are files.
    return address if '://' in address else Path(_get_mmengine_home(), address)


def load_from_mmcls(filename: str, map_location: Any = None) -> dict[str, Any]:
    state_dict = state_dict_of(load_from_http(_address(filename, get_mmcls_models()), map_location))
    head = 'backbone.'
    return dict(
        state_dict={k.removeprefix(head): v for k, v in state_dict.items() if k.startswith(head)}
    )


def _address(filename: str, addresses: dict[str, str]) -> str:
    """Return the address of ``SCHEME://NAME`` in a table of mmengine's."""
    scheme, _, name = filename.partition('://')
    if name not in addresses:
        close = difflib.get_close_matches(name, addresses, n=1)
        hint = f'; did you mean {scheme}://{close[0]}?' if close else ''
        raise UserError(f'{scheme} has no weights named {name}{hint}')
    return addresses[name]


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
    published, file = _published_by_timm(name)
    overlay = dict(state_dict=state_dict_of(read_checkpoint(file))) if file else None
    try:
        net = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay)
    except Exception as error:  # the hub's client, the network and timm each raise their own
        if file:
            raise UserError(f'{file} does not fit {filename} ({one_line(error)})') from error
        raise UserError(
            f'{filename} could not be downloaded ({one_line(error)}): get model.safetensors of '
            f'{published.hf_hub_id} from the Hugging Face hub, and {_put(name + SUFFIXES[0])}'
        ) from error
    net.reset_classifier(0)
    return dict(state_dict={k: v.to(map_location or 'cpu') for k, v in net.state_dict().items()})


def _published_by_timm(name: str) -> tuple[Any, Path | None]:
    """Return what timm knows of its weights, and their file if it is in the user's folder."""
    try:
        published = timm.models.get_pretrained_cfg(name)
    except RuntimeError:  # a network that timm knows, with a tag that it doesn't
        published = None
    if published is None or not published.has_weights:
        close = difflib.get_close_matches(name, timm.list_pretrained(), n=1)
        hint = f'; did you mean timm://{close[0]}?' if close else ''
        raise UserError(f'timm has no weights named {name}{hint}')
    tagged = f'{published.architecture}.{published.tag}' if published.tag else name
    file = _in_folder(
        *(own + suffix for own in (name, tagged) for suffix in SUFFIXES),
        *(f'{tagged}/{own}' for own in HUB_FILES),
    )
    return published, file


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
    file = _condensenetv2_file(filename.removeprefix('condensenetv2://'))
    try:
        return dict(state_dict=convert(read_checkpoint(file, map_location), 'condensenetv2'))
    except ValueError as error:
        raise UserError(f'{file} is no model of {CONDENSENETV2}: {error}') from error


def _condensenetv2_file(name: str) -> Path:
    path = Path(name).expanduser()
    file = path if path.is_file() else _in_folder(path.name)
    if file is None:
        raise UserError(f'no file {path}: download the model that is linked in {CONDENSENETV2}')
    return file


# What mmengine's CheckpointLoader calls for each prefix of a file name; its own loaders fall back
# to unsafe loading (the maintained distribution) or know no other way (the original one).
SCHEMES = {
    ('',): load_from_local,
    ('http://', 'https://'): load_from_http,
    ('torchvision://', 'modelzoo://'): load_from_torchvision,
    ('openmmlab://', 'open-mmlab://'): load_from_openmmlab,
    ('mmcls://',): load_from_mmcls,
    ('timm://',): load_from_timm,
    ('condensenetv2://',): load_from_condensenetv2,
}
