"""Converting weights of other projects to files with mmdense's keys."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import CheckpointLoader

import mmdense
from mmdense.errors import UserError
from mmdense.files import sha256_of
from mmdense.weights.files import check_target, read_checkpoint, write_checkpoint
from mmdense.weights.formats import FORMATS, LINEAR, recognise, state_dict_of
from mmdense.weights.loading import LoadReport, load_into
from mmdense.weights.sources import fetch


@dataclass(frozen=True)
class Conversion:
    """A converted file."""

    format: str  # of the source; 'mmdense' if the keys were mmdense's already
    tensors: int  # number of tensors in the file
    dropped: tuple[str, ...]  # the source's keys that were left out
    report: LoadReport | None  # of the config's model or backbone, if there was a config


def convert_weights(
    source: str,
    target: str | Path,
    *,
    format: str | None = None,
    prefix: str | None = None,
    config: Config | None = None,
) -> Conversion:
    """Write weights of any known format with mmdense's keys.

    The source's ``meta`` is kept. ``meta['mmdense']`` records the source, its SHA-256 (of the file,
    or of the tensors if there is no file), the format and the version of mmdense. UserError if the
    source cannot be read or is of no known format, the format lacks some of its keys, or it doesn't
    fill the config's model; nothing is written then.

    Args:
        source: A file, a URL, or a scheme such as ``timm://NAME``.
        target: New file, .pth or .safetensors.
        format: One of ``mmdense.weights.formats.FORMATS``; recognised by default.
        prefix: Take the source's keys with this prefix, without it.
        config: Of a model that the weights must fill, or whose backbone they must fill. Without one
            a classifier's last layers are left out.
    """
    check_target(target)  # before the work
    checkpoint, digest = _read(source)
    try:
        weights = state_dict_of(checkpoint)
        if prefix:
            prefix = prefix.rstrip('.') + '.'
            keys = list(weights)
            weights = {k.removeprefix(prefix): weights[k] for k in keys if k.startswith(prefix)}
            if not weights:
                raise ValueError(f'no key begins with {prefix} (there are {keys[:3]})')
        known = recognise(weights, format)
        if known is None and config is None:
            raise ValueError(
                f'keys such as {list(weights)[:3]} are of no known format; name one of '
                f"{list(FORMATS)} by --from, or, if they are mmdense's, the model by --config"
            )
        dropped, model = [], None
        if config is not None:
            init_default_scope(config.get('default_scope', 'mmdet'))
            model = MODELS.build(config.model)
        if known:
            complete = model is not None and LINEAR in model.state_dict()
            mapped = known.map(weights, strict=True, complete=complete)
            weights, dropped = mapped.weights, mapped.dropped
        if not weights:
            raise ValueError(f'nothing is left without {dropped}')
    except ValueError as error:
        raise UserError(f'{source}: {error}') from error
    report = None
    if model is not None:
        complete = any(name.startswith('backbone.') for name in weights)
        _, report = load_into(model if complete else model.backbone, weights)
        report.require(1.0, source=source)
    record = dict(
        source=source if '://' in source else Path(source).name,
        sha256=digest,
        map=known.name if known else 'mmdense',
        version=mmdense.__version__,
    )
    meta = checkpoint.get('meta')  # of a trained model: its classes
    meta = meta if isinstance(meta, Mapping) else {}
    write_checkpoint(target, weights, {**meta, 'mmdense': record})
    return Conversion(record['map'], len(weights), tuple(dropped), report)


def _read(source: str) -> tuple[dict[str, Any], str]:
    """Return a source's content and its SHA-256."""
    if '://' in source and not source.startswith('http'):
        checkpoint = CheckpointLoader.load_checkpoint(source, 'cpu')
        digest = hashlib.sha256()
        for name, value in sorted(state_dict_of(checkpoint).items()):
            digest.update(f'{name} {value.dtype} {tuple(value.shape)}'.encode())
            digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return checkpoint, digest.hexdigest()
    file = fetch(source) if source.startswith('http') else source
    return read_checkpoint(file), sha256_of(file)
