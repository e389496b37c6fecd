"""Make the demo dataset: handwritten digits on photographs, for detection and segmentation.

Its sources come with scikit-learn, so nothing is downloaded. A folder that is up to date stays as
it is; one that was made with other arguments is replaced. --crops cuts the digits out, for
classification.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image
from rich.console import Console
from rich.progress import Progress

from mmdense import cli
from mmdense.datasets import make_digits
from mmdense.errors import UserError

CROP = 48  # pixels, of the images of single digits


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
    parser.add_argument(
        '--crops', metavar='DIR', help='also write each digit into a folder of its class, in DIR'
    )
    return parser


@cli.report_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = vars(parser().parse_args(argv))
    crops = args.pop('crops')
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
    if crops:
        for split in data.images:
            crop_digits(data.root, split, Path(crops, split))
        console.print(f'{crops} made: {CROP} x {CROP} pixels around each digit')


def crop_digits(root: Path, split: str, out: Path) -> None:
    """Write a square around each annotated digit to OUT/DIGIT."""
    content = json.loads((root / f'annotations/instances_{split}.json').read_text())
    files = {image['id']: root / split / image['file_name'] for image in content['images']}
    names = {category['id']: category['name'] for category in content['categories']}
    for digit in content['annotations']:
        x, y, width, height = digit['bbox']
        half = 0.6 * max(width, height)
        x, y = x + width / 2, y + height / 2
        box = tuple(map(round, (x - half, y - half, x + half, y + half)))
        file = out / names[digit['category_id']] / f'{digit["id"]:06}.png'
        file.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(files[digit['image_id']]) as image:
            image.crop(box).resize((CROP, CROP), Image.Resampling.BILINEAR).save(file)


if __name__ == '__main__':
    main()
