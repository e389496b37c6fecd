"""Prepare a trained model for deployment, and say what its backbone costs deployed.

Writes the weights alone, of a CondenseNetV2 condensed into group convolutions, and the config
beside them: what `tools/test.py --deploy` and `mmdense.apis.deploy(model)` fold after loading.
"""

import copy
from collections import Counter
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from mmdense import cli as options
from mmdense.apis.deployment import compare_forms, condense, deployable, deployed_config
from mmdense.cli import report_errors
from mmdense.engine import runner as run
from mmdense.errors import UserError
from mmdense.files import check_writable
from mmdense.flops import not_counted
from mmdense.models import CondenseNetV2


@report_errors
def main() -> None:
    parser = options.config_parser(__doc__, 'tools/deploy.py CONFIG CHECKPOINT --out deployed.pth')
    parser.add_argument('checkpoint', help='checkpoint file or URL')
    parser.add_argument('--out', required=True, metavar='FILE', help='.pth file to write')
    parser.add_argument(
        '--size',
        nargs=2,
        type=int,
        metavar=('HEIGHT', 'WIDTH'),
        help='of the probe image (224 224); with --tune, that of the images to come',
    )
    parser.add_argument(
        '--allow-partial',
        action='store_true',
        help='take a CondenseNetV2 that is not fully pruned',
    )
    parser.add_argument(
        '--tune',
        action='store_true',
        help='time on this machine which convolutions of a CondenseNetV2 run faster dense',
    )
    args, cfg = options.parse_config(parser)
    out = Path(args.out)
    if out.suffix != '.pth':
        raise UserError(f'--out {out}: must end in .pth; the config goes to the same name in .py')
    inputs = {Path(name).resolve() for name in (args.config, args.checkpoint)}
    if inputs & {out.resolve(), out.with_suffix('.py').resolve()}:
        raise UserError(f'--out {out} would overwrite the config or the checkpoint')
    if args.tune and not args.size:
        raise UserError('--tune needs --size HEIGHT WIDTH: which way is faster depends on it')
    height, width = args.size or (224, 224)
    if min(height, width) < 1:
        raise UserError(f'--size {height} {width}: must be positive')
    check_writable(out)
    cfg.load_from = None
    trained = copy.deepcopy(cfg)  # before what only testing wants
    runner = run.build_runner(cfg, loaders=())
    model = run.unwrap(runner.model)
    size, net = (height, width), deployable(model)[0]
    checkpoint = run.load_weights(runner, args.checkpoint)
    if isinstance(net, CondenseNetV2):
        costs = condense(model, size=size, allow_partial=args.allow_partial, tune=args.tune)
    elif args.allow_partial or args.tune:
        family = type(net).__name__
        raise UserError(f'--allow-partial and --tune are for CondenseNetV2, not for {family}')
    else:
        costs = compare_forms(model, size=size)
    cfg = deployed_config(trained, net, str(out))
    meta = {**checkpoint.get('meta', {}), 'cfg': cfg.pretty_text}
    torch.save(dict(meta=meta, state_dict=model.state_dict()), out)
    cfg.dump(out.with_suffix('.py'))

    table = Table('form', 'parameters (M)', f'GMACs at {height} x {width}', 'largest difference')
    for cost in costs:
        parameters = '' if cost.parameters is None else f'{cost.parameters / 1e6:.2f}'
        table.add_row(cost.form, parameters, f'{cost.macs / 1e9:.3f}', f'{cost.difference:.1e}')
    console = Console()
    console.print(table)
    console.print(
        "Parameters are the whole model's, multiply-adds those that the backbone executes, "
        "differences a share of a map's largest value."
    )
    unknown = sum((cost.not_counted for cost in costs), Counter())
    if unknown:
        console.print(not_counted(unknown), soft_wrap=True)
    written = f'checkpoint: {out}; config: {out.with_suffix(".py")}'
    console.print(written, soft_wrap=True, markup=False)


if __name__ == '__main__':
    main()
