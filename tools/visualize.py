"""Draw a trained model's predictions beside the ground truth, and its training curves."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope
from rich.console import Console
from rich.table import Table

from mmdense import cli
from mmdense.apis import Predictor
from mmdense.config.validate import check_data_files
from mmdense.errors import positive
from mmdense.visualization.logs import METRICS, main_metrics, plot_runs, read_runs


def parser() -> argparse.ArgumentParser:
    parser = cli.config_parser(__doc__, 'tools/visualize.py CONFIG CHECKPOINT --out pictures')
    parser.add_argument('checkpoint', help='checkpoint file or URL')
    parser.add_argument('--out', metavar='DIR', help='output folder (the work dir)')
    parser.add_argument(
        '--num', type=positive, default=12, help='number of test images (%(default)s)'
    )
    cli.add_score(parser, 0.5, 'drawn')
    return parser


@cli.report_errors
def main(argv: Sequence[str] | None = None) -> None:
    args, cfg = cli.parse_config(parser(), argv)
    (run,) = read_runs([cfg.work_dir])
    check_data_files(cfg, ('test',))
    predictor = Predictor(cfg, args.checkpoint)
    out = Path(args.out or cfg.work_dir)
    out.mkdir(parents=True, exist_ok=True)
    metrics = main_metrics(key for record in run.metrics[-1:] for key in record)
    keys = [key for key in run.keys if 'loss' in key or key in metrics]
    plot_runs([run], out / 'curves.png', keys=keys)
    drawings, legend = draw_test_images(cfg, predictor, args.num, args.score)
    save_grid(drawings, legend, out / 'predictions.png')
    console = Console()
    if run.metrics:
        table = Table('last validation', 'value')
        for key in metrics:
            table.add_row(METRICS.get(key, key), f'{run.metrics[-1][key]:.3f}')
        console.print(table)
    written = f'pictures: {out / "predictions.png"} {out / "curves.png"}'
    console.print(written, soft_wrap=True, markup=False)


def draw_test_images(
    cfg: Config, predictor: Predictor, count: int, score_thr: float
) -> tuple[list[np.ndarray], dict[str, tuple[int, ...]]]:
    """Return drawings of the first test images, truth and prediction in turn, and their legend."""
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        dataset = DATASETS.build(cfg.test_dataloader.dataset)
    drawings, legend = [], {}
    for i in range(min(count, len(dataset))):
        truth = dataset[i]['data_samples']
        (prediction,) = predictor(truth.img_path)
        drawings.append(predictor.draw(truth.img_path, truth, truth=True))
        drawings.append(predictor.draw(truth.img_path, prediction, score_thr))
        legend |= predictor.legend([truth, prediction])
    return drawings, legend


def save_grid(
    drawings: Sequence[np.ndarray], legend: Mapping[str, tuple[int, ...]], file: Path
) -> None:
    """Save pairs of drawings as one image, three pairs per row."""
    rows = -(-len(drawings) // 6)
    figure = Figure(figsize=(27, 4.5 * rows), layout='constrained', dpi=100)
    axes = figure.subplots(rows, 6, squeeze=False).ravel()
    for axis in axes:
        axis.axis('off')
    for i, drawing in enumerate(drawings):
        axes[i].imshow(drawing)
        axes[i].set_title('prediction' if i % 2 else 'truth')
    if legend:
        patches = [Patch(color=np.array(c) / 255, label=name) for name, c in legend.items()]
        figure.legend(handles=patches, loc='outside lower center', ncols=12, fontsize='x-large')
    figure.savefig(file)


if __name__ == '__main__':
    main()
