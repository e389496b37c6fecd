"""Test a trained detector, segmentor or classifier, or an exported file."""

import argparse
from collections.abc import Sequence
from numbers import Real
from typing import Any

from mmdense import cli  # sets what torch reads when it is loaded

# isort: split
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from torch import nn

from mmdense.apis import deploy
from mmdense.apis.classes import num_classes_of
from mmdense.config import edit
from mmdense.datasets.files import check_trained_labels
from mmdense.engine.out_of_memory import explain_out_of_memory
from mmdense.engine.runner import build_runner, load_weights, unwrap
from mmdense.errors import UserError
from mmdense.export.onnx_model import OnnxModel
from mmdense.runtime.results import BasePredictor
from mmdense.visualization.logs import is_empty


def parser() -> argparse.ArgumentParser:
    parser = cli.config_parser(
        __doc__, 'tools/test.py CONFIG CHECKPOINT --deploy --show-dir pictures'
    )
    parser.add_argument('checkpoint', help='checkpoint file or URL, or .onnx file')
    cli.add_min_loaded(parser, of="model's")
    parser.add_argument(
        '--tta', action='store_true', help="test-time augmentation, the config's tta_pipeline"
    )
    parser.add_argument(
        '--out',
        metavar='FILE',
        help='predictions: a .pkl file, or a folder of label maps (segmentation)',
    )
    parser.add_argument(
        '--deploy', action='store_true', help="use the backbone's fastest form: same predictions"
    )
    parser.add_argument('--show-dir', metavar='DIR', help='save images of the predictions here')
    return parser


@cli.report_errors
def main(argv: Sequence[str] | None = None) -> None:
    args, cfg = cli.parse_config(parser(), argv)
    exported = args.checkpoint.endswith('.onnx')
    if exported and (args.tta or args.deploy):
        raise UserError(f'{args.checkpoint} runs as it is: leave out --tta and --deploy')
    if args.tta:
        edit.use_tta(cfg)
    if args.out:
        edit.write_predictions(cfg, args.out)
    if args.show_dir:
        edit.use_show_dir(cfg, args.show_dir)
    cfg.load_from = None
    runner = build_runner(cfg, loaders=('test',), min_loaded=args.min_loaded)
    if exported:
        expected, runner.model = unwrap(runner.model), OnnxModel(args.checkpoint)
        meta = dict(dataset_meta=runner.model.session.metadata)  # has the classes
        check_task(args.checkpoint, runner.model.predictor, expected)
    else:
        meta = load_weights(runner, args.checkpoint).get('meta') or {}
    check_trained_labels(cfg, meta)
    if args.deploy:
        deploy(unwrap(runner.model))
    with explain_out_of_memory(cfg, 'test'):
        metrics = runner.test()
    if runner.rank == 0:
        table = Table('metric', 'value')
        for name, value in metrics.items():
            table.add_row(escape(name), escape(format_metric(name, value)))
        Console().print(table)


def check_task(file: str, predictor: BasePredictor, model: nn.Module) -> None:
    """Raise a UserError if a file predicts something else than the config's model."""
    classes = len(predictor.classes)
    same = predictor.segments == hasattr(model, 'decode_head')
    same = same and predictor.classifies == hasattr(model, 'head')
    if not same or classes not in (0, num_classes_of(model)):
        kind = 'segmentor' if predictor.segments else 'detector'
        kind = 'classifier' if predictor.classifies else kind
        raise UserError(
            f'{file} is a {kind} of {classes} classes, and the config has another model: '
            'pass the config that it was exported with'
        )


def format_metric(name: str, value: Any) -> str:
    if not isinstance(value, Real):  # a metric may return anything
        return ' '.join(str(value).split())
    return '-' if is_empty(name, value) else f'{value:.3f}'


if __name__ == '__main__':
    main()
