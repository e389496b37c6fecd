"""Advice in one line when memory runs out."""

from collections.abc import Iterator
from contextlib import contextmanager, suppress

import torch
from mmengine.config import Config
from mmengine.registry import MODELS

from mmdense.config.image_size import training_size
from mmdense.config.parts import find
from mmdense.errors import UserError, one_line

# In the plain RuntimeErrors of torch's CPU allocator, of CUDA's libraries and of CUDA.
SIGNS = ('DefaultCPUAllocator', 'STATUS_ALLOC_FAILED', 'CUDA error: out of memory')


@contextmanager
def explain_out_of_memory(cfg: Config, loader: str) -> Iterator[None]:
    """Replace the error of a full GPU or CPU memory by a UserError that says how to need less.

    ``loader`` is the one that is read inside: 'train' or 'test'.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, MemoryError | torch.cuda.OutOfMemoryError)
        if not known and not any(sign in str(error) for sign in SIGNS):
            raise
        raise UserError(_advice(cfg, loader, error)) from error


def _advice(cfg: Config, loader: str, error: Exception) -> str:
    batch = (cfg.get(f'{loader}_dataloader') or {}).get('batch_size', 1)
    fault = f'out of memory with {loader}_dataloader.batch_size={batch}'
    ways = []
    if loader == 'train':
        with suppress(UserError):  # the config does not state it
            fault += ' and images of up to {} x {}'.format(*training_size(cfg))
        if mode := _leaner_mode(cfg):
            ways.append(f'--cfg-options model.backbone.memory={mode}')
        if batch > 1:
            ways.append(f'train_dataloader.batch_size={batch // 2} with --auto-scale-lr')
        if cfg.optim_wrapper.get('type', 'OptimWrapper') == 'OptimWrapper':
            ways.append('--amp-dtype bfloat16')
        if 'backbone' in cfg.model:
            ways.append(f'what `python tools/plan_memory.py {cfg.filename}` recommends')
    elif batch > 1:
        ways.append(f'--cfg-options test_dataloader.batch_size={batch // 2}')
    ways.append('smaller images')
    return f'{fault}. Try {", then ".join(ways)}. ({one_line(error)})'


def _leaner_mode(cfg: Config) -> str | None:
    """Return the next leaner memory mode of the config's backbone."""
    backbone = cfg.model.get('backbone') or {}
    kind = find(backbone.get('type'), [MODELS], cfg.get('default_scope'))
    modes = getattr(kind, 'memory_modes', ())
    mode = 'recompute' if backbone.get('with_cp') else backbone.get('memory', 'plain')
    return next(iter(modes[modes.index(mode) + 1 :]), None) if mode in modes else None
