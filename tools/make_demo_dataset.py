"""Make the demo dataset: handwritten digits on photographs, for detection and segmentation."""

import argparse
import sys

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from mmdense.datasets import make_digits


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog='Everything comes with scikit-learn, nothing is downloaded. The folder is left '
        'alone if it is up to date, and remade if it was made with other arguments. '
        'Example: python tools/make_demo_dataset.py --out data/digits',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        '--out', required=True, default=argparse.SUPPRESS, metavar='DIR', help='folder to make'
    )
    parser.add_argument('--train', type=int, default=800, metavar='N', help='training images')
    parser.add_argument('--val', type=int, default=200, metavar='N', help='validation images')
    parser.add_argument(
        '--size', type=int, default=192, metavar='PX', help='side of the images in pixels'
    )
    parser.add_argument(
        '--seed', type=int, default=0, metavar='N', help='the same seed gives the same files'
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code: 0, or 2 for what the user can mend."""
    args = parse_args(argv)
    console = Console()
    bar = Progress(
        TextColumn('{task.description}'),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        # In a log file the summary is enough.
        disable=not console.is_terminal,
    )
    try:
        with bar:
            task = bar.add_task('drawing images', total=None, visible=False)
            data = make_digits(
                args.out,
                train=args.train,
                val=args.val,
                size=args.size,
                seed=args.seed,
                progress=lambda done, total: bar.update(
                    task, completed=done, total=total, visible=True
                ),
            )
    except (ValueError, OSError, ModuleNotFoundError) as error:
        Console(stderr=True, soft_wrap=True).print(f'[red]error:[/] {escape(str(error))}')
        return 2
    counts = ', '.join(
        f'{data.images[split]} {split} images with {data.instances[split]} digits'
        for split in data.images
    )
    state = 'made' if data.made else 'is up to date'
    console.print(f'{escape(str(data.root))} {state}: {counts}', soft_wrap=True, highlight=False)
    return 0


if __name__ == '__main__':
    sys.exit(main())
