"""Make the demo dataset: handwritten digits on photographs, for detection and segmentation.

Its sources come with scikit-learn, so nothing is downloaded. A folder that is up to date stays as
it is; one that was made with other arguments is replaced.
"""

import argparse
from collections.abc import Sequence

from rich.console import Console
from rich.progress import Progress

from mmdense import cli
from mmdense.datasets import make_digits
from mmdense.errors import UserError


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, **cli.example('tools/make_demo_dataset.py --out data/digits')
    )
    parser.add_argument('--out', required=True, metavar='DIR', help='folder to make')
    for name, default, metavar, text in (
        ('--train', 800, 'N', 'number of training images'),
        ('--val', 200, 'N', 'number of validation images'),
        ('--size', 192, 'PX', 'side of the images in pixels'),
        ('--seed', 0, 'N', 'the same seed gives the same files'),
    ):
        parser.add_argument(
            name, type=int, default=default, metavar=metavar, help=f'{text} (%(default)s)'
        )
    return parser


@cli.report_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = vars(parser().parse_args(argv))
    console = Console(soft_wrap=True, highlight=False, markup=False)
    try:
        with Progress(console=console, transient=True, disable=not console.is_terminal) as bar:
            task = bar.add_task('drawing images', total=None)
            data = make_digits(
                args.pop('out'),
                **args,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
            )
    except (ValueError, OSError, ModuleNotFoundError) as error:
        raise UserError(str(error)) from error
    counts = ', '.join(
        f'{data.images[split]} {split} images with {data.instances[split]} digits'
        for split in data.images
    )
    console.print(f'{data.root} {"made" if data.made else "is up to date"}: {counts}')


if __name__ == '__main__':
    main()
