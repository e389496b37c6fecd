"""Building a runner that can start, or one line that says why it cannot."""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mmengine.runner
import torch
from mmengine.config import Config, ConfigDict
from mmengine.dist import is_distributed
from mmengine.hooks import CheckpointHook, EMAHook
from mmengine.registry import HOOKS, LOOPS, RUNNERS
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop
from torch import nn

from mmdense.config import validate
from mmdense.config.edit import drop_amp, fit_to_machine
from mmdense.config.evaluators import check_metric_files
from mmdense.config.parts import check_parts, dicts, find
from mmdense.datasets.files import check_data
from mmdense.engine.bad_samples import naming
from mmdense.engine.hooks import LoadReportHook, unwrap
from mmdense.errors import UserError, one_line, suggest_file, warn
from mmdense.files import check_writable, wrap_disk_errors

FSDP = 'FSDPStrategy'
# mmengine's class -> mmdense's, with the same arguments.
RESUMABLE = {
    CheckpointHook: 'mmdense.CheckpointHook',
    EpochBasedTrainLoop: 'mmdense.EpochBasedTrainLoop',
    IterBasedTrainLoop: 'mmdense.IterBasedTrainLoop',
}


def build_runner(
    cfg: Config, *, loaders: Sequence[str], min_loaded: float = 1.0
) -> mmengine.runner.Runner:
    """Check a config of :func:`.load_config`, change it in place, and build the runner.

    ``loaders`` are those that will run, of 'train', 'val' and 'test'. A checkpoint must fill the
    share ``min_loaded`` of the model's tensors, or of the backbone's if training starts from it
    (``load_from``). For training, mmengine's loops and checkpoint hook are replaced by mmdense's,
    which resume a killed run exactly. Without a GPU, float16 becomes float32, processes communicate
    through gloo, and SyncBN becomes BN, each with one warning.

    UserError if a file of data or metrics is missing, of other data or has an error that
    :func:`.check_data` finds, a part of the config is misspelt, channels, classes or ignored labels
    differ, FSDP is used with an option that it breaks, or the work dir cannot be written.
    """
    validate.check_data_files(cfg, loaders)
    check_metric_files(cfg, loaders)
    check_writable(Path(cfg.work_dir, 'last_checkpoint'))
    training = 'train' in loaders
    replaced = _make_resumable(cfg) if training else []
    if training:
        _check_fsdp(cfg)
    check_parts(cfg)
    validate.check_loops(cfg, loaders)
    fit_to_machine(cfg, loaders)
    check_data(cfg, loaders)
    if not torch.cuda.is_available():
        if cfg.get('launcher') == 'pytorch':
            _distribute_on_cpu(cfg)
        if training:
            drop_amp(cfg)
    if not training:  # a checkpoint's weights are the moving average already
        hooks = cfg.get('custom_hooks') or []
        cfg.custom_hooks = [hook for hook in hooks if not _is_ema(hook, cfg.get('default_scope'))]
    with wrap_disk_errors(cfg.work_dir):
        runner = naming(RUNNERS.get(cfg.get('runner_type', 'Runner'))).from_cfg(cfg)
    _warn_once_if_log_fails(runner.logger)
    if replaced:
        runner.logger.info(f"{', '.join(replaced)}: in place of mmengine's, to resume exactly")
    runner.register_hook(LoadReportHook(min_loaded, 'backbone' if training else ''))
    model = unwrap(runner.model)
    if isinstance(model, nn.Module):  # FlexibleRunner builds it when it starts
        validate.check_channels(model, cfg.model.get('module', cfg.model))
        validate.check_neck(model)
        validate.check_classes(model, cfg, loaders)
    return runner


def _make_resumable(cfg: Config) -> list[str]:
    """Replace mmengine's loops and checkpoint hooks in a config; return the new types."""
    loop = cfg.train_cfg
    if 'by_epoch' in loop:  # mmengine's short form
        loop['type'] = f'{"Epoch" if loop.pop("by_epoch") else "Iter"}BasedTrainLoop'
    hooks = cfg.setdefault('default_hooks', ConfigDict())
    saved = dict(interval=1)  # mmengine's default
    if 'max_iters' in loop:
        saved = dict(by_epoch=False, interval=loop.get('val_interval', 1000))
    hooks.setdefault('checkpoint', dict(type='CheckpointHook', **saved))
    replaced = []
    for part in (loop, *hooks.values(), *(cfg.get('custom_hooks') or [])):
        if isinstance(part, dict) and 'type' in part:
            kind = find(part['type'], [LOOPS, HOOKS], cfg.get('default_scope'))
            if kind in RESUMABLE:
                part['type'] = RESUMABLE[kind]
                replaced.append(part['type'])
    return replaced


def _is_ema(hook: Any, scope: str | None) -> bool:
    kind = find(hook['type'], [HOOKS], scope) if isinstance(hook, dict) else type(hook)
    return isinstance(kind, type) and issubclass(kind, EMAHook)


def _warn_once_if_log_fails(logger: logging.Logger) -> None:
    """Replace the traceback that logging prints for each line it cannot write by one warning."""

    def disable(handler: logging.FileHandler) -> None:
        reason = one_line(sys.exc_info()[1])
        handler.setLevel(logging.CRITICAL + 1)
        logger.warning(f'cannot write {handler.baseFilename} ({reason}): logging to it stops')

    for handler in logger.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.handleError = lambda record, handler=handler: disable(handler)


def _distribute_on_cpu(cfg: Config) -> None:
    """Start the process group and wrap the model, for both of which mmengine needs a GPU."""
    if not is_distributed():
        torch.distributed.init_process_group('gloo')
    strategy = cfg.get('strategy') or {}
    if strategy.get('type') == FSDP:
        wrapper = dict(type='MMFullyShardedDataParallel', device_id='cpu')
        strategy.model_wrapper = wrapper | (strategy.get('model_wrapper') or {})
    wrapper = dict(
        type='MMDistributedDataParallel',
        broadcast_buffers=False,
        find_unused_parameters=cfg.get('find_unused_parameters', False),
        device_ids=None,
    )
    cfg.setdefault('model_wrapper_cfg', wrapper)
    # In the config, because DDP refuses a model with SyncBN, which needs a GPU.
    synchronized = [node for node in dicts(cfg.model) if node.get('type') == 'SyncBN']
    for node in synchronized:
        node['type'] = 'BN'
    if any([synchronized, cfg.pop('sync_bn', None)]):
        warn('no GPU: each process has its own batch norm statistics in place of SyncBN')


def _check_fsdp(cfg: Config) -> None:
    """Refuse what FSDP breaks silently: a process sees flat shards of the parameters."""
    if (cfg.get('strategy') or {}).get('type') != FSDP:
        return
    wrapper = cfg.get('optim_wrapper') or {}
    for key, reason in (
        ('clip_grad', 'each process would clip by the norm of its own shard of the gradients'),
        ('paramwise_cfg', 'parameters are flat, without the shapes that rates depend on'),
    ):
        if wrapper.get(key):
            raise UserError(f'{FSDP}: {reason}: add --cfg-options optim_wrapper.{key}=None')


def load_weights(runner: mmengine.runner.Runner, path: str) -> dict:
    """Load a trained model's weights into the runner's model, and return the checkpoint.

    ``path`` is a file or any address that weights can be loaded from; UserError if it does not
    exist, is not a checkpoint, or does not fill the model.
    """
    if '://' not in path and not Path(path).exists():
        raise UserError(f'no checkpoint {path}{suggest_file(path, "*.pth")}')
    try:
        return runner.load_checkpoint(path)
    except UserError as error:
        raise UserError(str(error) if path in str(error) else f'{path}: {error}') from error
