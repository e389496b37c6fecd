"""Where weights can come from, and what a checkpoint may hold."""

from __future__ import annotations

import difflib
from typing import Any

import numpy as np
import timm
import torch
from mmengine.logging import HistoryBuffer
from mmengine.runner import CheckpointLoader

from mmdense.errors import UserError

__all__ = ['allow_training_state', 'load_from_timm']


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
