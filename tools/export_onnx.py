"""Export a model to ONNX, and check the file against the model with onnxruntime.

The file takes RGB images [N, 3, H, W] from 0 to 255 and returns boxes, scores, labels and masks of
detectors, the segmentation of segmentors, or the scores of classes; channel order, normalization,
padding and NMS are inside. Batch size, height and width are dynamic if torch can export that. The
file is compared with the model's predictions on images of the test data, if there are some.
"""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from mmdense import cli  # sets what torch reads when it is loaded

# isort: split
from mmengine.dataset import pseudo_collate
from mmengine.runner import Runner
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mmdense.apis.export import Exported, export_onnx
from mmdense.benchmark.timing import inference_run, measure
from mmdense.engine.runner import build_runner, load_weights, unwrap
from mmdense.errors import UserError, positive, warn
from mmdense.export.check import check_file, find_images
from mmdense.export.networks import PARTS
from mmdense.export.onnx_model import OnnxModel
from mmdense.visualization.logs import METRIC_NAMES, main_metrics

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
        help='model: boxes, masks, a segmentation or classes (default); raw: the outputs of a '
        'dense head, or logits; neck, backbone: feature maps',
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
        '--max-per-img', type=positive, metavar='K', help="most boxes of an image (test_cfg's)"
    )
    parser.add_argument(
        '--fixed', action='store_true', help='fix the batch size at 1, and the image size'
    )
    parser.add_argument(
        '--size',
        nargs=2,
        type=positive,
        default=(512, 512),
        metavar=('HEIGHT', 'WIDTH'),
        help='image size of the check, and of the input with --fixed (512 512)',
    )
    parser.add_argument(
        '--half', action='store_true', help='also write NAME-half.onnx, which computes in float16'
    )
    parser.add_argument(
        '--int8',
        type=positive,
        metavar='N',
        help='also write NAME-int8.onnx, calibrated on N training images',
    )
    parser.add_argument(
        '--rounds',
        type=positive,
        default=20,
        help='timed runs with --half and --int8 (%(default)s)',
    )
    for option in ('--deploy', '--normalize'):  # deprecated, always on
        parser.add_argument(option, action='store_true', help=argparse.SUPPRESS)
    parser.add_argument('--what', choices=WHAT, help=argparse.SUPPRESS)
    return parser


@cli.report_errors
def main(argv: Sequence[str] | None = None) -> None:
    args, cfg = cli.parse_config(parser(), argv)
    if args.what and args.part:
        raise UserError('--what is a deprecated alias of --part: give one of them')
    if args.what:
        warn(f'--what {args.what} is a deprecated alias of --part {WHAT[args.what]}')
    for option in ('deploy', 'normalize'):
        if getattr(args, option):
            warn(f'--{option} is deprecated: it is the default')
    cfg.load_from = None
    part = WHAT[args.what] if args.what else args.part
    lower = args.half or args.int8 is not None
    if lower and part not in (None, 'model'):
        raise UserError(f'--half and --int8 are of complete models, not of --part {part}')
    images = find_images(cfg) if lower else []
    calibration = find_images(cfg, args.int8, 'train') if args.int8 is not None else []
    if args.int8 is not None and args.int8 > len(calibration):
        raise UserError(f'--int8 {args.int8}: the training data have {len(calibration)} images')
    runner = build_runner(cfg, loaders=('test',) if images else ())
    checkpoint = load_weights(runner, args.checkpoint) if args.checkpoint else {}
    exported = export_onnx(
        unwrap(runner.model),
        args.out,
        part=part,
        config=cfg,
        meta=checkpoint.get('meta'),
        size=tuple(args.size),
        deploy=not args.no_deploy,
        dtype=args.dtype,
        fixed=args.fixed,
        score=args.score,
        iou=args.iou,
        max_per_img=args.max_per_img,
    )
    table = Table('name', 'shape', 'largest difference')
    for name, shape in exported.shapes.items():
        value = exported.differences.get(name)
        table.add_row(name, ' x '.join(map(str, shape)), '' if value is None else f'{value:.1e}')
    console = Console()
    console.print(table)
    if not args.checkpoint:
        console.print('weights: random, for measurements only; pass a CHECKPOINT to use the model')
    options = dict(soft_wrap=True, markup=False, highlight=False, emoji=False)
    for line in describe(exported):
        console.print(line, **options)
    if lower:
        files = dict(float32=exported.file)
        for name, wanted in (('half', args.half), ('int8', args.int8)):
            if wanted:
                file = files[name] = exported.file.with_stem(f'{exported.file.stem}-{name}')
                found = convert(exported, file, images, calibration if name == 'int8' else ())
                console.print(f'{file}: {describe_differences(found)}', **options)
        console.print(compare(files, runner, args.rounds if images else 0))


def convert(
    exported: Exported, file: Path, images: Sequence[Tensor], calibration: Sequence[Tensor]
) -> Mapping[str, float]:
    """Write a file of lower precision, and return its differences from the model."""
    from mmdense.export.quantize import to_half, to_int8  # imports onnx

    if calibration:
        to_int8(exported.file, file, calibration)
    else:
        to_half(exported.file, file)
    try:
        return check_file(file, exported.network, exported.batches, images)
    except UserError as error:
        file.unlink()
        raise UserError(f'{file} was not written: {error}') from error


def compare(files: dict[str, Path], runner: Runner, rounds: int) -> Table:
    """Return a table of the files' sizes, metrics and times; without rounds, of their sizes."""
    cli.silence_libraries()
    models = {name: OnnxModel(file) for name, file in files.items()}
    metrics, times = {}, {}
    if rounds:
        for name, model in models.items():
            runner.model = model
            metrics[name] = {METRIC_NAMES.get(k, k): v for k, v in runner.test().items()}
        data = runner.test_dataloader.dataset
        batches = [pseudo_collate([data[i]]) for i in range(min(rounds, len(data)))]
        runs = {
            name: inference_run(model, lambda number: batches[number % len(batches)])
            for name, model in models.items()
        }
        times = measure(runs, rounds=rounds, device='cpu')
    columns = main_metrics(metrics.get('float32', {}))
    table = Table('', 'MB', *columns, *(['ms an image', 'speed (fastest: 1)'] if rounds else []))
    for name, file in files.items():
        cells = [f'{file.stat().st_size / 1e6:.1f}']
        cells += [f'{metrics[name][column]:.3f}' for column in columns]
        if rounds:
            cells += [f'{1e3 * times[name]["p50"]:.1f}', f'{times[name]["ratio"]:.2f}']
        table.add_row(name, *cells)
    return table


def describe_differences(differences: Mapping[str, float]) -> str:
    values = (f'{name} {value:.1g}' for name, value in differences.items())
    return f'largest differences from the model: {", ".join(values)}'


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
    if resize and 'edge' in resize:
        text += f'; resize their edge ({resize["edge"]}) to {resize["scale"]}'
    elif resize:
        ratio = ', which keeps the ratio' if resize['keep_ratio'] else ''
        text += f'; resize them to {resize["scale"][0]} x {resize["scale"][1]}{ratio}'
    if metadata['crop']:
        text += f'; crop the centre, {metadata["crop"][0]} x {metadata["crop"][1]}'
    lines.append(f'images: {text}')
    if exported.unread:
        lines.append(f'resize images yourself, mmdense.runtime does not: {exported.unread}')
    if 'score_thr' in settings:
        nms = 'no NMS' if settings['nms_iou'] is None else f'NMS at IoU {settings["nms_iou"]:g}'
        lines.append(
            f'detections: score above {settings["score_thr"]:g}, {nms}, at most '
            f'{settings["max_per_img"]} an image'
        )
    differences = describe_differences(exported.differences)
    batches = ', '.join(' x '.join(map(str, batch)) for batch in exported.batches)
    lines.append(f'{differences}, on batches of {batches}')
    size = f'{exported.bytes / 1e6:.1f} MB'
    return [*lines, f'{exported.file}: {metadata["part"]}, opset {exported.opset}, {size}']


if __name__ == '__main__':
    main()
