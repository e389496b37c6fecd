"""Finding and reading the checkpoint to resume from."""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.runner import Runner

from mmdense.engine.checkpoint_hook import POINTER, last_checkpoint
from mmdense.errors import UserError, explain, suggest_file, warn
from mmdense.weights.files import read_checkpoint

# What the states of optimizers and schedules have besides settings and names with an underscore.
PROGRESS = {'base_values', 'best', 'cooldown_counter', 'last_step', 'num_bad_epochs', 'params'}
# In the text of a config, which is not run.
BATCH_SIZE = re.compile(r'^train_dataloader = dict\((?:.|\n )*?\bbatch_size=(\d+)', re.MULTILINE)


class NoTrainingError(UserError):
    """An intact checkpoint without the state of a training."""


def use_checkpoint(
    cfg: Config, resume: str | None, load_from: str | None = None, min_loaded: float = 1.0
) -> None:
    """Let a complete config resume a training, or start from the weights of a complete model.

    ``resume`` is a checkpoint, or 'auto' for the latest one in the work dir, if any; like
    ``load_from`` it is by default the config's. A local checkpoint is read completely: UserError if
    it is damaged, or all of the work dir are. A run without a seed resumes with the seed it was
    started with. Where all of the backbone is loaded, its ``init_cfg`` is removed.
    """
    if load_from:
        if resume:
            raise UserError('--resume continues a run, --load-from starts one: choose one')
        cfg.load_from = load_from
    elif not resume and cfg.get('resume'):
        resume = cfg.get('load_from') or 'auto'
    if resume:
        if resume == 'auto':
            file, checkpoint = find_training(cfg.work_dir) or (None, {})
        else:
            file, checkpoint = resume, read_training(resume) if Path(resume).is_file() else {}
        cfg.resume = file is not None  # else this is the first start
        cfg.load_from = file or cfg.get('load_from')
        randomness = cfg.get('randomness') or {}
        seed = checkpoint.get('meta', {}).get('seed')
        if seed is not None and randomness.get('seed') is None:
            cfg.randomness = dict(randomness, seed=seed)
    if cfg.get('resume') or (cfg.get('load_from') and min_loaded == 1):
        cfg.model.get('backbone', {}).pop('init_cfg', None)
    start = cfg.get('load_from')
    if start and '://' not in start and not Path(start).exists():
        raise UserError(f'no checkpoint {start}{suggest_file(start, "*.pth")}')


def read_training(file: str | Path) -> dict[str, Any]:
    """Read a training checkpoint completely; UserError if it is damaged or has weights only."""
    file = Path(file)
    if zipfile.is_zipfile(file):
        with explain(f'{file} is damaged'), zipfile.ZipFile(file) as archive:
            damaged = archive.testzip()  # torch does not compare checksums
        if damaged:
            raise UserError(f'{file} is damaged (checksum of {damaged})')
    checkpoint = read_checkpoint(file)
    if (
        not {'epoch', 'iter'} <= set(checkpoint.get('meta') or ())
        or 'message_hub' not in checkpoint
    ):
        raise NoTrainingError(f'{file} has weights only, which cannot be resumed: use --load-from')
    return checkpoint


def find_training(work_dir: str | Path) -> tuple[str, dict[str, Any]] | None:
    """Return the latest intact training checkpoint in a folder, and its content, or None.

    That is the one in ``last_checkpoint``; if it is damaged, the newest intact one with the state
    of the optimizer, with a warning for each damaged one; UserError if all are. Remote and sharded
    checkpoints are not read: their content is ``{}``.
    """
    work_dir = Path(work_dir)
    last = last_checkpoint(work_dir)
    if last and ('://' in last or Path(last).is_dir()):
        return last, {}
    first = [Path(last)] if last else []
    folders = {work_dir, *(file.parent for file in first)}
    files = {file for folder in folders for file in folder.glob('*.pth')}.difference(first)
    newest = sorted(files, key=lambda file: file.stat().st_mtime_ns, reverse=True)
    pointer = work_dir / POINTER
    problems = [f'{pointer} is empty'] if pointer.is_file() and not last else []
    for file in first + newest:
        try:
            checkpoint = read_training(file)
        except UserError as error:
            if str(file) == last or not isinstance(error, NoTrainingError):
                problems.append(str(error))
            continue
        if str(file) != last and 'optimizer' not in checkpoint:
            continue
        for problem in problems:
            warn(f'{problem}: resuming from {file}')
        return str(file), checkpoint
    if problems:
        raise UserError(
            f'no checkpoint in {work_dir} is intact: {"; ".join(problems)}. Name another with '
            '--resume FILE, or start again in another --work-dir'
        )
    return None


def compare_settings(runner: Runner, checkpoint: Mapping[str, Any]) -> None:
    """Warn of settings that differ between the checkpoint that a runner resumes and its config.

    UserError if the checkpoint has another optimizer, or is beyond the end of the training.
    """
    meta, loop = checkpoint['meta'], runner.cfg.get('train_cfg')
    if not loop:  # a runner without a config
        return
    unit = 'epoch' if 'max_epochs' in loop else 'iter'
    done, end = meta[unit], loop[f'max_{unit}s']
    if done > end:
        raise UserError(f'the checkpoint is at {unit} {done}, beyond train_cfg.max_{unit}s={end}')
    if done == end:
        runner.logger.warning(f'nothing is left to train: train_cfg.max_{unit}s={end} is reached')
    batch = runner.cfg.train_dataloader.get('batch_size')
    if (old := BATCH_SIZE.search(meta.get('cfg') or '')) and old[1] != str(batch):
        runner.logger.warning(f'resumed in batches of {batch} images, where it had {old[1]}')
    groups = checkpoint.get('optimizer', {}).get('param_groups')
    if not isinstance(groups, list):  # several optimizers
        return
    current = runner.optim_wrapper.optimizer.param_groups
    here, there = ({*group[0]} - {'initial_lr'} for group in (current, groups))
    if len(groups) != len(current) or (here - there and there - here):
        raise UserError(
            'the checkpoint has another optimizer or other paramwise_cfg than the config: resume '
            'with its own, or start from its weights with --load-from'
        )
    states = [schedule.state_dict() for schedule in runner.param_schedulers or ()]
    old_states = checkpoint.get('param_schedulers') or ()
    pairs = [('', *pair) for pair in zip(groups, current, strict=True)]
    for i, pair in enumerate(zip(old_states, states, strict=False)):
        pairs.append((f'param_scheduler.{i}.', *pair))
    pairs.append(('number of ', dict(schedules=len(old_states)), dict(schedules=len(states))))
    changes = {}
    for place, old, new in pairs:
        for key in sorted(old.keys() & new.keys() - PROGRESS):
            name = place + key.removeprefix('initial_')
            before, now = ([*v] if isinstance(v, dict | tuple) else v for v in (old[key], new[key]))
            if before != now and key[0] != '_' and f'initial_{key}' not in new:
                changes.setdefault(name, f'{name} {before} (config: {now})')
    if changes:
        runner.logger.warning(
            f'resumed with settings of the checkpoint, not of the config: '
            f'{", ".join(changes.values())}. --load-from starts with those of the config'
        )
