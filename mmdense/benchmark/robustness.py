"""Tests on corrupted images: noise, blur, weather (https://arxiv.org/abs/1907.07484)."""

import copy
import statistics
from collections.abc import Mapping, Sequence

from mmengine.config import Config

from mmdense.datasets.files import iter_dataset_configs
from mmdense.errors import UserError, suggest_name

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


def robustness(clean: float, values: Sequence[float]) -> Mapping[str, float]:
    """Return the mean performance under corruption, and its share of that on clean images."""
    mean = statistics.fmean(values)
    return dict(zip(FIGURES, [mean, *([100 * mean / clean] if clean else [])], strict=False))
