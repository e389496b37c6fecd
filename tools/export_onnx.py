"""Export a model to ONNX, and check the file against the model with onnxruntime.

Detectors are exported up to the neck, dense one-stage detectors (RetinaNet, SSD) up to their raw
scores and boxes, and segmentors up to the logits of the complete image, whatever their test_cfg.
The rest is up to the caller: proposals, anchors, box decoding, NMS, masks, and the preprocessing,
which the command prints. Batch size, height and width are dynamic if torch can export that.
"""

import argparse
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from mmdense import cli
from mmdense.apis.export import PARTS, TOLERANCE, Exported, export_onnx
from mmdense.engine.runner import build_runner, load_weights, unwrap
from mmdense.errors import UserError

OUTPUTS = dict(
    backbone='feature maps: necks and heads are not in the file',
    neck='feature maps: proposals, boxes, NMS and masks are not in the file',
    model='raw scores and boxes: anchors, box decoding, sigmoid or softmax, and NMS are not in the '
    'file',
    logits='logits, before softmax or sigmoid: the largest along axis 1 is the class',
    logit='logits of class 1: it is predicted where their sigmoid exceeds decode_head.threshold, '
    'and class 0 elsewhere',
    depth='depth, in the unit of the labels',
)


def parser() -> argparse.ArgumentParser:
    parser = cli.config_parser(
        __doc__, 'tools/export_onnx.py CONFIG CHECKPOINT --out model.onnx --deploy'
    )
    parser.add_argument(
        'checkpoint', nargs='?', help='checkpoint file or URL; without it, weights are random'
    )
    parser.add_argument('--out', required=True, metavar='FILE', help='.onnx file to write')
    parser.add_argument(
        '--what', choices=PARTS, help='part of the model (as much as can be exported)'
    )
    parser.add_argument(
        '--size',
        nargs=2,
        type=int,
        default=(512, 512),
        metavar=('HEIGHT', 'WIDTH'),
        help='image size of the check (512 512)',
    )
    parser.add_argument(
        '--fixed', action='store_true', help='fix the batch size at 1, and the image size'
    )
    parser.add_argument(
        '--deploy', action='store_true', help="export the backbone's form for deployment"
    )
    parser.add_argument(
        '--normalize', action='store_true', help='subtract mean and divide by std in the file'
    )
    return parser


@cli.report_errors
def main(argv: Sequence[str] | None = None) -> None:
    args, cfg = cli.parse_config(parser(), argv)
    height, width = args.size
    if min(height, width) < 1:
        raise UserError(f'--size {height} {width}: must be positive')
    cfg.load_from = None
    runner = build_runner(cfg, loaders=())
    if args.checkpoint:
        load_weights(runner, args.checkpoint)
    exported = export_onnx(
        unwrap(runner.model),
        args.out,
        part=args.what,
        size=(height, width),
        deploy=args.deploy,
        fixed=args.fixed,
        normalize=args.normalize,
    )
    table = Table('name', 'shape', 'largest difference')
    for name, shape in exported.shapes.items():
        differences = [check[name] for check in exported.checks.values() if name in check]
        table.add_row(
            name, ' x '.join(map(str, shape)), f'{max(differences):.1e}' if differences else ''
        )
    console = Console()
    console.print(table)
    if not args.checkpoint:
        console.print('weights: random, for measurements only; pass a CHECKPOINT to use the model')
    for line in describe(exported):
        console.print(line, soft_wrap=True, markup=False, highlight=False, emoji=False)


def describe(exported: Exported) -> list[str]:
    batches = ', '.join(' x '.join(map(str, batch)) for batch in exported.checks)
    largest = max(max(check.values()) for check in exported.checks.values())
    kind = next((name for name in ('logits', 'depth') if name in exported.shapes), exported.part)
    if kind == 'logits' and exported.shapes[kind][1] == 1:
        kind = 'logit'
    lines = []
    if exported.fixed:
        axes = ', '.join(s for s in exported.shapes['image'] if isinstance(s, str))
        lines.append(f'dynamic axes: {axes or "none"}, because {exported.fixed}')
    return [
        *lines,
        f'checked against the model on batches of {batches}: the largest difference is '
        f"{largest:.1e} of an output's largest value (allowed: {TOLERANCE:.0e})",
        f'image: {describe_preprocessing(exported)}',
        f'outputs: {OUTPUTS[kind]}',
        f'{exported.file}: {exported.part}, opset {exported.opset}, {exported.bytes / 1e6:.1f} MB',
    ]


def describe_preprocessing(exported: Exported) -> str:
    preprocessing = exported.preprocessing
    order = f'{preprocessing.channels} ' if preprocessing.channels else ''
    if exported.normalized:
        text = f'{order}pixels from 0 to 255; the file normalizes them'
    elif preprocessing.mean:
        mean, std = (
            ', '.join(f'{v:g}' for v in values)
            for values in (preprocessing.mean, preprocessing.std)
        )
        text = f'{order}pixels from 0 to 255, minus ({mean}), divided by ({std})'
    else:
        text = f'{order}pixels as in training: the model has no mean and std'
    if preprocessing.multiple > 1:
        value = 'the mean' if exported.normalized else 'zeros'
        text += (
            f'; padded with {value} at the right and bottom to multiples of '
            f'{preprocessing.multiple}'
        )
    return text


if __name__ == '__main__':
    main()
