"""Pictures of what a model has learned: predictions next to the truth, and training curves."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import mmcv
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement

from mmdense.errors import UserError

__all__ = ['draw_predictions', 'plot_curves', 'read_scalars']

# The metrics that are drawn and printed, with the names that people know them by.
METRICS = {
    'coco/segm_mAP': 'mask AP',
    'coco/bbox_mAP': 'box AP',
    'coco/bbox_mAP_50': 'box AP50',
    'mIoU': 'mIoU (%)',
}

LUMA = (0.299, 0.587, 0.114)  # how bright red, green and blue look


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
    left.set(title='training loss', xlabel='iteration')
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
    right.set(title='validation', xlabel='iteration')
    right.set_ylim(bottom=0)
    right.legend(fontsize=7, frameon=False, loc='lower right')
    for axes in (left, right):
        axes.spines[['top', 'right']].set_visible(False)
        axes.grid(alpha=0.3)
    figure.savefig(out)


def draw_predictions(
    runner: Runner, out: str | Path, *, count: int = 12, score_thr: float = 0.5
) -> None:
    """Draw the first images of the test set with predictions and truth, as one PNG file.

    Detection: predicted boxes in the class's colour with class and score, true boxes white and
    dashed. Segmentation: image, truth and prediction side by side.

    Args:
        runner: A runner whose model has its weights.
        out: The PNG file.
        count: Number of images.
        score_thr: Predicted boxes with a lower score are left out.
    """
    meta = runner.test_dataloader.dataset.metainfo
    classes = meta['classes']
    palette = np.array(
        meta.get('palette') or np.random.default_rng(0).integers(0, 255, (len(classes), 3))
    )
    samples = list(_predict(runner, count))
    per_sample = 3 if 'pred_sem_seg' in samples[0] else 1
    columns = 6 if per_sample == 3 else 4
    rows = -(-len(samples) * per_sample // columns)
    figure = Figure(figsize=(2.7 * columns, 2.7 * rows), layout='constrained', dpi=100)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for axis in axes:
        axis.axis('off')
    for i, sample in enumerate(samples):
        image = mmcv.imread(sample.img_path, channel_order='rgb')
        axes[i * per_sample].imshow(image)
        if per_sample == 1:
            _draw_boxes(axes[i], sample, classes, palette / 255, score_thr)
            continue
        maps = dict(truth=sample.gt_sem_seg, prediction=sample.pred_sem_seg)
        for axis, (title, data) in zip(axes[i * 3 + 1 : i * 3 + 3], maps.items(), strict=True):
            labels = data.data.squeeze(0).cpu().numpy()
            known = labels < len(classes)  # the rest is ignored by the metric
            axis.imshow(np.where(known[..., None], palette[np.where(known, labels, 0)], 128))
            axis.set_title(title, fontsize=8)
    figure.savefig(out)


def _predict(runner: Runner, count: int) -> Iterator[BaseDataElement]:
    runner.model.eval()
    for batch in runner.test_dataloader:
        with torch.no_grad():
            samples = runner.model.test_step(batch)
        yield from samples[:count]
        count -= len(samples)
        if count <= 0:
            return


def _draw_boxes(
    axis: Axes, sample: BaseDataElement, classes: Sequence[str], colours: np.ndarray, thr: float
) -> None:
    def rectangle(box: Sequence[float], **style) -> Rectangle:
        x1, y1, x2, y2 = box
        return axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, **style))

    truth = sample.get('gt_instances')
    for box in truth.bboxes.tolist() if truth is not None else []:
        rectangle(box, ec='black', lw=1.6)
        rectangle(box, ec='white', lw=1.2, ls=(0, (2, 2)))
    found = sample.pred_instances
    found = found[found.scores >= thr]
    for box, label, score in zip(
        found.bboxes.tolist(), found.labels.tolist(), found.scores.tolist(), strict=True
    ):
        rectangle(box, ec=colours[label], lw=2)
        axis.text(
            box[0],
            box[1] - 2,
            f'{classes[label]} {score:.2f}',
            fontsize=8,
            color='black' if colours[label] @ LUMA > 0.4 else 'white',
            va='bottom',
            bbox=dict(fc=colours[label], ec='none', pad=1),
        )
