"""Train detectors on your own data in COCO's format, compare them, and predict with the best one.

Reads the classes from the annotations, writes DIR/config.py, trains it with each backbone
(tools/benchmark.py sweep), and saves the predictions of the best detector on the validation images
(tools/infer.py) in DIR/best. Run again, it continues where it stopped.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from mmdense import cli
from mmdense.errors import UserError

ROOT = Path(__file__).parents[1]
BASE = ROOT / 'configs/detection/densenet/faster-rcnn_densenet-121_fpn_1x_coco.py'

CONFIG = """\
_base_ = {base!r}

metainfo = dict(classes={classes!r})
train_dataloader = dict(
    dataset=dict(
        metainfo=metainfo,
        data_root={root!r},
        ann_file={train!r},
        data_prefix=dict(img={train_images!r}),
    )
)
val_dataloader = dict(
    dataset=dict(
        metainfo=metainfo,
        data_root={root!r},
        ann_file={val!r},
        data_prefix=dict(img={val_images!r}),
    )
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file={val_file!r})
test_evaluator = val_evaluator
auto_scale_lr = dict(enable=True)  # from the base batch size to the actual one
model = dict(
    neck=dict(in_channels='auto'), roi_head=dict(bbox_head=dict(num_classes={number}))
)
"""


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        **cli.example(
            'tools/own_data.py --data pets --annotations train.json val.json '
            '--images images images -- --epochs 12'
        ),
    )
    parser.add_argument('--data', type=Path, required=True, metavar='DIR', help='data folder')
    parser.add_argument(
        '--annotations',
        nargs=2,
        default=('annotations/instances_train.json', 'annotations/instances_val.json'),
        metavar=('TRAIN', 'VAL'),
        help='annotation files in the data folder (%(default)s)',
    )
    parser.add_argument(
        '--images',
        nargs=2,
        default=('train', 'val'),
        metavar=('TRAIN', 'VAL'),
        help='image folders in the data folder (%(default)s)',
    )
    parser.add_argument(
        '--base', type=Path, default=BASE, help='config of the Faster R-CNN (DenseNet-121, 1x)'
    )
    parser.add_argument(
        '--backbones',
        nargs='+',
        default=['densenet-121', 'timm:resnet50'],
        metavar='NAME',
        help='backbones as in tools/benchmark.py sweep (%(default)s)',
    )
    parser.add_argument(
        '--out',
        type=Path,
        default=Path('work_dirs/own_data'),
        metavar='DIR',
        help='output folder (%(default)s)',
    )
    parser.add_argument(
        'sweep', nargs='*', metavar='OPTION', help='after --: options of tools/benchmark.py sweep'
    )
    return parser


@cli.report_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    train, val = (args.data / file for file in args.annotations)
    for file in (train, val):
        if not file.is_file():
            raise UserError(f'no annotation file {file}: pass --data and --annotations')
    categories = json.loads(train.read_text())['categories']
    classes = tuple(category['name'] for category in categories)
    config = args.out / 'config.py'
    config.parent.mkdir(parents=True, exist_ok=True)
    config.write_text(
        CONFIG.format(
            base=str(args.base.resolve()),
            classes=classes,
            number=len(classes),
            root=f'{args.data}/',
            train=args.annotations[0],
            val=args.annotations[1],
            train_images=f'{args.images[0]}/',
            val_images=f'{args.images[1]}/',
            val_file=str(val),
        )
    )
    sweep = ['sweep', '--config', config, '--out', args.out, '--backbones', *args.backbones]
    run_tool('benchmark', *sweep, *args.sweep)
    rows = json.loads((args.out / 'results.json').read_text())['rows']
    best = max(rows, key=lambda row: row['metrics'].get('box AP', -1))
    checkpoint = (args.out / best['run'] / 'last_checkpoint').read_text().strip()
    images, out = args.data / args.images[1], args.out / 'best'
    run_tool('infer', args.out / best['config'], checkpoint, images, '--out', out)
    Console().print(
        f'best: {best["backbone"]}, box AP {best["metrics"]["box AP"]:.3f}', markup=False
    )


def run_tool(name: str, *arguments: str | Path) -> None:
    """Run tools/NAME.py; exit with its status if it fails."""
    command = [sys.executable, ROOT / f'tools/{name}.py', *arguments]
    status = subprocess.run([str(part) for part in command]).returncode
    if status:
        sys.exit(status)


if __name__ == '__main__':
    main()
