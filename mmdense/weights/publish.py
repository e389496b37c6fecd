"""Publishing: from a training checkpoint to a file of the weights alone, named by its content."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmdense.errors import UserError
from mmdense.files import atomic_write, sha256_of
from mmdense.weights.files import check_target, read_checkpoint, serialize


@dataclass(frozen=True)
class Published:
    """A published file."""

    file: Path  # with the checksum in its name
    existed: bool  # already, with the same content
    before: int  # bytes of the checkpoint
    after: int  # bytes of the file
    tensors: int  # in the file
    left_out: tuple[str, ...]  # entries of the checkpoint
    halves: int  # tensors in float16


def publish(source: str | Path, target: str | Path, *, half: bool = False) -> Published:
    """Write the weights and the ``meta`` of a checkpoint, and nothing else of it, to a file.

    The first 8 hex digits of the file's SHA-256 go into its name, where torch.hub and mmdense look
    for them: ``model.pth`` becomes ``model-1a2b3c4d.pth``. The same weights and ``meta`` give the
    same file. Those of a run with mmengine's EMAHook are the average.

    ``half`` stores tensors of two and more dimensions as float16, but for those with a value that
    float16 cannot hold; vectors, scalars and integers keep their type. UserError if the source
    cannot be read or holds no weights, or the target cannot be written.
    """
    source, target = Path(source).expanduser(), check_target(target, new=False)
    weights, meta, left_out = _split(read_checkpoint(source), source)
    if half:
        weights = {name: _halve(value) for name, value in weights.items()}
    content = serialize(target, weights, meta)
    digest = hashlib.sha256(content).hexdigest()
    file = target.with_name(f'{target.stem}-{digest[:8]}{target.suffix}')
    existed = file.exists()
    if not existed:
        atomic_write(file, content)
    elif not file.is_file() or sha256_of(file) != digest:
        raise UserError(f'{file} exists already with other content: remove it first')
    return Published(
        file=file,
        existed=existed,
        before=source.stat().st_size,
        after=file.stat().st_size,
        tensors=len(weights),
        left_out=left_out,
        halves=sum(v.dtype == torch.float16 for v in weights.values()),
    )


def _split(
    checkpoint: dict[str, Any], source: Path
) -> tuple[Mapping[str, Tensor], dict[str, Any], tuple[str, ...]]:
    """Return weights, ``meta``, and the names of everything else."""
    if 'state_dict' not in checkpoint:
        checkpoint = dict(state_dict=checkpoint)
    weights = checkpoint['state_dict']
    if not isinstance(weights, Mapping) or not weights:
        raise UserError(f'{source} holds no weights')
    for name, value in weights.items():
        if not isinstance(value, Tensor):
            raise UserError(
                f'{source} holds no state_dict to publish: {name} in it is not a tensor '
                f'({type(value).__name__})'
            )
    meta = checkpoint.get('meta')
    meta = dict(meta) if isinstance(meta, Mapping) else {}
    left_out = [name for name in checkpoint if name not in ('state_dict', 'meta')]
    if 'hook_msgs' in meta:
        del meta['hook_msgs']
        left_out.append('meta.hook_msgs')
    return weights, meta, tuple(left_out)


def _halve(value: Tensor) -> Tensor:
    """Return a tensor in float16 if it has two dimensions or more, and float16 can hold it."""
    small = value.half() if value.ndim > 1 and value.is_floating_point() else value
    return value if (small.isinf() & value.isfinite()).any() else small
