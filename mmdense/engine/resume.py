"""Finding and reading the checkpoint that a run resumes from."""

from __future__ import annotations

import logging
import zipfile
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.logging import print_log

from mmdense.errors import UserError, one_line, suggest_file
from mmdense.weights.files import read_checkpoint

__all__ = ['find_training', 'read_training', 'use_checkpoint']


def use_checkpoint(
    cfg: Config, resume: str | None, load_from: str | None = None, min_loaded: float = 1.0
) -> None:
    """Go on from a checkpoint, from the latest of the work dir ('auto'), or from none (None).

    The checkpoint is read to its end, so that a damaged one is not taken. A run without a seed goes
    on with the one that it was started with.

    Args:
        cfg: Changed in place.
        resume: The run to go on with; None leaves it to the config.
        load_from: Weights of a whole model to start from instead; by default the config's.
        min_loaded: Share of the backbone's tensors that those must fill. Where they fill all,
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
    if cfg.get('resume') or (cfg.get('load_from') and min_loaded == 1):
        # The checkpoint holds all weights: those that training began with need not be there.
        cfg.model.get('backbone', {}).pop('init_cfg', None)
    start = cfg.get('load_from')
    if start and '://' not in start and not Path(start).exists():
        raise UserError(f'no checkpoint {start}{suggest_file(start, "*.pth")}')


def _held(file: str) -> dict[str, Any]:
    return read_training(file) if Path(file).is_file() else {}


class NoTrainingError(UserError):
    """A checkpoint that is whole, and not of a training."""


def read_training(file: str | Path) -> dict[str, Any]:
    """Read all of a checkpoint that a training wrote, and return it.

    Raises:
        UserError: No file, or one that is damaged; a :class:`NoTrainingError`, if it is whole.
    """
    file = Path(file)
    if zipfile.is_zipfile(file):
        try:
            with zipfile.ZipFile(file) as opened:
                wrong = opened.testzip()  # torch does not compare the checksums
        except Exception as error:  # zipfile raises what the damage leads to
            raise UserError(f'{file} is damaged ({one_line(error)})') from error
        if wrong:
            raise UserError(f'{file} is damaged (checksum of {wrong})')
    held = read_checkpoint(file)
    if not {'epoch', 'iter'} <= set(held.get('meta') or ()) or 'message_hub' not in held:
        raise NoTrainingError(f'{file} holds no training to go on with: give it to --load-from')
    return held


def find_training(work_dir: str | Path) -> tuple[str, dict[str, Any]] | None:
    """Find the last checkpoint of a folder that is whole.

    That is the one that ``last_checkpoint`` names; if it isn't whole, the newest that is, which
    must hold the state of the optimizer. The log says what was damaged.

    Returns:
        The file and what it holds; or None, if there is nothing to go on with. Checkpoints on other
        storage, and those that are folders, are not read, and hold ``{}``.

    Raises:
        UserError: There are checkpoints, of which none is whole.
    """
    work_dir = Path(work_dir)
    pointer = work_dir / 'last_checkpoint'
    named = pointer.read_text().strip() if pointer.is_file() else ''
    if named and ('://' in named or Path(named).is_dir()):
        return named, {}
    first = [Path(named)] if named else []
    folders = {work_dir, *(file.parent for file in first)}
    files = {file for folder in folders for file in folder.glob('*.pth')}.difference(first)
    newest = sorted(files, key=lambda file: file.stat().st_mtime_ns, reverse=True)
    refused = [f'{pointer} is empty'] if pointer.is_file() and not named else []
    for file in first + newest:
        try:
            held = read_training(file)
        except UserError as error:
            if str(file) == named or not isinstance(error, NoTrainingError):
                refused.append(str(error))
            continue
        if str(file) != named and 'optimizer' not in held:
            continue
        for line in refused:
            print_log(f'{line}: going on from {file}', 'current', logging.WARNING)
        return str(file), held
    if refused:
        raise UserError(
            f'no checkpoint in {work_dir} is whole: {"; ".join(refused)}. Name another by --resume '
            'FILE, or begin again in another --work-dir'
        )
    return None
