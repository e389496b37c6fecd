"""What to do when memory runs out, said in one line."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from mmengine.config import Config
from mmengine.registry import MODELS

from mmdense.errors import UserError, one_line

__all__ = ['explain_out_of_memory']

# What torch's allocator for CPUs, CUDA's libraries and CUDA itself say in a plain RuntimeError.
SIGNS = ('DefaultCPUAllocator', 'STATUS_ALLOC_FAILED', 'CUDA error: out of memory')


@contextmanager
def explain_out_of_memory(cfg: Config, loader: str) -> Iterator[None]:
    """Turn running out of memory, of a GPU or a CPU, into a line that says how to need less.

    Args:
        cfg: What runs inside.
        loader: Whose batches it takes: of 'train' or 'test'.

    Raises:
        UserError: In place of the error.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise UserError(_advice(cfg, loader, error)) from error


def _is_out_of_memory(error: Exception) -> bool:
    known = isinstance(error, MemoryError | torch.cuda.OutOfMemoryError)
    return known or any(sign in str(error) for sign in SIGNS)


def _advice(cfg: Config, loader: str, error: Exception) -> str:
    batch = (cfg.get(f'{loader}_dataloader') or {}).get('batch_size', 1)
    said = f'out of memory with {loader}_dataloader.batch_size={batch}'
    ways = []
    if loader == 'train':
        if size := _training_size(cfg):
            said += f' and images of up to {size[0]} x {size[1]}'
        if mode := _thriftier(cfg):
            ways.append(f'--cfg-options model.backbone.memory={mode}')
        if batch > 1:
            ways.append(f'train_dataloader.batch_size={batch // 2} with --auto-scale-lr')
        if cfg.optim_wrapper.get('type', 'OptimWrapper') == 'OptimWrapper':
            ways.append('--amp-dtype bfloat16')
        if 'backbone' in cfg.model:
            ways.append(f'what `python tools/plan_memory.py {cfg.filename}` says would fit')
    elif batch > 1:
        ways.append(f'--cfg-options test_dataloader.batch_size={batch // 2}')
    ways.append('smaller images')
    return f'{said}. Try {", then ".join(ways)}. ({one_line(error)})'


def _training_size(cfg: Config) -> tuple[int, int] | None:
    from mmdense.config.image_size import training_size

    try:
        return training_size(cfg)
    except UserError:
        return None


def _thriftier(cfg: Config) -> str | None:
    """Return the memory mode of the config's backbone that needs less than its own."""
    backbone = cfg.model.get('backbone') or {}
    with MODELS.switch_scope_and_registry(cfg.get('default_scope')) as registry:
        kind = registry.get(backbone['type']) if 'type' in backbone else None
    modes = getattr(kind, 'memory_modes', ())
    own = 'recompute' if backbone.get('with_cp') else backbone.get('memory', 'plain')
    return next(iter(modes[modes.index(own) + 1 :]), None) if own in modes else None
