"""Print parameters, MACs, activations, times and memory of complete models.

Parameters, MACs and activations are listed by part, for one image. Times and memory are of
inference and of a training step (forward and backward), in interleaved rounds over all configs.
Weights and images are random.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from mmdense import cli
from mmdense.benchmark.timing import machine, measure_configs
from mmdense.config.read import load_config
from mmdense.errors import not_negative, positive
from mmdense.files import check_writable

COLUMNS = dict(
    parameters=('parameters (M)', 1e6), macs=('MACs (G)', 1e9), activations=('activations (M)', 1e6)
)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__,
        **cli.example('tools/get_flops.py configs/detection/rdnet/faster-rcnn_*_1x_coco.py'),
    )
    parser.add_argument('configs', nargs='+', help='config files')
    parser.add_argument(
        '--size',
        nargs=2,
        type=positive,
        metavar=('H', 'W'),
        help="of images (each config's largest)",
    )
    parser.add_argument(
        '--batch', type=positive, default=2, help='of a training step (%(default)s)'
    )
    parser.add_argument(
        '--rounds', type=not_negative, default=10, help='timed runs; 0 only counts (%(default)s)'
    )
    parser.add_argument(
        '--deploy', action='store_true', help="inference with the backbones' deployed form"
    )
    cli.add_device(parser)
    parser.add_argument('--json', type=Path, help='write the figures to this file')
    cli.add_cfg_options(parser)
    return parser


@cli.report_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    if args.json:
        check_writable(args.json)
    cli.silence_libraries()
    cfgs = {path: load_config(path, options=dict(args.cfg_options or {})) for path in args.configs}
    console = Console()
    with console.status('') as status:
        rows = measure_configs(
            cfgs,
            size=tuple(args.size) if args.size else None,
            batch=args.batch,
            rounds=args.rounds,
            deployed=args.deploy,
            device=args.device,
            progress=status.update,
        )
    if args.json:
        record = {**machine(args.device), 'batch': args.batch, 'rounds': args.rounds, 'rows': rows}
        args.json.write_text(json.dumps(record, indent=1) + '\n')
    for row in rows:
        console.print(make_table(row), soft_wrap=True)
        for kind, title in dict(infer='inference', train=f'training, batch {args.batch}').items():
            if figures := row[kind]:
                console.print(
                    f'{title}: median {1e3 * figures["p50"]:.0f} ms, p95 '
                    f'{1e3 * figures["p95"]:.0f} ms, {figures["throughput"]:.3g} images/s, '
                    f'{figures["memory"] / 1e6:.0f} MB',
                    highlight=False,
                )
        if 'error' in row:
            console.print(f'[red]error:[/] {escape(row["error"])}', soft_wrap=True)
    if any('error' in row for row in rows):
        sys.exit(1)


def make_table(row: dict) -> Table:
    """Return the costs of a model's parts, with their shares of the total."""
    size = ' at {} x {}'.format(*row['size']) if row['size'] else ''
    table = Table('part', title=f'{escape(Path(row["config"]).stem)}{size}', title_justify='left')
    for title, _ in COLUMNS.values():
        table.add_column(title, justify='right')
    total = {key: sum(part[key] for part in row['parts'].values()) for key in COLUMNS}
    for name, part in {**row['parts'], 'total': total}.items():
        cells = (
            f'{part[key] / unit:.2f} ({part[key] / (total[key] or 1):4.0%})'
            for key, (_, unit) in COLUMNS.items()
        )
        table.add_row(name, *cells, style='bold' if name == 'total' else None)
    return table


if __name__ == '__main__':
    main()
