"""From a folder of one's own data in COCO's format to trained detectors, a report and pictures.

Reads the classes from the annotations, writes a config, trains it with each backbone
(tools/benchmark.py sweep), and draws what the best one sees on the validation images
(tools/infer.py). Begun again, it goes on where it was.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

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
auto_scale_lr = dict(enable=True)  # from the batch of the base to the real one
model = dict(
    neck=dict(in_channels='auto'), roi_head=dict(bbox_head=dict(num_classes={number}))
)
"""


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog='example: python tools/own_data.py --data pets --annotations train.json val.json '
        '--images images images -- --epochs 12',
    )
    parser.add_argument('--data', type=Path, required=True, help='folder of the data')
    parser.add_argument(
        '--annotations',
        nargs=2,
        default=('annotations/instances_train.json', 'annotations/instances_val.json'),
        metavar=('TRAIN', 'VAL'),
        help='annotation files in it',
    )
    parser.add_argument(
        '--images',
        nargs=2,
        default=('train', 'val'),
        metavar=('TRAIN', 'VAL'),
        help='image folders',
    )
    parser.add_argument('--base', type=Path, default=BASE, help='Faster R-CNN to start from')
    parser.add_argument('--backbones', nargs='+', default=['densenet-121', 'timm:resnet50'])
    parser.add_argument('--out', type=Path, default=Path('work_dirs/own_data'))
    parser.add_argument(
        'sweep', nargs='*', metavar='OPTION', help='behind --: options of the sweep'
    )
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    train, val = (args.data / file for file in args.annotations)
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
    run('tools/benchmark.py', *sweep, *args.sweep)
    rows = json.loads((args.out / 'results.json').read_text())['rows']
    best = max(rows, key=lambda row: row['metrics'].get('box AP', -1))
    checkpoint = (args.out / best['run'] / 'last_checkpoint').read_text().strip()
    images = args.data / args.images[1]
    config = args.out / best['config']
    run('tools/infer.py', config, checkpoint, images, '--out', args.out / 'best')
    sys.stdout.write(f'best: {best["backbone"]}, box AP {best["metrics"]["box AP"]:.3f}\n')


def run(script: str, *arguments: str | Path) -> None:
    """Run one of the tools; end with its status if it fails."""
    done = subprocess.run([sys.executable, str(ROOT / script), *map(str, arguments)])
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == '__main__':
    main()
