"""Print the largest batch that fits a GPU in each memory mode, and the settings for the best."""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mmdense import cli  # sets what torch reads when it is loaded

# isort: split
import torch
from rich.console import Console
from rich.table import Table

from mmdense.benchmark.memory import GB, ModeCost, best_mode, config_changes, plan, usable
from mmdense.config.edit import use_amp
from mmdense.config.image_size import training_size
from mmdense.config.read import load_config
from mmdense.errors import UserError, positive
from mmdense.files import check_writable

ON_A_CPU = (
    ' Estimated from the sizes of tensors on a CPU: the convolution workspaces of cuDNN are not '
    'included.'
)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        **cli.example('tools/plan_memory.py CONFIG --gpu-gb 24 --amp-dtype bfloat16'),
    )
    parser.add_argument('config', help='config file')
    parser.add_argument('--gpu-gb', type=float, help="memory of the GPU (this machine's, or 24)")
    parser.add_argument(
        '--size',
        nargs=2,
        type=positive,
        metavar=('H', 'W'),
        help="of the images (the config's largest)",
    )
    parser.add_argument(
        '--amp-dtype', choices=('float16', 'bfloat16'), help="mixed precision (the config's)"
    )
    parser.add_argument('--modes', nargs='+', help='memory modes (all that the backbone has)')
    cli.add_device(parser)
    parser.add_argument('--json', type=Path, help='write the figures to this file, in bytes')
    cli.add_cfg_options(parser)
    return parser


@cli.report_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if args.device == 'cuda' and not torch.cuda.is_available():
        raise UserError('--device cuda: there is no GPU')
    if args.json:
        check_writable(args.json)
    cfg = load_config(args.config, options=args.cfg_options)
    if args.amp_dtype:
        use_amp(cfg, args.amp_dtype)
    size = tuple(args.size or training_size(cfg))
    here = torch.cuda.get_device_properties(0).total_memory if args.device == 'cuda' else 24 * GB
    gpu_bytes = here if args.gpu_gb is None else args.gpu_gb * GB
    cli.silence_libraries()
    console = Console()
    with console.status('') as status:
        costs = plan(cfg, size=size, modes=args.modes, device=args.device, progress=status.update)
    if args.json:
        modes = [{**asdict(cost), 'seconds': cost.seconds if cost.ran else None} for cost in costs]
        figures = dict(size=size, device=args.device, modes=modes)
        args.json.write_text(json.dumps(figures, indent=1) + '\n')
    console.print(make_table(costs, gpu_bytes))
    console.print(
        f'Training on images of {size[0]} x {size[1]} with {gpu_bytes / GB:.4g} GB, of which '
        f'{usable(gpu_bytes) / GB:.1f} GB are usable: a tenth and 0.6 GB are reserved for '
        'fragmentation and the CUDA context. Distributed training needs the bytes of all gradients '
        'once more. Times are of single steps, per image: a hint.'
        + (ON_A_CPU if args.device == 'cpu' else '')
    )
    smallest = costs[0].smallest
    batch = max((cfg.get('train_dataloader') or {}).get('batch_size', 1), smallest)
    cost = best_mode(costs, gpu_bytes, batch)
    if cost is None:
        sys.exit(
            f'not even a batch of {smallest} fits: try --amp-dtype bfloat16, or a smaller --size'
        )
    batch = min(batch, cost.largest(gpu_bytes))
    changes = ' '.join(config_changes(cfg, cost.mode, batch))
    how = f'with --cfg-options {changes}' if changes else 'with the config as it is'
    console.print(f'A batch of {batch} per GPU fits {how}.', soft_wrap=True, markup=False)


def make_table(costs: Sequence[ModeCost], gpu_bytes: float) -> Table:
    table = Table('memory mode', 'fixed (GB)', 'GB per image', 'largest batch', 'relative time')
    first = next((cost.seconds for cost in costs if cost.ran), math.inf)
    for cost in costs:
        figures = (
            '' if value is None else f'{value / GB:.3g}' for value in (cost.fixed, cost.per_image)
        )
        time = f'{cost.seconds / first:.2f}' if cost.ran else ''
        table.add_row(cost.mode, *figures, str(cost.largest(gpu_bytes)), time)
    return table


if __name__ == '__main__':
    main()
