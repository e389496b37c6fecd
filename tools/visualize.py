"""Draw a trained model's predictions and its training curves."""

from pathlib import Path

from rich.console import Console
from rich.table import Table

from mmdense import cli as options
from mmdense.cli import report_errors
from mmdense.engine import runner as run
from mmdense.visualization import grid
from mmdense.visualization import logs as pictures


@report_errors
def main() -> None:
    parser = options.config_parser(__doc__, 'tools/visualize.py CONFIG CHECKPOINT --out pictures')
    parser.add_argument('checkpoint', help='checkpoint file or URL')
    parser.add_argument('--out', metavar='DIR', help='where pictures go (the work dir)')
    parser.add_argument('--num', type=int, default=12, help='number of images (%(default)s)')
    parser.add_argument(
        '--score-thr', type=float, default=0.5, help='lowest score of a drawn box (%(default)s)'
    )
    args, cfg = options.parse_config(parser)
    losses, metrics = pictures.read_scalars(cfg.work_dir)
    out = Path(args.out or cfg.work_dir)
    out.mkdir(parents=True, exist_ok=True)
    pictures.plot_curves(losses, metrics, out / 'curves.png')
    runner = run.build_runner(cfg, loaders=('test',))
    run.load_weights(runner, args.checkpoint)
    grid.draw_predictions(runner, out / 'predictions.png', count=args.num, score_thr=args.score_thr)
    console = Console()
    if metrics:
        table = Table('last validation', 'value')
        for key, name in pictures.METRICS.items():
            if key in metrics[-1]:
                table.add_row(name, f'{metrics[-1][key]:.3f}')
        console.print(table)
    written = f'pictures: {out / "predictions.png"} {out / "curves.png"}'
    console.print(written, soft_wrap=True, markup=False)


if __name__ == '__main__':
    main()
