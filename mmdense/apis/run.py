"""A runner that can start, or one line that says why not."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.dist import is_main_process
from mmengine.hooks import EMAHook
from mmengine.logging import print_log
from mmengine.registry import HOOKS, RUNNERS
from mmengine.runner import Runner
from torch import nn

from mmdense.apis.config import drop_amp
from mmdense.config import readers
from mmdense.engine.coverage import CoverageHook, unwrap
from mmdense.errors import UserError

__all__ = ['build_runner', 'load_weights', 'unwrap']


def build_runner(cfg: Config, *, loaders: tuple[str, ...], min_coverage: float = 1.0) -> Runner:
    """Build the runner after checking what usually goes wrong.

    Args:
        cfg: As :func:`.load_config` returns it. Changed where the machine asks for it: without a
            GPU, mixed precision becomes plain precision, with one warning, the processes of
            launcher 'pytorch' talk through gloo, and batch norm is not synchronised among them.
        loaders: Which loaders will run: of 'train', 'val' and 'test'.
        min_coverage: Least share of the model's tensors, from 0 to 1, that a checkpoint must hold:
            of the backbone's, where training starts from it (``load_from``).

    Raises:
        UserError: A file of a data set is missing, or channels don't fit.
    """
    _check_data(cfg, loaders)
    if not torch.cuda.is_available():
        if cfg.get('launcher') == 'pytorch':
            _distribute_on_cpu(cfg)
        if 'train' in loaders:
            drop_amp(cfg)
    if 'train' not in loaders:  # the average is what a checkpoint calls the model's weights
        hooks = cfg.get('custom_hooks') or []
        cfg.custom_hooks = [hook for hook in hooks if not _averages(hook)]
    runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    part = 'backbone' if 'train' in loaders else ''
    runner.register_hook(CoverageHook(min_coverage, part))
    model = cfg.model
    _check_channels(unwrap(runner.model), model.get('module', model))
    return runner


def _averages(hook: Any) -> bool:
    kind = HOOKS.get(hook['type']) if isinstance(hook, dict) else type(hook)
    return isinstance(kind, type) and issubclass(kind, EMAHook)


def _distribute_on_cpu(cfg: Config) -> None:
    """Start the process group and wrap the model: mmengine takes a GPU for given in both."""
    torch.distributed.init_process_group('gloo')
    wrapper = dict(
        type='MMDistributedDataParallel',
        broadcast_buffers=False,
        find_unused_parameters=cfg.get('find_unused_parameters', False),
        device_ids=None,
    )
    cfg.setdefault('model_wrapper_cfg', wrapper)
    # In the config: DDP refuses a model with SyncBN, so a built one comes too late.
    synchronised = [_plain_batch_norm(cfg.model), cfg.pop('sync_bn', None)]
    if any(synchronised) and is_main_process():
        print_log(
            'no GPU: each process has its own batch norm statistics in place of SyncBN',
            logger='current',
            level=logging.WARNING,
        )


def _plain_batch_norm(node: Any) -> bool:
    """Replace SyncBN, which needs a GPU, by BN; return whether there was one."""
    if isinstance(node, dict):
        found = node.get('type') == 'SyncBN'
        if found:
            node['type'] = 'BN'
        return any([found, *map(_plain_batch_norm, node.values())])
    return isinstance(node, list) and any([*map(_plain_batch_norm, node)])


def _data_sets(node: Any, where: str) -> Iterator[tuple[str, ConfigDict]]:
    """Yield every data set config below ``node`` that reads files, with its place."""
    if isinstance(node, dict):
        if node.get('ann_file') or node.get('data_prefix'):
            yield where, node
        for key in ('dataset', 'datasets'):
            if key in node:
                yield from _data_sets(node[key], f'{where}.{key}')
    elif isinstance(node, list):
        for i, child in enumerate(node):
            yield from _data_sets(child, f'{where}[{i}]')


def _check_data(cfg: Config, loaders: tuple[str, ...]) -> None:
    for loader in loaders:
        place = f'{loader}_dataloader'
        for where, data in _data_sets(cfg.get(place), place):
            root = data.get('data_root') or ''
            prefixes = [p for p in (data.get('data_prefix') or {}).values() if isinstance(p, str)]
            for name in [data.get('ann_file'), *prefixes]:
                path = Path(root, name or '')
                if '://' in root or '://' in str(name) or path.exists():
                    continue
                raise UserError(
                    f'{path} not found (wanted by {where}): if the data are elsewhere, add '
                    '--cfg-options data_root=FOLDER'
                )


def _check_channels(model: nn.Module, cfg: Mapping[str, Any]) -> None:
    """Compare what the backbone announces with what the config says of those that read it."""
    announced = getattr(getattr(model, 'backbone', None), 'out_channels', None)
    if not isinstance(announced, tuple):  # not a backbone of ours
        return
    for reader in readers(cfg, announced):
        if not reader.fits:
            raise UserError(
                f'{reader.name} expects {reader.node[reader.key]} channels, but the backbone gives '
                f"{reader.channels}: set model.{reader.name}.{reader.key}='auto'"
            )


def load_weights(runner: Runner, path: str) -> dict:
    """Load a trained model's weights into the runner's model, and return the checkpoint.

    Args:
        runner: As :func:`build_runner` returns it.
        path: A checkpoint file, or any address that weights can be loaded from.

    Raises:
        UserError: The file is missing, is no checkpoint, or doesn't fill the model.
    """
    if '://' not in path and not Path(path).exists():
        raise UserError(f'no checkpoint {path}')
    try:
        return runner.load_checkpoint(path)
    except UserError as error:
        raise UserError(str(error) if path in str(error) else f'{path}: {error}') from error
