"""Write a model's networks as an ONNX file, and compare it with the model by onnxruntime.

A detector is written up to its neck, a dense one-stage detector (RetinaNet, SSD) up to its raw
scores and boxes, a segmentor up to its logits for whole images, whatever its test_cfg. What comes
behind is not in the file: proposals, anchors, box decoding, NMS and masks are up to the caller, and
so is the preprocessing, which is printed. Batch, height and width are left open where torch can
export that.
"""

from rich.console import Console
from rich.table import Table

from mmdense import cli as options
from mmdense.apis.export import PARTS, TOLERANCE, Exported, export_onnx
from mmdense.cli import report_errors
from mmdense.engine import runner as run
from mmdense.errors import UserError

BEHIND = dict(
    backbone='maps alone: necks and heads are not in the file',
    neck='maps alone: proposals, boxes, NMS and masks are not in the file',
    model='raw: scores and boxes are not decoded; anchors, sigmoid or softmax, and NMS are up to '
    'the caller',
    logits='logits, before softmax or sigmoid; the largest along axis 1 is the class',
    depth="depths, in the labels' unit",
)


def describe(done: Exported) -> list[str]:
    images = ', '.join(' x '.join(map(str, check.image)) for check in done.checks)
    largest = max(max(check.differences.values()) for check in done.checks)
    kind = next((name for name in ('logits', 'depth') if name in done.shapes), done.part)
    lines = [
        f'checked against the model on batches of {images}: differs by {largest:.1e} of an '
        f"output's largest value at most (allowed: {TOLERANCE:.0e})",
        f'image: {preprocessing(done)}',
        f'outputs: {BEHIND[kind]}',
        f'{done.file}: {done.part}, opset {done.opset}, {done.bytes / 1e6:.1f} MB',
    ]
    if done.fixed:
        open_sides = [str(side) for side in done.shapes['image'] if isinstance(side, str)]
        lines.insert(0, f'open: {", ".join(open_sides) or "nothing"}, as {done.fixed}')
    return lines


def preprocessing(done: Exported) -> str:
    said = done.preprocessing
    order = f'{said.channels} ' if said.channels else ''
    if done.normalized:
        text = f'{order}pixels from 0 to 255; the file normalizes them'
    elif said.mean:
        mean, std = (', '.join(f'{v:g}' for v in values) for values in (said.mean, said.std))
        text = f'{order}pixels from 0 to 255, minus ({mean}), divided by ({std})'
    else:
        text = f'{order}pixels as the network was trained on: the model names no mean'
    if said.multiple > 1:
        by = 'the mean' if done.normalized else 'zeros'
        text += f'; {by} on the right and below up to multiples of {said.multiple}, as in training'
    return text


@report_errors
def main() -> None:
    parser = options.config_parser(
        __doc__, 'tools/export_onnx.py CONFIG CHECKPOINT --out model.onnx --deploy'
    )
    parser.add_argument(
        'checkpoint', nargs='?', help='checkpoint file or URL; random weights without'
    )
    parser.add_argument('--out', required=True, metavar='FILE', help='.onnx file to write')
    parser.add_argument('--what', choices=PARTS, help='how much of the model (as much as can be)')
    parser.add_argument(
        '--size',
        nargs=2,
        type=int,
        default=(512, 512),
        metavar=('HEIGHT', 'WIDTH'),
        help='of images that the file is checked with (512 512)',
    )
    parser.add_argument(
        '--fixed', action='store_true', help='for one image of that size and no other'
    )
    parser.add_argument(
        '--deploy', action='store_true', help="write the backbone's form for deployment"
    )
    parser.add_argument(
        '--normalize', action='store_true', help='let the file subtract mean and divide by std'
    )
    args, cfg = options.parse_config(parser)
    height, width = args.size
    if min(height, width) < 1:
        raise UserError(f'--size {height} {width}: must be positive')
    cfg.load_from = None
    runner = run.build_runner(cfg, loaders=())
    if args.checkpoint:
        run.load_weights(runner, args.checkpoint)
    done = export_onnx(
        run.unwrap(runner.model),
        args.out,
        part=args.what,
        size=(height, width),
        deploy=args.deploy,
        fixed=args.fixed,
        normalize=args.normalize,
    )
    table = Table('name', 'shape', 'largest difference')
    for name, shape in done.shapes.items():
        differences = [c.differences[name] for c in done.checks if name in c.differences]
        table.add_row(
            name, ' x '.join(map(str, shape)), f'{max(differences):.1e}' if differences else ''
        )
    console = Console()
    console.print(table)
    if not args.checkpoint:
        console.print('weights: random, of use for measuring alone; name a CHECKPOINT for others')
    for line in describe(done):
        console.print(line, soft_wrap=True, markup=False, highlight=False, emoji=False)


if __name__ == '__main__':
    main()
