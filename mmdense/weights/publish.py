"""From a training checkpoint to a file of the weights alone, named by its content."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.hub import HASH_REGEX

from mmdense.errors import UserError
from mmdense.files import sha256_of
from mmdense.weights.files import read_checkpoint, write_checkpoint

__all__ = ['Published', 'publish']

DIGITS = 8  # of the checksum
PREFIX = 'module.'  # of weights in mmengine's ema_state_dict


@dataclass(frozen=True)
class Published:
    """What was published.

    Attributes:
        file: The file, with the checksum in its name.
        existed: Whether it was there already, with the same content.
        before: Size of the checkpoint, in bytes.
        after: Size of the file, in bytes.
        tensors: Number of tensors in it.
        left_out: Entries of the checkpoint that are not in it.
        weights: The moving average, the weights as they were trained, or, of a checkpoint with no
            average beside them, the only ones.
        halves: Number of tensors that are float16.
        overflowing: Names of the tensors that are not, as float16 cannot hold their values.
    """

    file: Path
    existed: bool
    before: int
    after: int
    tensors: int
    left_out: tuple[str, ...]
    weights: Literal['average', 'trained', 'only']
    halves: int
    overflowing: tuple[str, ...]


def publish(
    source: str | Path, target: str | Path, *, averaged: bool = True, half: bool = False
) -> Published:
    """Write the weights and the ``meta`` of a checkpoint, and nothing else of it, to a file.

    The first 8 hex digits of the SHA-256 of its content go into the file's name, where torch.hub
    and mmdense look for them: ``model.pth`` becomes ``model-1a2b3c4d.pth``. The same weights and
    ``meta`` give the same file.

    Args:
        source: Checkpoint, or a bare state dict, that :func:`.read_checkpoint` reads.
        target: NAME.pth, or NAME.safetensors, in a folder that is there.
        averaged: Of a run with mmengine's EMAHook take the average; else the trained weights.
        half: Store tensors of two and more dimensions as float16. Vectors, scalars and integers
            stay as they are, and so do tensors with a value that float16 cannot hold.

    Returns:
        What was published.

    Raises:
        UserError: A source that cannot be read or holds no weights, no average to leave out or
            one that is not of EMAHook, a target of another suffix, or one that cannot be written.
    """
    source, target = Path(source).expanduser(), Path(target).expanduser()
    _check_target(target)
    held = read_checkpoint(source)
    weights, meta, left_out = _split(held, source)
    kind: Literal['average', 'trained', 'only'] = 'only'
    if 'ema_state_dict' in left_out:
        kind = 'average' if averaged else 'trained'
        trained = _trained(weights, held['ema_state_dict'], source)
        weights = weights if averaged else trained
    elif not averaged:
        raise UserError(f'{source} holds no average to leave out: publish it without --no-ema')
    overflowing: tuple[str, ...] = ()
    if half:
        weights, overflowing = _halve(weights)
    file, existed = _write(target, weights, meta)
    return Published(
        file=file,
        existed=existed,
        before=source.stat().st_size,
        after=file.stat().st_size,
        tensors=len(weights),
        left_out=left_out,
        weights=kind,
        halves=sum(v.dtype == torch.float16 for v in weights.values()),
        overflowing=overflowing,
    )


def _check_target(target: Path) -> None:
    if target.suffix not in ('.pth', '.safetensors'):
        raise UserError(f'{target} must end in .pth or .safetensors')
    if not target.parent.is_dir():
        raise UserError(f'no folder {target.parent} to write {target.name} to')
    digits = '0' * DIGITS
    found = HASH_REGEX.search(_named(target, digits).name)
    if found[1] != digits:  # it takes the first match in the name
        raise UserError(
            f"torch.hub would take '{found[1]}' in {target.name} for its checksum: choose a name "
            f'without {found[0]}'
        )


def _named(target: Path, digits: str) -> Path:
    return target.with_name(f'{target.stem}-{digits}{target.suffix}')


def _split(
    held: dict[str, Any], source: Path
) -> tuple[Mapping[str, Tensor], dict[str, Any], tuple[str, ...]]:
    """Return weights and ``meta`` to publish, and the names of what else there is."""
    bare = 'state_dict' not in held
    weights = held if bare else held['state_dict']
    if not isinstance(weights, Mapping) or not weights:
        raise UserError(f'{source} holds no weights')
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            raise UserError(
                f'{source} holds no state_dict that can be published: {name} in it is no tensor '
                f'({type(value).__name__})'
            )
    if bare:
        return weights, {}, ()
    meta = held.get('meta')
    meta = dict(meta) if isinstance(meta, Mapping) else {}
    left_out = [name for name in held if name not in ('state_dict', 'meta')]
    if 'hook_msgs' in meta:
        del meta['hook_msgs']
        left_out.append('meta.hook_msgs')
    return weights, meta, tuple(left_out)


def _trained(
    weights: Mapping[str, Tensor], other: Mapping[str, Tensor], source: Path
) -> dict[str, Tensor]:
    """Undo EMAHook's exchange of the average's tensors, buffers too, with the model's.

    What the average lacks was not exchanged: there ``state_dict`` holds the trained tensor.
    """
    if not isinstance(other, Mapping) or not any(
        isinstance(other.get(PREFIX + name), Tensor) for name in weights
    ):
        raise UserError(
            f"{source} holds an ema_state_dict that is not of mmengine's EMAHook, so which weights "
            'are the average is not known: save those that you want alone, and publish that file'
        )
    return {name: other.get(PREFIX + name, value) for name, value in weights.items()}


def _halve(weights: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    halved, overflowing = dict(weights), []
    for name, value in weights.items():
        if value.ndim < 2 or not value.is_floating_point():
            continue
        small = value.half()
        if (small.isinf() & value.isfinite()).any():
            overflowing.append(name)
        else:
            halved[name] = small
    return halved, tuple(overflowing)


def _write(target: Path, weights: Mapping[str, Tensor], meta: dict[str, Any]) -> tuple[Path, bool]:
    """Return the file, and whether it was there."""
    try:
        with tempfile.TemporaryDirectory(prefix='.publish-', dir=target.parent) as folder:
            # In a folder of its own, as torch.save writes the file's name into the file: so it is
            # always the same.
            part = Path(folder, f'weights{target.suffix}')
            write_checkpoint(part, weights, meta)
            digest = sha256_of(part)
            file = _named(target, digest[:DIGITS])
            existed = file.exists()
            if existed and (not file.is_file() or sha256_of(file) != digest):
                raise UserError(f'{file} is there already with other content: remove it first')
            if not existed:
                part.rename(file)
            return file, existed
    except UserError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have theirs
        raise UserError(
            f'{target.parent} cannot be written to, or is full ({type(error).__name__}: '
            f'{str(error).partition(chr(10))[0]})'
        ) from error
