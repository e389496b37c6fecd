"""A runner that can start, or one line that says why not."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.dist import is_distributed, is_main_process
from mmengine.hooks import CheckpointHook, EMAHook
from mmengine.logging import print_log
from mmengine.registry import HOOKS, LOOPS, RUNNERS, Registry
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from torch import nn

from mmdense.config.edit import drop_amp
from mmdense.config.explain import explained
from mmdense.config.validate import (
    check_channels,
    check_classes,
    check_data,
    check_keys_of,
    check_neck,
)
from mmdense.engine.bad_samples import name_bad_samples
from mmdense.engine.hooks import LoadReportHook, unwrap
from mmdense.errors import UserError, one_line, suggest_file
from mmdense.files import check_writable, wrap_disk_errors

__all__ = ['build_runner', 'load_weights', 'unwrap']

FSDP = 'FSDPStrategy'
# What is trained by instead of mmengine's, with the same arguments.
OURS = {
    CheckpointHook: 'mmdense.CheckpointHook',
    EpochBasedTrainLoop: 'mmdense.EpochBasedTrainLoop',
    IterBasedTrainLoop: 'mmdense.IterBasedTrainLoop',
}


@explained()
def build_runner(cfg: Config, *, loaders: tuple[str, ...], min_loaded: float = 1.0) -> Runner:
    """Build the runner after checking what usually goes wrong.

    Args:
        cfg: As :func:`.load_config` returns it. Changed where the machine asks for it: without a
            GPU, mixed precision becomes plain precision, with one warning, the processes of
            launcher 'pytorch' talk through gloo, and batch norm is not synchronised among them.
            For training, mmengine's loops and hook for checkpoints become those of
            :mod:`mmdense.engine`, which a killed run goes on with exactly.
        loaders: Which loaders will run: of 'train', 'val' and 'test'.
        min_loaded: Least share of the model's tensors, from 0 to 1, that a checkpoint must hold:
            of the backbone's, where training starts from it (``load_from``).

    Raises:
        UserError: A file of a data set is missing, something can't be built from the config,
            channels or numbers of classes don't fit, FSDP with what it can't do, or the work dir
            can't be written to.
    """
    check_data(cfg, loaders)
    check_writable(Path(cfg.work_dir, 'last_checkpoint'))
    if 'train' in loaders:
        _make_resumable(cfg)
        _check_fsdp(cfg)
    if not torch.cuda.is_available():
        if cfg.get('launcher') == 'pytorch':
            _distribute_on_cpu(cfg)
        if 'train' in loaders:
            drop_amp(cfg)
    if 'train' not in loaders:  # the average is what a checkpoint calls the model's weights
        hooks = cfg.get('custom_hooks') or []
        cfg.custom_hooks = [hook for hook in hooks if not _averages(hook)]
    with wrap_disk_errors(cfg.work_dir):
        runner = RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)
    _report_once(runner.logger)
    name_bad_samples(runner)
    part = 'backbone' if 'train' in loaders else ''
    runner.register_hook(LoadReportHook(min_loaded, part))
    built, model = unwrap(runner.model), cfg.model
    if isinstance(built, nn.Module):  # a FlexibleRunner's is built when it starts
        check_channels(built, model.get('module', model))
        check_neck(built)
        check_classes(built, cfg, loaders)
    check_keys_of(cfg, loaders)
    return runner


def _make_resumable(cfg: Config) -> None:
    loop = cfg.train_cfg
    if 'by_epoch' in loop:  # mmengine's short form, in place of a type
        loop['type'] = f'{"Epoch" if loop.pop("by_epoch") else "Iter"}BasedTrainLoop'
    _take_ours(loop, LOOPS)
    hooks = cfg.setdefault('default_hooks', ConfigDict())
    hooks.setdefault('checkpoint', dict(type='CheckpointHook', interval=1))  # mmengine's default
    for hook in (*hooks.values(), *(cfg.get('custom_hooks') or [])):
        _take_ours(hook, HOOKS)


def _take_ours(node: Any, registry: Registry) -> None:
    if isinstance(node, dict) and 'type' in node:
        kind = node['type']
        node['type'] = OURS.get(registry.get(kind) if isinstance(kind, str) else kind, kind)


def _report_once(logger: logging.Logger) -> None:
    """Say once that a log file takes no more; logging would print a traceback for each line."""
    for handler in logger.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handleError = _Lost(logger, handler)


class _Lost:
    def __init__(self, logger: logging.Logger, handler: logging.FileHandler) -> None:
        self.logger = logger
        self.handler = handler

    def __call__(self, record: logging.LogRecord) -> None:
        why = one_line(sys.exc_info()[1])
        self.handler.setLevel(logging.CRITICAL + 1)  # taken off, it would confuse who calls it
        self.logger.warning(
            f'cannot write {self.handler.baseFilename} ({why}): the log goes on without it'
        )


def _averages(hook: Any) -> bool:
    kind = HOOKS.get(hook['type']) if isinstance(hook, dict) else type(hook)
    return isinstance(kind, type) and issubclass(kind, EMAHook)


def _distribute_on_cpu(cfg: Config) -> None:
    """Start the process group and wrap the model: mmengine takes a GPU for given in both."""
    if not is_distributed():
        torch.distributed.init_process_group('gloo')
    strategy = cfg.get('strategy') or {}
    if strategy.get('type') == FSDP:
        own = strategy.get('model_wrapper') or {}
        strategy.model_wrapper = dict(type='MMFullyShardedDataParallel', device_id='cpu') | own
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


def _check_fsdp(cfg: Config) -> None:
    """Refuse what is wrong under FSDP without a word: a process sees flat shares of parameters."""
    if (cfg.get('strategy') or {}).get('type') != FSDP:
        return
    wrapper = cfg.get('optim_wrapper') or {}
    for key, why in (
        ('clip_grad', 'each process would clip by the norm of its own share of the gradients'),
        ('paramwise_cfg', 'nothing can be told from the dimensions of parameters'),
    ):
        if wrapper.get(key):
            raise UserError(f'{FSDP}: {why}: add --cfg-options optim_wrapper.{key}=None')


def _plain_batch_norm(node: Any) -> bool:
    """Replace SyncBN, which needs a GPU, by BN; return whether there was one."""
    if isinstance(node, dict):
        found = node.get('type') == 'SyncBN'
        if found:
            node['type'] = 'BN'
        return any([found, *map(_plain_batch_norm, node.values())])
    return isinstance(node, list) and any([*map(_plain_batch_norm, node)])


def load_weights(runner: Runner, path: str) -> dict:
    """Load a trained model's weights into the runner's model, and return the checkpoint.

    Args:
        runner: As :func:`build_runner` returns it.
        path: A checkpoint file, or any address that weights can be loaded from.

    Raises:
        UserError: The file is missing, is no checkpoint, or doesn't fill the model.
    """
    if '://' not in path and not Path(path).exists():
        raise UserError(f'no checkpoint {path}{suggest_file(path, "*.pth")}')
    try:
        return runner.load_checkpoint(path)
    except UserError as error:
        raise UserError(str(error) if path in str(error) else f'{path}: {error}') from error
