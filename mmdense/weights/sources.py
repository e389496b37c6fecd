"""Sources of weights: files, URLs, and names such as ``timm://rdnet_tiny.nv_in1k``.

The names of ``torchvision://``, ``openmmlab://`` and ``mmcls://`` are those of mmengine's lists.
:func:`mmdense.patches.apply_patches` makes mmengine load them by the functions in :data:`SCHEMES`.
"""

import difflib
import hashlib
import os
import re
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import timm
from huggingface_hub import hf_hub_url, try_to_load_from_cache
from mmengine.dist import barrier
from mmengine.runner import CheckpointLoader
from mmengine.runner.checkpoint import (
    _get_mmengine_home,
    _process_mmcls_checkpoint,
    get_deprecated_model_names,
    get_external_models,
    get_mmcls_models,
    get_torchvision_models,
)
from torch.hub import download_url_to_file, get_dir

from mmdense.errors import UserError, one_line
from mmdense.weights.files import read_checkpoint
from mmdense.weights.formats import convert, recognise, state_dict_of

FOLDER = 'MMDENSE_WEIGHTS'  # environment variable: the folder of the user's own weights
CONDENSENETV2 = 'https://github.com/jianghaojun/CondenseNetV2#results'
# Scheme -> mmengine's list: names -> addresses.
LISTS = {
    'torchvision': get_torchvision_models,
    'modelzoo': get_torchvision_models,
    'openmmlab': get_external_models,
    'open-mmlab': get_external_models,
    'mmcls': get_mmcls_models,
}
SUFFIXES = ('.safetensors', '.pth', '.bin')
HUB_FILES = ('model.safetensors', 'pytorch_model.bin')
CHECKSUM = re.compile(r'-(?=\d*[a-f])([0-9a-f]{8,64})\.')  # digits alone may be a date


def _in_folder(*names: str) -> Path | None:
    """Return the first of these files that the folder of the user's own weights has."""
    folder = os.environ.get(FOLDER)
    if not folder:
        return None
    if not Path(folder).expanduser().is_dir():
        raise UserError(f'{FOLDER} names no folder: {folder}')
    files = [Path(folder).expanduser() / name for name in names]
    return next((file for file in files if file.is_file()), None)


def _put(name: str) -> str:
    folder = os.environ.get(FOLDER) or f'a folder and set the variable {FOLDER} to it'
    return f'put it as {name} into {folder}'


def _unknown(scheme: str, name: str, known: Iterable[str]) -> UserError:
    close = difflib.get_close_matches(name, known, n=1)
    hint = f'; did you mean {scheme}://{close[0]}?' if close else ''
    return UserError(f'{scheme} has no weights named {name}{hint}')


def fetch(url: str) -> Path:
    """Return the file of a URL: from the user's folder, torch's cache, or the network.

    The first process of each machine downloads. A checksum in the file's name
    (``name-1a2b3c4d.pth``) is verified; files without one are cached in a folder per URL. UserError
    if none of these has the file.
    """
    file = _place(url)
    checksum = CHECKSUM.search(file.name)
    error = None
    if not file.is_file() and int(os.environ.get('LOCAL_RANK', 0)) == 0:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            download_url_to_file(url, str(file), checksum and checksum[1], sys.stderr.isatty())
        except Exception as caught:  # of the network, the disk, or the checksum
            error = caught
    barrier()  # also after a failure: the others wait here
    if not file.is_file():
        reason = one_line(error) if error else 'see the log of the first process'
        raise UserError(f'{url} could not be downloaded ({reason}): {_put(file.name)}') from error
    return file


def _place(url: str) -> Path:
    """Return the path of a URL's file in the user's folder or in the cache."""
    name = Path(urlparse(url).path).name
    cache = Path(get_dir(), 'checkpoints')
    if not CHECKSUM.search(name):
        cache /= Path('mmdense', hashlib.sha256(url.encode()).hexdigest()[:16])
    return _in_folder(name) or cache / name


def locate(filename: str) -> Path | str:
    """Return the existing file, or else the URL, that a config's ``filename`` stands for.

    Nothing is loaded, and the network isn't used. UserError if there is no such file, scheme or
    name.
    """
    scheme, _, name = filename.partition('://')
    if scheme == 'timm':
        published, file = _published_by_timm(name)
        if file:
            return file
        if not published.hf_hub_id:
            return published.url
        cached = (try_to_load_from_cache(published.hf_hub_id, hub_file) for hub_file in HUB_FILES)
        file = next((file for file in cached if isinstance(file, str)), None)
        return Path(file) if file else hf_hub_url(published.hf_hub_id, HUB_FILES[0])
    if scheme == 'condensenetv2':
        return _condensenetv2_file(name)
    source = _resolve(filename)
    if isinstance(source, str):
        return _place(source) if _place(source).is_file() else source
    if not source.is_file():
        raise UserError(f'no checkpoint {source}')
    return source


def _resolve(filename: str) -> Path | str:
    """Return the file or URL that a config's file name stands for."""
    scheme, separator, name = filename.partition('://')
    if not separator:
        return Path(filename).expanduser()
    if scheme in ('http', 'https'):
        return filename
    if scheme not in LISTS:
        known = sorted(p for p in CheckpointLoader._schemes if re.fullmatch(r'[\w-]+://', p))
        raise UserError(f'{filename}: no such scheme (known: {", ".join(known)})')
    if scheme in ('openmmlab', 'open-mmlab'):
        name = get_deprecated_model_names().get(name, name)
    addresses = LISTS[scheme]()
    if name not in addresses:
        raise _unknown(scheme, name, addresses)
    # The user's own list (open_mmlab.json in MMENGINE_HOME) may name files in that folder.
    address = addresses[name]
    return address if '://' in address else Path(_get_mmengine_home(), address)


def load_from_file(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Return the checkpoint of a file, a URL, or a name in one of mmengine's lists.

    UserError if there is no such source, or its file cannot be read.
    """
    source = _resolve(filename)
    checkpoint = read_checkpoint(fetch(source) if isinstance(source, str) else source, map_location)
    if filename.startswith('mmcls://'):  # classifiers, of which mmengine takes the backbone
        return _process_mmcls_checkpoint(checkpoint)
    return checkpoint


def load_from_timm(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Return timm's pretrained weights for ``timm://NAME``.

    They come from the folder that ``MMDENSE_WEIGHTS`` names (NAME.safetensors, .pth or .bin, or the
    hub's files in a folder NAME), or else from the Hugging Face hub: its cache, or the network
    unless ``HF_HUB_OFFLINE=1``. timm checks that they fill its own network completely. The
    classifier is left out of networks that mmdense has no format for. UserError if
    timm has no such weights, none of these has them, or they don't fit.
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
    if recognise(net.state_dict()) is None:  # else the format maps a classifier, or drops it
        net.reset_classifier(0)
    return dict(state_dict={k: v.to(map_location or 'cpu') for k, v in net.state_dict().items()})


def _published_by_timm(name: str) -> tuple[Any, Path | None]:
    """Return timm's record of its weights, and their file if the user's folder has it."""
    try:
        published = timm.models.get_pretrained_cfg(name)
    except RuntimeError:  # a network that timm knows, with a tag that it doesn't
        published = None
    if published is None or not published.has_weights:
        raise _unknown('timm', name, timm.list_pretrained())
    tagged = f'{published.architecture}.{published.tag}' if published.tag else name
    file = _in_folder(
        *(base + suffix for base in (name, tagged) for suffix in SUFFIXES),
        *(f'{tagged}/{hub_file}' for hub_file in HUB_FILES),
    )
    return published, file


def load_from_condensenetv2(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Return the weights of a released CondenseNetV2 in a local file, ``condensenetv2://PATH``.

    If PATH doesn't exist, the file of that name in the ``MMDENSE_WEIGHTS`` folder is read. Models
    that were converted (A, B, C) are for ``form='condensed'``, trained ones (C) for ``'learned'``.
    UserError if there is no such file, or it holds no released CondenseNetV2.
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


# Prefix of a file name -> loader, for mmengine's CheckpointLoader. Its own loaders may unpickle
# anything: the maintained distribution falls back to it, the original one does before torch 2.6.
SCHEMES = {
    **dict.fromkeys(('', 'http://', 'https://', *(f'{s}://' for s in LISTS)), load_from_file),
    'timm://': load_from_timm,
    'condensenetv2://': load_from_condensenetv2,
}
