"""Where weights can come from, and what a checkpoint may hold."""

from __future__ import annotations

import argparse
import difflib
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader

from mmdense.errors import UserError
from mmdense.weights import from_condensenetv2

__all__ = ['allow_training_state', 'load_from_condensenetv2', 'load_from_timm']

CONDENSENETV2 = 'https://github.com/jianghaojun/CondenseNetV2#results'


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
        raise TypeError(f'a checkpoint asks for {name!r} of {owner!r}')
    return getattr(owner, name)


if tuple(map(int, torch.__version__.split('.')[:2])) >= (2, 6):
    allow_training_state()


@CheckpointLoader.register_scheme(prefixes='timm://')
def load_from_timm(filename: str, map_location: str | None = None) -> dict:
    """Return timm's pretrained weights for ``timm://NAME``, without the classifier.

    They come through the Hugging Face hub, from its cache if they are there.

    Args:
        filename: Such as ``timm://rdnet_tiny.nv_in1k``.
        map_location: Device that the tensors go to; the CPU by default.

    Raises:
        UserError: timm has no such weights, or they can be had neither from the cache nor from
            the network.
    """
    name = filename.removeprefix('timm://')
    try:
        published = timm.models.get_pretrained_cfg(name)
    except RuntimeError:  # a network that timm knows, with a tag that it doesn't
        published = None
    if published is None:
        close = difflib.get_close_matches(name, timm.list_pretrained(), n=1)
        hint = f'; did you mean timm://{close[0]}?' if close else ''
        raise UserError(f'timm has no weights named {name}{hint}')
    try:
        net = timm.create_model(name, pretrained=True, num_classes=0)
    except Exception as error:  # the hub's client, the network and timm each raise their own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip('.')
        raise UserError(
            f'no weights from {filename} (model.safetensors of {published.hf_hub_id} on the '
            f'Hugging Face hub): {reason}. Copy the hub cache of a machine with network, or train '
            'from scratch with model.backbone.init_cfg=None'
        ) from error
    weights = {k: v for k, v in net.state_dict().items() if not k.startswith('head.')}
    return dict(state_dict={k: v.to(map_location or 'cpu') for k, v in weights.items()})


@CheckpointLoader.register_scheme(prefixes='condensenetv2://')
def load_from_condensenetv2(filename: str, map_location: str | None = None) -> dict:
    """Return the weights of a released CondenseNetV2 in a local file, ``condensenetv2://PATH``.

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
    file = Path(filename.removeprefix('condensenetv2://')).expanduser()
    if not file.is_file():
        raise UserError(
            f'no file {file}: download the model that is linked in {CONDENSENETV2} to there, or '
            'train from scratch with model.backbone.init_cfg=None'
        )
    try:
        checkpoint = _load_released(file, map_location or 'cpu')
    except Exception as error:  # torch, zipfile and the unpickler each raise their own
        raise UserError(
            f'{file} cannot be read safely: {_reason(error)}. Download the model again from '
            f'{CONDENSENETV2}, or train from scratch with model.backbone.init_cfg=None'
        ) from error
    try:
        return dict(state_dict=from_condensenetv2(checkpoint))
    except ValueError as error:
        raise UserError(f'{file} is no model of {CONDENSENETV2}: {error}') from error


def _load_released(file: Path, map_location: str) -> Any:
    """Load a file that may hold its script's arguments: allowed here, and not from then on."""
    allowed = torch.serialization.get_safe_globals()
    torch.serialization.add_safe_globals([argparse.Namespace])
    try:
        return torch.load(file, map_location=map_location, weights_only=True)
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(allowed)


def _reason(error: Exception) -> str:
    """Return an error in one line; of those of the safe unpickler, the one that says what it met.

    Its first one advises to load unsafely.
    """
    lines = [*str(error).strip().splitlines(), '']
    lines.sort(key=lambda line: 'unsupported' not in line.lower())
    return f'{type(error).__name__}: {lines[0].partition(". ")[0]}'.rstrip(': .')
