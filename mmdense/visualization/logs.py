"""Read training logs and plot their losses and metrics."""

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mmdense.errors import UserError
from mmdense.files import check_writable

# Metrics that are plotted and printed by default, with their usual names.
METRICS = {
    'coco/segm_mAP': 'mask AP',
    'coco/bbox_mAP': 'box AP',
    'coco/bbox_mAP_50': 'box AP50',
    'mIoU': 'mIoU (%)',
    'rmse': 'RMSE (m)',
    'accuracy/top1': 'top-1 (%)',
    'accuracy/top5': 'top-5 (%)',
}
# The usual names of all metrics that have one.
METRIC_NAMES = METRICS | {
    **{
        f'coco/{kind}_mAP_{part}': f'{title} AP{part}'
        for kind, title in (('bbox', 'box'), ('segm', 'mask'))
        for part in ('50', '75', 's', 'm', 'l')
    },
    'mAcc': 'mAcc (%)',
    'aAcc': 'aAcc (%)',
    'pascal_voc/mAP': 'VOC mAP',
}
LOWER_IS_BETTER = ('abs_rel', 'log10', 'rmse', 'rmse_log', 'silog', 'sq_rel')
COUNTERS = ('epoch', 'iter', 'step', 'validated_at')  # the last in logs of earlier versions
NO_METRICS = (*COUNTERS, 'data_time', 'time')  # in the record of a validation
FORMATS = ('.pdf', '.png', '.svg')  # of plots of several runs
SMOOTHING = 25  # a smoothed value is the mean over 1/25 of a run


def is_empty(name: str, value: Any) -> bool:
    """Return whether a metric is COCO's AP or AR of a size that no object has, which is -1."""
    return ('AP' in name or 'AR' in name) and isinstance(value, float) and value == -1


def numbers_of(record: dict[str, Any]) -> dict[str, float]:
    """Return a record without empty metrics and without what is no number."""
    numbers = ((k, v) for k, v in record.items() if isinstance(v, int | float))
    return {k: v for k, v in numbers if not is_empty(k, v)}


def main_metrics(names: Iterable[str]) -> list[str]:
    """Return the metrics to show of those that are logged: of :data:`METRICS`, or the first."""
    names = [name for name in names if name not in NO_METRICS]
    return [name for name in (*METRICS, *METRICS.values()) if name in names] or names[:1]


def read_scalars(work_dir: str | Path) -> tuple[list[dict], list[dict]]:
    """Read the log in a training run's work dir, with those of all its resumptions.

    Returns the records of the losses and those of the metrics, both in order. In a record of
    metrics ``iter`` is the training iteration of the validation; AP of sizes that no object has and
    what is no number are left out. UserError if there is no training log.
    """
    losses: dict[int, dict] = {}
    metrics: dict[int, dict] = {}
    for file in sorted(Path(work_dir).glob('*/vis_data/scalars.json')):
        last, resumed = max(losses, default=0), True  # a validation may be due before any training
        for line in file.read_text().splitlines():
            record = json.loads(line)
            if 'loss' in record:
                if resumed:  # earlier processes logged this far, but were resumed from before
                    losses = {i: r for i, r in losses.items() if i < record['step']}
                    metrics = {i: r for i, r in metrics.items() if i < record['step']}
                last, resumed = record['step'], False
                losses[last] = record
            elif last and record['step'] and main_metrics(record):  # a test's step is 0
                metrics[last] = dict(numbers_of(record), iter=last)
    if not losses:
        raise UserError(f'no training log in {work_dir}: train first, or pass its --work-dir')
    return [losses[i] for i in sorted(losses)], [metrics[i] for i in sorted(metrics)]


@dataclass
class Run:
    """The log of one training run, from :func:`read_scalars`."""

    name: str  # in tables and legends
    losses: list[dict]  # the records of its training iterations
    metrics: list[dict]  # the records of its validations

    @property
    def keys(self) -> list[str]:
        """The names of all logged values."""
        keys = dict.fromkeys(key for record in (*self.losses, *self.metrics) for key in record)
        return [key for key in keys if key not in COUNTERS]

    def is_metric(self, key: str) -> bool:
        """Return whether ``key`` is logged by validations only."""
        return not any(key in record for record in self.losses)

    def series(self, key: str) -> list[tuple[int, float]]:
        """Return the iterations at which ``key`` was logged, with its values."""
        if self.is_metric(key):
            return [(r['iter'], r[key]) for r in self.metrics if key in r]
        return [(r['step'], r[key]) for r in self.losses if key in r]

    def best(self, key: str) -> tuple[int, float] | None:
        """Return the iteration of the best value, and the value.

        It is None if ``key`` has no finite value, or is neither a loss nor a metric.
        """
        points = [point for point in self.series(key) if math.isfinite(point[1])]
        if not points or not ('loss' in key or self.is_metric(key)):
            return None
        choose = min if 'loss' in key or key in LOWER_IS_BETTER else max
        return choose(points, key=lambda point: point[1])


def read_runs(work_dirs: Sequence[str | Path]) -> list[Run]:
    """Read the logs of several runs, which are named by their paths below the common parent.

    UserError if there is no training log in one of them.
    """
    folders = list(dict.fromkeys(Path(folder).resolve() for folder in work_dirs))
    root = os.path.commonpath([folder.parent for folder in folders])
    return [Run(str(folder.relative_to(root)), *read_scalars(folder)) for folder in folders]


def plot_runs(
    runs: Sequence[Run], file: str | Path, *, keys: Sequence[str] | None = None
) -> list[str]:
    """Plot several runs in one figure: a panel for each key, a colour for each run.

    Losses are smoothed; the raw values are drawn faintly behind them. ``keys`` are names of logged
    values, by default the loss and :func:`main_metrics`; a panel leaves out the runs without its
    key. Returns the plotted keys. UserError if no run has a key, or if the file is no .png, .svg or
    .pdf or cannot be written.
    """
    file = Path(file)
    if file.suffix not in FORMATS:
        raise UserError(f'{file} must end in {", ".join(FORMATS)}')
    known = list(dict.fromkeys(key for run in runs for key in run.keys))
    metrics = dict.fromkeys(key for run in runs for record in run.metrics for key in record)
    keys = list(dict.fromkeys(keys or ('loss', *main_metrics(metrics))))
    for key in keys:
        if key not in known:
            raise UserError(f'no run has logged {key}; logged values: {", ".join(known)}')
    check_writable(file)
    columns = min(len(keys), 3)
    rows = -(-len(keys) // columns)
    height = 3.2 * rows + 0.25 * len(runs)
    figure = Figure(figsize=(4.5 * columns, height), layout='constrained', dpi=150)
    few, many = matplotlib.colormaps['tab10'].colors, matplotlib.colormaps['turbo']
    colours = few if len(runs) <= len(few) else many(np.linspace(0, 1, len(runs)))
    coloured = [*zip(runs, colours, strict=False)]
    for number, key in enumerate(keys, start=1):
        axes = figure.add_subplot(rows, columns, number)
        for run, colour in coloured:
            _plot_run(axes, run, key, colour)
        axes.set(title=METRICS.get(key, key), xlabel='iteration')
        axes.spines[['top', 'right']].set_visible(False)
        axes.grid(alpha=0.3)
    # Below all panels, because names of runs are long.
    handles = [Line2D([], [], color=colour, label=run.name) for run, colour in coloured]
    figure.legend(handles=handles, loc='outside lower left', fontsize=8, frameon=False)
    figure.savefig(file)
    return keys


def _plot_run(axes: Axes, run: Run, key: str, colour: Sequence[float]) -> None:
    steps, values = np.array(run.series(key), float).reshape(-1, 2).T
    if run.is_metric(key):
        axes.plot(steps, values, color=colour, lw=1.5, marker='o', ms=3)
        return
    window = len(values) // SMOOTHING
    if window > 1:
        axes.plot(steps, values, color=colour, lw=0.8, alpha=0.25)
    marker = 'o' if np.isfinite(values).sum() == 1 else None  # a line needs two points
    axes.plot(steps, _smooth(values, window), color=colour, lw=1.5, marker=marker, ms=3)


def _smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Return the means of the finite values in a window around each value."""
    finite = np.isfinite(values)
    kernel = np.ones(window | 1)  # odd, to be centred
    total = np.convolve(np.where(finite, values, 0), kernel, 'same')
    count = np.convolve(finite, kernel, 'same')
    return total / np.where(count, count, np.nan)
