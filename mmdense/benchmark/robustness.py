"""Tests on corrupted images: noise, blur, weather (https://arxiv.org/abs/1907.07484)."""

import copy
import shutil
import statistics
from collections.abc import Mapping, Sequence

from mmengine.config import Config

from mmdense.benchmark.runs import TrainingRun
from mmdense.datasets.files import iter_dataset_configs
from mmdense.errors import UserError, suggest_name
from mmdense.files import atomic_write
from mmdense.visualization import logs

SEVERITIES = range(1, 6)
FIGURES = ('mPC', 'rPC (%)')  # mean performance under corruption, and relative to clean images


def corruption_names(names: Sequence[str]) -> list[str]:
    """Return the names of corruptions, all fifteen common ones for 'all'.

    UserError if one is unknown, or the package imagecorruptions is missing.
    """
    try:
        from imagecorruptions import get_corruption_names
    except ModuleNotFoundError as error:
        raise UserError(
            'corruptions need another package: pip install imagecorruptions-imaug'
        ) from error
    known = get_corruption_names('all')
    for name in names:
        if name != 'all' and name not in known:
            raise UserError(f'no corruption {name!r}{suggest_name(name, known)}')
    return get_corruption_names('common') if 'all' in names else list(dict.fromkeys(names))


def corrupted(cfg: Config, corruption: str, severity: int) -> Config:
    """Return a config that tests on corrupted validation images.

    UserError if the pipeline of the validation data does not load images.
    """
    cfg = copy.deepcopy(cfg)
    transform = dict(type='mmdense.Corrupt', corruption=corruption, severity=severity)
    for place, node in iter_dataset_configs(cfg.val_dataloader, 'val_dataloader'):
        if pipeline := node.get('pipeline'):
            loads = [str(step['type']).endswith('LoadImageFromFile') for step in pipeline]
            if True not in loads:
                raise UserError(f'{place}.pipeline has no LoadImageFromFile: nothing to corrupt')
            pipeline.insert(loads.index(True) + 1, transform)
    cfg.test_dataloader, cfg.test_evaluator = cfg.val_dataloader, cfg.val_evaluator
    return cfg


def corrupted_tests(run: TrainingRun, corruptions: Sequence[tuple[str, int]]) -> list[TrainingRun]:
    """Return the tests of a training on corrupted images; none before it is done."""
    if not corruptions or run.state['status'] != 'done':
        return []
    checkpoint = (run.folder / 'last_checkpoint').read_text().strip()
    return [
        TrainingRun(
            f'{run.name}, {kind} {severity}',
            run.seed,
            run.config.with_suffix(f'.{kind}-{severity}.py'),
            run.folder.with_name(f'{run.folder.name}.{kind}-{severity}'),
            None,
            checkpoint,
        )
        for kind, severity in corruptions
    ]


def write_tests(
    run: TrainingRun, cfg: Config | None, corruptions: Sequence[tuple[str, int]]
) -> list[TrainingRun]:
    """Write the configs of a training's :func:`corrupted_tests`, and return those to run.

    ``cfg`` is that of the training. A test is repeated if its config has changed.
    """
    todo = []
    for test, kind in zip(corrupted_tests(run, corruptions), corruptions, strict=False):
        config = corrupted(cfg, *kind)
        config.randomness.seed, config.work_dir = run.seed, str(test.folder)
        config.sweep.tested = run.state['seconds']  # another training is tested anew
        if test.config.exists() and test.config.read_text() != config.pretty_text:
            shutil.rmtree(test.folder, ignore_errors=True)
        test.folder.mkdir(parents=True, exist_ok=True)
        atomic_write(test.config, config.pretty_text.encode())
        if test.state['status'] != 'done':
            todo.append(test)
    return todo


def robustness(
    run: TrainingRun, metrics: Mapping[str, float], corruptions: Sequence[tuple[str, int]]
) -> dict[str, float]:
    """Return the mean performance under corruption, and its share of that on clean images.

    ``metrics`` are those on clean images. Nothing before all tests of the training are done.
    """
    tests = corrupted_tests(run, corruptions) if metrics else []
    if not tests or any(test.state['status'] != 'done' for test in tests):
        return {}
    metric = logs.main_metrics(metrics)[0]
    mean = statistics.fmean(test.read_log()[1][-1].get(metric, 0) for test in tests)
    clean = metrics[metric]
    return dict(zip(FIGURES, [mean, *([100 * mean / clean] if clean else [])], strict=False))
