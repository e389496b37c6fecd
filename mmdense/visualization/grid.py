"""A grid of test images with predictions and ground truth."""

from __future__ import annotations

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

__all__ = ['draw_predictions']

LUMA = (0.299, 0.587, 0.114)  # how bright red, green and blue look


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
