"""Plot the losses and metrics of several trainings in one picture."""

import argparse

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmdense import cli as options
from mmdense.cli import report_errors
from mmdense.visualization import logs as pictures


@report_errors
def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        **options.example('tools/plot_log.py work_dirs/a work_dirs/b --keys loss mIoU'),
    )
    parser.add_argument(
        'work_dirs', nargs='+', metavar='WORK_DIR', help='folder that a training logged to'
    )
    parser.add_argument(
        '--out',
        default='runs.png',
        metavar='FILE',
        help='picture, .png, .svg or .pdf (%(default)s)',
    )
    parser.add_argument(
        '--keys',
        nargs='+',
        metavar='KEY',
        help='what to draw, by its name in the log (the loss, and the metrics that there are)',
    )
    args = parser.parse_args()
    runs = pictures.read_runs(args.work_dirs)
    keys = pictures.plot_runs(runs, args.out, keys=args.keys)
    table = Table('figure')
    table.add_column('run', overflow='fold')
    for title in ('last', 'iteration', 'best', 'iteration'):
        table.add_column(title, justify='right')
    for key in keys:
        for run in runs:
            points = run.series(key)
            if points or not run.metrics:  # those with other metrics are left out
                cells = [*show(points[-1] if points else None), *show(run.best(key))]
                table.add_row(pictures.METRICS.get(key, key), escape(run.name), *cells)
        table.add_section()
    console = Console()
    console.print(table)
    console.print(f'picture: {args.out}', soft_wrap=True, markup=False)


def show(point: tuple[int, float] | None) -> tuple[str, str]:
    """Return the cells of a value and its iteration."""
    return ('-', '') if point is None else (f'{point[1]:.4g}', f'{point[0]}')


if __name__ == '__main__':
    main()
