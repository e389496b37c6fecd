"""Condense a trained CondenseNetV2 model into group convolutions, and say what that cost.

Writes a checkpoint of the condensed form and, beside it, its config.
"""

import copy
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from mmdense.apis import UserError, options, report_errors, run
from mmdense.apis.deploy import condense, deployed_config
from mmdense.models import CondenseNetV2


@report_errors
def main() -> None:
    parser = options.config_parser(__doc__)
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
        '--allow-partial', action='store_true', help='take a model that is not fully pruned'
    )
    parser.add_argument(
        '--tune',
        action='store_true',
        help='time on this machine which convolutions run faster dense, for test.py --deploy',
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
    cfg.load_from = None
    trained = copy.deepcopy(cfg)  # before what only testing wants
    runner = run.build_runner(cfg, loaders=())
    checkpoint = run.load_weights(runner, args.checkpoint)
    model = run.unwrap(runner.model)
    costs = condense(model, size=(height, width), allow_partial=args.allow_partial, tune=args.tune)
    net = next(module for module in model.modules() if isinstance(module, CondenseNetV2))
    cfg = deployed_config(trained, net, str(out))
    meta = {**checkpoint.get('meta', {}), 'cfg': cfg.pretty_text}
    out.parent.mkdir(parents=True, exist_ok=True)
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
    console.print(f'checkpoint: {out}; config: {out.with_suffix(".py")}', soft_wrap=True)


if __name__ == '__main__':
    main()
