"""Plot losses and metrics of training runs in one figure, and print the best values."""

import argparse
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmdense import cli
from mmdense.visualization.logs import METRICS, plot_runs, read_runs


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        **cli.example('tools/plot_log.py work_dirs/a work_dirs/b --keys loss mIoU'),
    )
    parser.add_argument('work_dirs', nargs='+', metavar='WORK_DIR', help='work dir of a run')
    parser.add_argument(
        '--out', default='runs.png', metavar='FILE', help='.png, .svg or .pdf file (%(default)s)'
    )
    parser.add_argument(
        '--keys',
        nargs='+',
        metavar='KEY',
        help='logged values to plot (the loss and the common metrics)',
    )
    return parser


@cli.report_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    runs = read_runs(args.work_dirs)
    keys = plot_runs(runs, args.out, keys=args.keys)
    table = Table('value')
    table.add_column('run', overflow='fold')
    for title in ('last', 'iteration', 'best', 'iteration'):
        table.add_column(title, justify='right')
    for key in keys:
        for run in runs:
            points = run.series(key)
            if points or not run.metrics:  # a run with other metrics is left out
                cells = [
                    *format_point(points[-1] if points else None),
                    *format_point(run.best(key)),
                ]
                table.add_row(METRICS.get(key, key), escape(run.name), *cells)
        table.add_section()
    console = Console()
    console.print(table)
    console.print(f'plot: {args.out}', soft_wrap=True, markup=False)


def format_point(point: tuple[int, float] | None) -> tuple[str, str]:
    """Return the table cells of a value and its iteration."""
    return ('-', '') if point is None else (f'{point[1]:.4g}', f'{point[0]}')


if __name__ == '__main__':
    main()
