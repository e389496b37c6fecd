"""Pictures of what a model has learned: predictions next to the truth, and training curves."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mmdense.errors import UserError
from mmdense.files import check_writable

__all__ = ['Training', 'plot_curves', 'plot_runs', 'read_runs', 'read_scalars']

# The metrics that are drawn and printed, with the names that people know them by.
METRICS = {
    'coco/segm_mAP': 'mask AP',
    'coco/bbox_mAP': 'box AP',
    'coco/bbox_mAP_50': 'box AP50',
    'mIoU': 'mIoU (%)',
    'rmse': 'RMSE (m)',
}
# Metrics that are better the lower.
ERRORS = ('abs_rel', 'log10', 'rmse', 'rmse_log', 'silog', 'sq_rel')
COUNTERS = ('epoch', 'iter', 'step')
FORMATS = ('.pdf', '.png', '.svg')  # of pictures of several runs
SHARE = 25  # a smoothed value is the mean over this part of a run


def read_scalars(work_dir: str | Path) -> tuple[list[dict], list[dict]]:
    """Read what a training logged, over all its resumptions.

    Args:
        work_dir: The training's work dir.

    Returns:
        The records of the losses and those of the metrics, both in order; in a metrics record
        ``iter`` is the iteration after which it was taken.

    Raises:
        UserError: Nothing has been logged there.
    """
    losses: dict[int, dict] = {}
    metrics: dict[int, dict] = {}
    for file in sorted(Path(work_dir).glob('*/vis_data/scalars.json')):
        last = 0
        for line in file.read_text().splitlines():
            record = json.loads(line)
            if 'loss' in record:
                if not last:  # what an earlier run logged from here on was not resumed from
                    losses = {i: r for i, r in losses.items() if i < record['step']}
                    metrics = {i: r for i, r in metrics.items() if i < record['step']}
                last = record['step']
                losses[last] = record
            elif last and METRICS.keys() & record.keys():
                metrics[last] = dict(record, iter=last)
    if not losses:
        raise UserError(f'no training log in {work_dir}: train first, or name its --work-dir')
    return [losses[i] for i in sorted(losses)], [metrics[i] for i in sorted(metrics)]


def plot_curves(losses: Sequence[dict], metrics: Sequence[dict], out: str | Path) -> None:
    """Plot the loss and the metrics over iterations as a PNG file, from :func:`read_scalars`."""
    figure = Figure(figsize=(9, 3.4), layout='constrained', dpi=150)
    left, right = figure.subplots(1, 2)
    steps = [r['step'] for r in losses]
    for name in ('loss', *sorted(k for k in losses[-1] if 'loss' in k and k != 'loss')):
        values = [r.get(name, np.nan) for r in losses]
        left.plot(steps, values, label=name, lw=2 if name == 'loss' else 1)
    _finish(left, 'training loss')
    left.set_ylim(bottom=0)
    left.legend(fontsize=7, frameon=False)
    for key, label in METRICS.items():
        points = [(r['iter'], r[key]) for r in metrics if key in r]
        if points:
            right.plot(*zip(*points, strict=True), marker='o', ms=3, label=label)
            right.annotate(
                f'{points[-1][1]:.3g}',
                points[-1],
                xytext=(0, 5),
                textcoords='offset points',
                ha='right',
                fontsize=8,
            )
    _finish(right, 'validation')
    right.set_ylim(bottom=0)
    right.legend(fontsize=7, frameon=False, loc='lower right')
    figure.savefig(out)


def _finish(axes: Axes, title: str) -> None:
    axes.set(title=title, xlabel='iteration')
    axes.spines[['top', 'right']].set_visible(False)
    axes.grid(alpha=0.3)


@dataclass
class Training:
    """What a training logged, as :func:`read_scalars` has it.

    Args:
        name: Tells it from others.
        losses: The records of its iterations.
        metrics: The records of its validations.
    """

    name: str
    losses: list[dict]
    metrics: list[dict]

    @property
    def keys(self) -> list[str]:
        """Return the names of all that was logged."""
        found = dict.fromkeys(key for r in (*self.losses, *self.metrics) for key in r)
        return [key for key in found if key not in COUNTERS]

    def validates(self, key: str) -> bool:
        """Return whether ``key`` is a metric: training's own records don't have it."""
        return not any(key in r for r in self.losses)

    def series(self, key: str) -> list[tuple[int, float]]:
        """Return the iterations at which ``key`` was logged, and its values."""
        if self.validates(key):
            return [(r['iter'], r[key]) for r in self.metrics if key in r]
        return [(r['step'], r[key]) for r in self.losses if key in r]

    def best(self, key: str) -> tuple[int, float] | None:
        """Return the iteration of the best value, and the value.

        Returns:
            None if ``key`` has no finite value, or is neither a loss nor a metric.
        """
        points = [p for p in self.series(key) if math.isfinite(p[1])]
        if not points or not ('loss' in key or self.validates(key)):
            return None
        lower = 'loss' in key or key in ERRORS
        return (min if lower else max)(points, key=lambda point: point[1])


def read_runs(work_dirs: Sequence[str | Path]) -> list[Training]:
    """Read what several trainings logged.

    Args:
        work_dirs: Their work dirs. Trainings are named after them, by as much of the path as tells
            one from the others.

    Raises:
        UserError: As :func:`read_scalars`.
    """
    folders = list(dict.fromkeys(Path(folder).resolve() for folder in work_dirs))
    return [
        Training(name, *read_scalars(folder))
        for name, folder in zip(_short_names(folders), folders, strict=True)
    ]


def _short_names(folders: Sequence[Path]) -> list[str]:
    names = []
    for folder in folders:
        others = [other for other in folders if other != folder]
        length = 1
        while any(other.parts[-length:] == folder.parts[-length:] for other in others):
            length += 1
        names.append(str(Path(*folder.parts[-length:])))
    return names


def plot_runs(
    runs: Sequence[Training], out: str | Path, *, keys: Sequence[str] | None = None
) -> list[str]:
    """Plot several trainings in one picture: a panel for each key, a colour for each run.

    What was logged in iterations is drawn faint, and above it smoothed.

    Args:
        runs: The trainings, from :func:`read_runs`.
        out: The picture, .png, .svg or .pdf.
        keys: What to draw, by its name in the log; by default the loss, and those of
            :data:`METRICS` that any of the runs has. Runs without a key are missing in its panel.

    Returns:
        The keys that were drawn.

    Raises:
        UserError: A key that no run has, another kind of file, or one that cannot be written.
    """
    out = Path(out)
    if out.suffix not in FORMATS:
        raise UserError(f'{out} must end in {", ".join(FORMATS)}')
    known = list(dict.fromkeys(key for run in runs for key in run.keys))
    keys = list(dict.fromkeys(keys or ('loss', *(key for key in METRICS if key in known))))
    for key in keys:
        if key not in known:
            raise UserError(f'no run has logged {key}; there are: {", ".join(known)}')
    check_writable(out)
    columns = min(len(keys), 3)
    rows = -(-len(keys) // columns)
    height = 3.2 * rows + 0.25 * len(runs)
    figure = Figure(figsize=(4.5 * columns, height), layout='constrained', dpi=150)
    panels = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes in panels[len(keys) :]:
        axes.axis('off')
    coloured = list(zip(runs, _colours(len(runs)), strict=True))
    for axes, key in zip(panels, keys, strict=False):
        for run, colour in coloured:
            _draw_run(axes, run, key, colour)
        _finish(axes, METRICS.get(key, key))
    # Below all panels: names of runs are long.
    legend = [Line2D([], [], color=colour, label=run.name) for run, colour in coloured]
    figure.legend(handles=legend, loc='outside lower left', fontsize=8, frameon=False)
    figure.savefig(out)
    return keys


def _colours(number: int) -> list[tuple[float, ...]]:
    few = matplotlib.colormaps['tab10'].colors
    if number <= len(few):
        return list(few[:number])
    return [tuple(colour) for colour in matplotlib.colormaps['turbo'](np.linspace(0, 1, number))]


def _draw_run(axes: Axes, run: Training, key: str, colour: tuple[float, ...]) -> None:
    points = run.series(key)
    if not points:
        return
    steps, values = (np.array(axis, float) for axis in zip(*points, strict=True))
    if run.validates(key):
        axes.plot(steps, values, color=colour, lw=1.5, marker='o', ms=3)
        return
    width = len(values) // SHARE
    if width > 1:
        axes.plot(steps, values, color=colour, lw=0.8, alpha=0.25)
    single = 'o' if np.isfinite(values).sum() == 1 else None
    axes.plot(steps, _smooth(values, width), color=colour, lw=1.5, marker=single, ms=3)


def _smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Return means over ``width`` values around each one, of those that are finite."""
    if width < 2:
        return values
    known = np.isfinite(values)
    kernel = np.ones(width | 1)  # an odd number has a middle
    total = np.convolve(np.where(known, values, 0), kernel, 'same')
    number = np.convolve(known, kernel, 'same')
    return total / np.where(number, number, np.nan)
