"""Export a model to ONNX, and check the file against the model with onnxruntime.

The file takes RGB images [N, 3, H, W] from 0 to 255 and returns boxes, scores, labels and masks of
detectors, or the segmentation of segmentors; channel order, normalization, padding and NMS are
inside. Batch size, height and width are dynamic if torch can export that.
"""

import argparse
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from mmdense import cli
from mmdense.apis.export import Exported, export_onnx
from mmdense.engine.runner import build_runner, load_weights, unwrap
from mmdense.errors import UserError, warn
from mmdense.export.networks import PARTS

WHAT = dict(backbone='backbone', neck='neck', model='raw')  # deprecated --what -> --part


def parser() -> argparse.ArgumentParser:
    parser = cli.config_parser(__doc__, 'tools/export_onnx.py CONFIG CHECKPOINT --out model.onnx')
    parser.add_argument(
        'checkpoint', nargs='?', help='checkpoint file or URL; without it, weights are random'
    )
    parser.add_argument('--out', required=True, metavar='FILE', help='.onnx file to write')
    parser.add_argument(
        '--part',
        choices=PARTS,
        help='model: boxes, masks or a segmentation (default); raw: the outputs of a dense head, '
        'or logits; neck, backbone: feature maps',
    )
    parser.add_argument(
        '--no-deploy', action='store_true', help="don't export the backbone's inference form"
    )
    parser.add_argument(
        '--dtype', choices=('uint8', 'float32'), default='uint8', help='of images (%(default)s)'
    )
    parser.add_argument(
        '--score', type=cli.share, metavar='S', help="lowest score of boxes (test_cfg's score_thr)"
    )
    parser.add_argument(
        '--iou', type=cli.share, metavar='I', help="IoU threshold of NMS (test_cfg's iou_threshold)"
    )
    parser.add_argument(
        '--max-per-img', type=int, metavar='K', help="most boxes of an image (test_cfg's)"
    )
    parser.add_argument(
        '--fixed', action='store_true', help='fix the batch size at 1, and the image size'
    )
    parser.add_argument(
        '--size',
        nargs=2,
        type=int,
        default=(512, 512),
        metavar=('HEIGHT', 'WIDTH'),
        help='image size of the check, and of the input with --fixed (512 512)',
    )
    for option in ('--deploy', '--normalize'):  # deprecated, always on
        parser.add_argument(option, action='store_true', help=argparse.SUPPRESS)
    parser.add_argument('--what', choices=WHAT, help=argparse.SUPPRESS)
    return parser


@cli.report_errors
def main(argv: Sequence[str] | None = None) -> None:
    args, cfg = cli.parse_config(parser(), argv)
    height, width = args.size
    if min(height, width) < 1:
        raise UserError(f'--size {height} {width}: must be positive')
    if args.max_per_img is not None and args.max_per_img < 1:
        raise UserError(f'--max-per-img {args.max_per_img}: must be positive')
    if args.what:
        warn(f'--what {args.what} is a deprecated alias of --part {WHAT[args.what]}')
    for option in ('deploy', 'normalize'):
        if getattr(args, option):
            warn(f'--{option} is deprecated: it is the default')
    cfg.load_from = None
    runner = build_runner(cfg, loaders=())
    checkpoint = load_weights(runner, args.checkpoint) if args.checkpoint else {}
    exported = export_onnx(
        unwrap(runner.model),
        args.out,
        part=WHAT[args.what] if args.what else args.part,
        config=cfg,
        meta=checkpoint.get('meta'),
        size=(height, width),
        deploy=not args.no_deploy,
        dtype=args.dtype,
        fixed=args.fixed,
        score=args.score,
        iou=args.iou,
        max_per_img=args.max_per_img,
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
    metadata = exported.metadata
    source, resize, settings = (metadata[k] for k in ('input', 'resize', 'postprocessing'))
    lines = []
    if exported.fixed:
        axes = ', '.join(s for s in exported.shapes['images'] if isinstance(s, str))
        lines.append(f'dynamic axes: {axes or "none"}, because {exported.fixed}')
    text = f'{source["dtype"]} RGB from 0 to 255; the file normalizes and pads them'
    if not source['normalized']:
        text = 'normalized as in training: the model has no data preprocessor'
    if resize:
        ratio = ', which keeps the ratio' if resize['keep_ratio'] else ''
        text += f'; resize them to {resize["scale"][0]} x {resize["scale"][1]}{ratio}'
    lines.append(f'images: {text}')
    if exported.unread:
        lines.append(f'not in the metadata: the resizing of images ({exported.unread})')
    if 'score_thr' in settings:
        lines.append(
            f'detections: score above {settings["score_thr"]:g}, NMS at IoU '
            f'{settings["nms_iou"]:g}, at most {settings["max_per_img"]} an image'
        )
    size = f'{exported.bytes / 1e6:.1f} MB'
    return [*lines, f'{exported.file}: {metadata["part"]}, opset {exported.opset}, {size}']


if __name__ == '__main__':
    main()
