"""Prepare a trained model for deployment, and print the costs of its backbone.

Writes a checkpoint of the weights only, with CondenseNetV2 condensed into group convolutions, and a
config of the same name: `tools/test.py --deploy` and `mmdense.apis.deploy(model)` fold them after
loading.
"""

import argparse
import copy
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mmdense import cli  # sets what torch reads when it is loaded

# isort: split
import torch
from rich.console import Console
from rich.table import Table

from mmdense.apis.deployment import (
    FormCost,
    compare_forms,
    condense,
    deployable,
    deployed_config,
)
from mmdense.engine.runner import build_runner, load_weights, unwrap
from mmdense.errors import UserError, positive
from mmdense.files import check_writable
from mmdense.flops import not_counted
from mmdense.models import CondenseNetV2


def parser() -> argparse.ArgumentParser:
    parser = cli.config_parser(__doc__, 'tools/deploy.py CONFIG CHECKPOINT --out deployed.pth')
    parser.add_argument('checkpoint', help='checkpoint file or URL')
    parser.add_argument('--out', required=True, metavar='FILE', help='.pth file to write')
    parser.add_argument(
        '--size',
        nargs=2,
        type=positive,
        default=(224, 224),
        metavar=('HEIGHT', 'WIDTH'),
        help='of the probe image (224 224)',
    )
    parser.add_argument(
        '--test', action='store_true', help='also test the model in the form that is written'
    )
    return parser


@cli.report_errors
def main(argv: Sequence[str] | None = None) -> None:
    args, cfg = cli.parse_config(parser(), argv)
    out = Path(args.out)
    if out.suffix != '.pth':
        raise UserError(f'--out {out}: must end in .pth; the config goes to the same name in .py')
    inputs = {Path(name).resolve() for name in (args.config, args.checkpoint)}
    if inputs & {out.resolve(), out.with_suffix('.py').resolve()}:
        raise UserError(f'--out {out} would overwrite the config or the checkpoint')
    height, width = args.size
    check_writable(out)
    cfg.load_from = None
    trained = copy.deepcopy(cfg)  # before build_runner() changes it
    runner = build_runner(cfg, loaders=('test',) if args.test else ())
    model = unwrap(runner.model)
    net = deployable(model)[0]
    checkpoint = load_weights(runner, args.checkpoint)
    if isinstance(net, CondenseNetV2):
        costs = condense(model, size=(height, width))
    else:
        costs = compare_forms(model, size=(height, width))
    cfg = deployed_config(trained, net, str(out))
    meta = {**checkpoint.get('meta', {}), 'cfg': cfg.pretty_text}
    torch.save(dict(meta=meta, state_dict=model.state_dict()), out)
    cfg.dump(out.with_suffix('.py'))
    report(costs, height, width)
    written = f'checkpoint: {out}; config: {out.with_suffix(".py")}'
    Console().print(written, soft_wrap=True, markup=False)
    if args.test:
        table = Table('metric', 'value')
        for name, value in runner.test().items():
            table.add_row(name, f'{value:.3f}')
        Console().print(table)


def report(costs: Sequence[FormCost], height: int, width: int) -> None:
    table = Table('form', 'parameters (M)', f'GMACs at {height} x {width}', 'largest difference')
    for cost in costs:
        parameters = '' if cost.parameters is None else f'{cost.parameters / 1e6:.2f}'
        table.add_row(cost.form, parameters, f'{cost.macs / 1e9:.3f}', f'{cost.difference:.1e}')
    console = Console()
    console.print(table)
    console.print(
        'Parameters of the complete model, executed MACs of the backbone; differences are relative '
        'to the largest value of a feature map.'
    )
    unknown = sum((cost.not_counted for cost in costs), Counter())
    if unknown:
        console.print(not_counted(unknown), soft_wrap=True)


if __name__ == '__main__':
    main()
