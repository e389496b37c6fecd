"""Changes that the options of the tools make to a complete config, in place.

All raise UserError if the config does not have what they change.
"""

import math
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path

import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import HOOKS

from mmdense.config.evaluators import iter_metrics
from mmdense.config.parts import LIBRARIES, find
from mmdense.datasets.files import iter_dataset_configs
from mmdense.errors import UserError, warn

AMP = 'AmpOptimWrapper'
BFLOAT16 = 'mmdense.BFloat16OptimWrapper'
WORKER_OPTIONS = ('multiprocessing_context', 'persistent_workers', 'prefetch_factor', 'timeout')


def use_amp(cfg: Config, dtype: str | None = None) -> None:
    """Train in mixed precision.

    ``dtype`` is 'bfloat16', which a CPU supports too; 'float16', with the config's loss scale or a
    dynamic one; None for the config's type, or float16 if it trains in float32.
    """
    wrapper = cfg.optim_wrapper
    kind = wrapper.get('type', 'OptimWrapper')
    if kind not in ('OptimWrapper', AMP, BFLOAT16):
        raise UserError(f'--amp cannot replace the optim_wrapper {kind} of {cfg.filename}')
    if dtype == 'bfloat16':
        wrapper.type = BFLOAT16
        _pop_amp_options(wrapper)
    elif dtype or kind == 'OptimWrapper':
        if kind != AMP:
            wrapper.update(type=AMP, loss_scale='dynamic')
        if dtype:
            wrapper.dtype = dtype


def drop_amp(cfg: Config) -> None:
    """Replace float16 by float32, with a warning: mmengine's AMP does not run on a CPU."""
    wrapper = cfg.get('optim_wrapper')
    if wrapper is None or wrapper.get('type') != AMP:
        return
    warn(
        'no GPU: training in float32 in place of mixed precision (a CPU supports --amp-dtype '
        'bfloat16)'
    )
    wrapper.type = 'OptimWrapper'
    _pop_amp_options(wrapper)


def _pop_amp_options(wrapper: ConfigDict) -> None:
    for key in ('loss_scale', 'dtype', 'use_fsdp'):
        wrapper.pop(key, None)


def fit_to_machine(cfg: Config, loaders: Sequence[str]) -> None:
    """Fit options of data loaders to their workers and the device.

    Workers live on after an epoch, unless the config decides or has hooks of other packages, which
    may change the data set between epochs. A GPU gets batches from pinned memory; without one,
    evaluation in float16 becomes float32, with a warning.
    """
    gpu, scope = torch.cuda.is_available(), cfg.get('default_scope')
    hooks = cfg.get('custom_hooks') or ()
    kinds = [find(h['type'], [HOOKS], scope) if isinstance(h, dict) else type(h) for h in hooks]
    known = all(getattr(kind, '__module__', '').split('.')[0] in LIBRARIES for kind in kinds)
    for loader in loaders:
        node, loop = cfg.get(f'{loader}_dataloader') or {}, cfg.get(f'{loader}_cfg') or {}
        if not node.get('num_workers'):
            for key in WORKER_OPTIONS:
                node.pop(key, None)
        elif known:
            node.setdefault('persistent_workers', True)
        if node:
            node['pin_memory'] = gpu and node.get('pin_memory', True)
        if loop.get('fp16') and not gpu:
            loop['fp16'] = False
            warn(f'no GPU: float32 in place of {loader}_cfg.fp16')


def use_compiled_backbone(cfg: Config) -> None:
    """Compile the backbone for training, unless the config compiles the complete model."""
    if cfg.get('compile'):
        raise UserError(
            f'{cfg.filename} compiles the complete model: --compile-backbone needs '
            '--cfg-options compile=False'
        )
    use_hook(cfg, 'mmdense.CompileBackboneHook')


def set_length(cfg: Config, *, epochs: int | None = None, iters: int | None = None) -> None:
    """Change the length of a schedule, in the unit that the config counts.

    In an epoch-based schedule, warm-ups in iterations stay.
    """
    by_epoch = 'max_epochs' in cfg.train_cfg
    unit = 'epochs' if by_epoch else 'iters'
    new, other = (epochs, iters) if by_epoch else (iters, epochs)
    if other is not None:
        raise UserError(f'{cfg.filename} counts {unit}: give --{unit}')
    if new is None:
        return
    if new < 1:
        raise UserError(f'--{unit} is {new}, must be at least 1')
    factor = new / cfg.train_cfg[f'max_{unit}']
    cfg.train_cfg[f'max_{unit}'] = new
    cfg.train_cfg.val_interval = min(cfg.train_cfg.get('val_interval', 1), new)
    schedulers = cfg.get('param_scheduler') or []
    schedulers = schedulers if isinstance(schedulers, list) else [schedulers]
    for scheduler in schedulers:
        if scheduler.get('by_epoch', True) != by_epoch:
            continue
        span = scheduler.get('end', math.inf) - scheduler.get('begin', 0)
        whole = scheduler.get('T_max') == span  # rounding must not change that
        for key in ('begin', 'end', 'T_max', 'total_iters', 'step_size'):
            if scheduler.get(key):
                scheduler[key] = max(1, round(scheduler[key] * factor))
        if whole:
            scheduler.T_max = scheduler.end - scheduler.get('begin', 0)
        if scheduler.get('milestones'):
            scheduler.milestones = [max(1, round(m * factor)) for m in scheduler.milestones]
    cfg.param_scheduler = [s for s in schedulers if s.get('begin', 0) < s.get('end', math.inf)]


def use_tensorboard(cfg: Config) -> None:
    """Log to TensorBoard too, in the work dir."""
    if find_spec('tensorboard') is None:
        raise UserError('--tensorboard needs a package: pip install tensorboard')
    if 'visualizer' not in cfg:
        raise UserError(f'{cfg.filename} has no visualizer to log with')
    kind = 'TensorboardVisBackend'
    backends = cfg.visualizer.get('vis_backends') or []
    if not any(backend['type'] == kind for backend in backends):
        cfg.visualizer.vis_backends = [*backends, dict(type=kind)]


def use_hook(cfg: Config, kind: str) -> None:
    """Add a hook before all others, unless the config has it."""
    hooks = cfg.get('custom_hooks') or []
    if not any(isinstance(hook, dict) and hook['type'] == kind for hook in hooks):
        cfg.custom_hooks = [dict(type=kind), *hooks]


def use_auto_scale_lr(cfg: Config) -> None:
    """Scale the learning rate by the actual over the base batch size."""
    if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
        raise UserError(f'{cfg.filename} has no auto_scale_lr.base_batch_size to scale from')
    cfg.auto_scale_lr.enable = True


def use_tta(cfg: Config) -> None:
    """Test with the config's ``tta_model`` and ``tta_pipeline``."""
    if 'tta_model' not in cfg or 'tta_pipeline' not in cfg:
        raise UserError(f'{cfg.filename} has no tta_model and tta_pipeline')
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    for _, dataset in iter_dataset_configs(cfg.test_dataloader, ''):
        dataset.pipeline = cfg.tta_pipeline


def write_predictions(cfg: Config, out: str) -> None:
    """Write test predictions: a .pkl file, or a folder of label maps (segmentation)."""
    if cfg.default_scope == 'mmseg':
        metrics = [metric for _, metric in iter_metrics(cfg.test_evaluator)]
        depth = [metric for metric in metrics if metric['type'] == 'DepthMetric']
        for metric in depth:  # mmseg names the files by the images' last names
            metric['output_dir'] = out
        hooks = [] if depth else [dict(type='mmdense.SaveLabelMapsHook', out_dir=out)]
    elif out.endswith('.pkl') and cfg.default_scope == 'mmpretrain':
        dump, hooks = dict(type='DumpResults', out_file_path=out), []
        cfg.test_evaluator = [*(m for _, m in iter_metrics(cfg.test_evaluator)), dump]
    elif out.endswith('.pkl'):
        hooks = [dict(type='mmdense.SavePredictionsHook', out_file=out)]
    else:
        raise UserError(f'--out {out}: the predictions go to a .pkl file')
    cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), *hooks]


def use_show_dir(cfg: Config, folder: str) -> None:
    """Save images of the test predictions in ``folder``."""
    if 'visualization' not in cfg.get('default_hooks', {}):
        raise UserError(f'{cfg.filename} has no default_hooks.visualization to draw with')
    if cfg.default_scope == 'mmpretrain':  # which would exchange red and blue
        raise UserError('--show-dir draws boxes and segmentations: tools/infer.py draws classes')
    folder = str(Path(folder).resolve())  # mmdet would add a relative path to its work dir
    hook = cfg.default_hooks.visualization
    hook.draw = True
    if cfg.default_scope == 'mmseg':
        cfg.visualizer.save_dir = folder
        hook.interval = 1  # the original mmseg draws every 50th
    else:
        hook.test_out_dir = folder
        if hook.type == 'DetVisualizationHook':
            hook.type = 'mmdense.DetVisualizationHook'
