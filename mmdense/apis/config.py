"""Reading a config file, and the changes that command-line options make to it."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.dist import is_main_process
from mmengine.logging import print_log

from mmdense.apis.reading import check_options, check_sections, did_you_mean, read_config
from mmdense.config import fill_channels
from mmdense.engine.checkpoint_hook import find_training, read_training
from mmdense.errors import UserError

__all__ = [
    'drop_amp',
    'load_config',
    'use_amp',
    'use_auto_scale_lr',
    'use_channels_last',
    'use_checkpoint',
    'use_compiled_backbone',
    'use_show_dir',
    'use_tensorboard',
    'use_tta',
    'write_predictions',
]

AMP = 'AmpOptimWrapper'
BFLOAT16 = 'mmdense.BFloat16OptimWrapper'


def load_config(
    path: str,
    *,
    options: Mapping[str, Any] | None = None,
    work_dir: str | None = None,
    launcher: str = 'none',
) -> Config:
    """Read a config file and apply the options that every tool has.

    Args:
        path: The config file.
        options: Overrides, as ``--cfg-options`` gives them. ``data_root`` replaces the config's own
            ``data_root`` wherever it stands: in data sets, annotation files and metrics.
        work_dir: Where logs and checkpoints go; otherwise the config's own or ``work_dirs/<name>``.
        launcher: How processes were started: 'none', 'pytorch', 'slurm' or 'mpi'.

    Raises:
        UserError: As :func:`.read_config`, :func:`.check_sections` and :func:`.check_options`, a
            config without a model, or ``in_channels='auto'`` where nothing is known to fill in.
    """
    cfg = read_config(path)
    check_sections(cfg, path)
    options = dict(options or {})
    if 'data_root' in options:
        old, new = (str(c.get('data_root') or '').rstrip('/') for c in (cfg, options))
        if not old:
            raise UserError(f'{path} has no data_root: set each data set by its own option')
        if not new:
            raise UserError('data_root is empty: name the folder that holds the data')
        for key, child in list(cfg.items()):
            cfg[key] = _move_data(child, old, new)
        del options['data_root']
    check_options(cfg, options)
    try:
        cfg.merge_from_dict(options)
    except (KeyError, TypeError) as error:  # it merges, and nothing else
        raise UserError(f'--cfg-options: {error.args[0]}') from error
    if 'model' not in cfg:
        raise UserError(f'{path} names no model: choose a config outside _base_')
    if not isinstance(cfg.model, dict):
        raise UserError(f'model must be a dict, but is {cfg.model!r}')
    fill_channels(cfg)
    cfg.launcher = launcher
    cfg.work_dir = work_dir or cfg.get('work_dir') or str(Path('work_dirs') / Path(path).stem)
    return cfg


def _move_data(node: Any, old: str, new: str) -> Any:
    """Return ``node`` with the folder ``old`` replaced by ``new`` at the head of every path."""
    if isinstance(node, str) and (node == old or node.startswith(f'{old}/')):
        return new + node[len(old) :]
    if isinstance(node, list | tuple):
        return type(node)(_move_data(child, old, new) for child in node)
    if isinstance(node, dict):
        for key, child in node.items():
            node[key] = _move_data(child, old, new)
    return node


def use_amp(cfg: Config, dtype: str | None = None) -> None:
    """Train in mixed precision.

    Args:
        cfg: Changed in place.
        dtype: 'bfloat16', on a CPU too; 'float16', with the config's own or dynamic loss scaling;
            None leaves it to the config, and is float16 where that trains in plain precision.

    Raises:
        UserError: The config has an optimizer wrapper of another kind.
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
    """Replace mixed by plain precision, with a warning: mmengine's AMP refuses to run on a CPU."""
    wrapper = cfg.get('optim_wrapper')
    if wrapper is None or wrapper.get('type') != AMP:
        return
    if is_main_process():
        print_log(
            'no GPU: this run uses float32 in place of mixed precision (a CPU can do '
            '--amp-dtype bfloat16)',
            logger='current',
            level=logging.WARNING,
        )
    wrapper.type = 'OptimWrapper'
    _pop_amp_options(wrapper)


def _pop_amp_options(wrapper: ConfigDict) -> None:
    for key in ('loss_scale', 'dtype', 'use_fsdp'):
        wrapper.pop(key, None)


def use_channels_last(cfg: Config) -> None:
    """Run the model in channels-last memory format."""
    _use_hook(cfg, 'mmdense.ChannelsLastHook')


def use_compiled_backbone(cfg: Config) -> None:
    """Compile the backbone for training.

    Raises:
        UserError: The config compiles the whole model.
    """
    if cfg.get('compile'):
        raise UserError(
            f'{cfg.filename} compiles the whole model: --compile-backbone needs '
            '--cfg-options compile=False'
        )
    _use_hook(cfg, 'mmdense.CompileBackboneHook')


def use_tensorboard(cfg: Config) -> None:
    """Log to TensorBoard as well, in the work dir.

    Raises:
        UserError: It isn't installed, or the config has no visualizer.
    """
    if find_spec('tensorboard') is None:
        raise UserError('--tensorboard needs a package: pip install tensorboard')
    if 'visualizer' not in cfg:
        raise UserError(f'{cfg.filename} has no visualizer to log with')
    kind = 'TensorboardVisBackend'
    backends = cfg.visualizer.get('vis_backends') or []
    if not any(backend['type'] == kind for backend in backends):
        cfg.visualizer.vis_backends = [*backends, dict(type=kind)]


def _use_hook(cfg: Config, kind: str) -> None:
    """Add the hook in front of the others, unless the config has it."""
    hooks = cfg.get('custom_hooks') or []
    if not any(isinstance(hook, dict) and hook['type'] == kind for hook in hooks):
        cfg.custom_hooks = [dict(type=kind), *hooks]


def use_auto_scale_lr(cfg: Config) -> None:
    """Scale the learning rate by the real over the config's base batch size.

    Raises:
        UserError: The config doesn't say its base batch size.
    """
    if 'base_batch_size' not in (cfg.get('auto_scale_lr') or {}):
        raise UserError(f'{cfg.filename} has no auto_scale_lr.base_batch_size to scale from')
    cfg.auto_scale_lr.enable = True


def use_checkpoint(
    cfg: Config, resume: str | None, load_from: str | None = None, min_coverage: float = 1.0
) -> None:
    """Go on from a checkpoint, from the latest of the work dir ('auto'), or from none (None).

    The checkpoint is read to its end, so that a damaged one is not taken. A run without a seed goes
    on with the one that it was started with.

    Args:
        cfg: Changed in place.
        resume: The run to go on with; None leaves it to the config.
        load_from: Weights of a whole model to start from instead; by default the config's.
        min_coverage: Share of the backbone's tensors that those must fill. Where they fill all,
            the backbone's own ``init_cfg`` is left out.

    Raises:
        UserError: A checkpoint is named, here or by ``load_from``, and isn't there or isn't whole;
            or the work dir has checkpoints, of which none is whole.
    """
    if load_from:
        if resume:
            raise UserError('--resume goes on with a run, --load-from starts one: choose one')
        cfg.load_from = load_from
    elif not resume and cfg.get('resume'):
        resume = cfg.get('load_from') or 'auto'
    if resume:  # a first start has nothing to go on with: it begins as without
        found = find_training(cfg.work_dir) if resume == 'auto' else (resume, _held(resume))
        cfg.resume = found is not None
        if found is not None:
            cfg.load_from, held = found
            seed = held.get('meta', {}).get('seed')
            if seed is not None and (cfg.get('randomness') or {}).get('seed') is None:
                cfg.randomness = dict(cfg.get('randomness') or {}, seed=seed)
    if cfg.get('resume') or (cfg.get('load_from') and min_coverage == 1):
        # The checkpoint holds all weights: those that training began with need not be there.
        cfg.model.get('backbone', {}).pop('init_cfg', None)
    start = cfg.get('load_from')
    if start and '://' not in start and not Path(start).exists():
        raise UserError(f'no checkpoint {start}{did_you_mean(start, "*.pth")}')


def _held(file: str) -> dict[str, Any]:
    return read_training(file) if Path(file).is_file() else {}


def use_tta(cfg: Config) -> None:
    """Test with the augmentations of the config's ``tta_model`` and ``tta_pipeline``.

    Raises:
        UserError: The config has none.
    """
    if 'tta_model' not in cfg or 'tta_pipeline' not in cfg:
        raise UserError(f'{cfg.filename} has no tta_model and tta_pipeline')
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)
    data = cfg.test_dataloader.dataset
    while 'dataset' in data:
        data = data.dataset
    for part in data.get('datasets', [data]):
        part.pipeline = cfg.tta_pipeline


def write_predictions(cfg: Config, out: str) -> None:
    """Write test predictions: one .pkl file (detection) or a folder of label maps (segmentation).

    Raises:
        UserError: A detector's file doesn't end in .pkl.
    """
    metrics = cfg.test_evaluator
    metrics = list(metrics) if isinstance(metrics, list | tuple) else [metrics]
    if cfg.default_scope == 'mmseg':
        for metric in metrics:
            metric.update(output_dir=out, keep_results=True)
        return
    if not out.endswith('.pkl'):
        raise UserError(f'--out {out}: the predictions of a detector go to a .pkl file')
    cfg.test_evaluator = [*metrics, dict(type='DumpDetResults', out_file_path=out)]


def use_show_dir(cfg: Config, folder: str) -> None:
    """Save pictures of the test predictions in ``folder``.

    Raises:
        UserError: The config has no visualization hook.
    """
    if 'visualization' not in cfg.get('default_hooks', {}):
        raise UserError(f'{cfg.filename} has no default_hooks.visualization to draw with')
    folder = str(Path(folder).resolve())  # mmdet would put a relative one below its work dir
    cfg.default_hooks.visualization.draw = True
    if cfg.default_scope == 'mmseg':
        cfg.visualizer.save_dir = folder
        cfg.default_hooks.visualization.interval = 1  # the original mmseg would draw each 50th
    else:
        cfg.default_hooks.visualization.test_out_dir = folder
