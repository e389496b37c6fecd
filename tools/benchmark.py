"""Measure what backbones cost and give: side by side, and in whole models."""

import argparse
import json
import math
import os
import shlex
import signal
import sys
import warnings
from dataclasses import asdict
from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress
from rich.table import Table

from mmdense import cli as options
from mmdense.benchmark.backbones import named_backbone
from mmdense.benchmark.memory import GB, batch_size, best, plan, settings, usable
from mmdense.benchmark.sweep import Sweep, set_length
from mmdense.benchmark.timing import machine, measure_configs
from mmdense.cli import report_errors
from mmdense.config.edit import use_amp
from mmdense.config.image_size import training_size
from mmdense.config.read import load_config
from mmdense.datasets import make_digits
from mmdense.errors import UserError
from mmdense.files import check_writable

ROOT = Path(__file__).parents[1]
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
DEMO = ROOT / 'configs/detection/demo/faster-rcnn_rdnet-nano_fpn_8e_digits.py'
DEMO_DATA = Path('data/digits')
COLUMNS = dict(
    parameters=('parameters (M)', 1e6),
    macs=('multiply-adds (G)', 1e9),
    activations=('activations (M)', 1e6),
)


@report_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    add_memory(commands)
    add_cost(commands)
    add_sweep(commands)
    args = parser.parse_args()
    args.run(args)


def add_memory(commands: argparse._SubParsersAction) -> None:
    memory = commands.add_parser(
        'memory',
        help='say which batch each memory mode of a config fits into a GPU',
        **options.example('tools/benchmark.py memory CONFIG --gpu-gb 24 --amp-dtype bfloat16'),
    )
    memory.add_argument('config', help='config file')
    memory.add_argument('--gpu-gb', type=float, help="the GPU's memory (that of this one, or 24)")
    memory.add_argument(
        '--size', nargs=2, type=int, metavar=('H', 'W'), help="of the images (the config's largest)"
    )
    memory.add_argument(
        '--amp-dtype', choices=('float16', 'bfloat16'), help="mixed precision (the config's)"
    )
    memory.add_argument('--modes', nargs='+', help='memory modes (all that the backbone has)')
    memory.add_argument('--device', choices=('cpu', 'cuda'), default=DEVICE)
    memory.add_argument('--json', type=Path, help='write the figures to this file, in bytes')
    options.add_cfg_options(memory)
    memory.set_defaults(run=run_memory)


def add_cost(commands: argparse._SubParsersAction) -> None:
    cost = commands.add_parser(
        'cost',
        help='say what whole models cost, part by part',
        description='Parameters, executed multiply-adds and activations of each part for one\n'
        'image, and the times and memory of inference and of a training step (forward and\n'
        'backward), in interleaved rounds over all configs. Weights and images are random.',
        **options.example(
            'tools/benchmark.py cost configs/detection/rdnet/faster-rcnn_*_1x_coco.py --rounds 0'
        ),
    )
    cost.add_argument('configs', nargs='+', help='config files')
    cost.add_argument(
        '--size', nargs=2, type=int, metavar=('H', 'W'), help="of images (each config's largest)"
    )
    cost.add_argument('--batch', type=int, default=2, help='of a training step (%(default)s)')
    cost.add_argument('--rounds', type=int, default=10, help='timed runs; 0 counts alone (10)')
    cost.add_argument(
        '--deploy', action='store_true', help="predict with the backbones' fastest form"
    )
    cost.add_argument('--device', choices=('cpu', 'cuda'), default=DEVICE)
    cost.add_argument('--json', type=Path, help='write the figures to this file')
    options.add_cfg_options(cost)
    cost.set_defaults(run=run_cost)


def add_sweep(commands: argparse._SubParsersAction) -> None:
    sweep = commands.add_parser(
        'sweep',
        help='train and test a config with one backbone after the other, and report',
        description='The same head, data and schedule with each backbone: trained, tested and\n'
        'measured, then written to DIR/report.html, report.md, results.json and results.csv.\n'
        'Begun again with the same settings, it goes on where it was. A CondenseNetV2 that\n'
        'starts from nothing learns its connections on the way.',
        **options.example(
            'tools/benchmark.py sweep --backbones configs/detection/demo/*.py timm:resnet10t'
        ),
    )
    sweep.add_argument(
        '--backbones',
        nargs='+',
        required=True,
        metavar='NAME',
        help='FAMILY-ARCH such as rdnet-t, timm:NETWORK, or a config file whose backbone is taken',
    )
    sweep.add_argument('--config', default=str(DEMO), help='what they are put into (the demo)')
    sweep.add_argument('--out', type=Path, metavar='DIR', help='folder (work_dirs/sweep-CONFIG)')
    sweep.add_argument('--data-root', metavar='DIR', help='where the data are')
    sweep.add_argument('--epochs', type=int, metavar='N', help="length of training (the config's)")
    sweep.add_argument('--iters', type=int, metavar='N', help='the same, if it counts iterations')
    start = sweep.add_mutually_exclusive_group()
    start.add_argument(
        '--pretrained', action='store_true', help="start from ImageNet weights (as the config's)"
    )
    start.add_argument('--from-scratch', action='store_true', help='start from random weights')
    sweep.add_argument(
        '--gpus', type=int, default=1, metavar='N', help='train on so many, by torchrun'
    )
    sweep.add_argument(
        '--size', nargs=2, type=int, metavar=('H', 'W'), help='to count for (the largest images)'
    )
    sweep.add_argument('--rounds', type=int, default=20, help='timed runs of each (%(default)s)')
    sweep.add_argument('--pictures', type=int, default=6, help='images to draw (%(default)s)')
    sweep.add_argument('--device', choices=('cpu', 'cuda'), default=DEVICE, help='to measure on')
    options.add_cfg_options(sweep)
    sweep.set_defaults(run=run_sweep)


def run_cost(args: argparse.Namespace) -> None:
    if args.json:
        check_writable(args.json)
    be_quiet()
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
        console.print(cost_table(row), soft_wrap=True)
        for kind, title in dict(infer='inference', train=f'training, batch {args.batch}').items():
            if found := row[kind]:
                console.print(
                    f'{title}: median {1e3 * found["p50"]:.0f} ms, p95 {1e3 * found["p95"]:.0f} '
                    f'ms, {found["throughput"]:.3g} images/s, {found["memory"] / 1e6:.0f} MB',
                    highlight=False,
                )
        if 'error' in row:
            console.print(f'[red]error:[/] {escape(row["error"])}', soft_wrap=True)
    if any('error' in row for row in rows):
        sys.exit(1)


def cost_table(row: dict) -> Table:
    """Return what the parts of a config cost, with their shares of the whole."""
    at = ' at {} x {}'.format(*row['size']) if row['size'] else ''
    table = Table('part', title=f'{escape(Path(row["config"]).stem)}{at}', title_justify='left')
    for title, _ in COLUMNS.values():
        table.add_column(title, justify='right')
    whole = {key: sum(part[key] for part in row['parts'].values()) for key in COLUMNS}
    for name, part in {**row['parts'], 'whole': whole}.items():
        cells = (
            f'{part[key] / unit:.2f} ({part[key] / (whole[key] or 1):4.0%})'
            for key, (_, unit) in COLUMNS.items()
        )
        table.add_row(name, *cells, style='bold' if name == 'whole' else None)
    return table


def run_sweep(args: argparse.Namespace) -> None:
    config_options = dict(args.cfg_options or {})
    if args.data_root:
        config_options['data_root'] = args.data_root
    cfg = load_config(args.config, options=config_options)
    set_length(cfg, epochs=args.epochs, iters=args.iters)
    own = (cfg.model.get('backbone') or {}).get('init_cfg') is not None
    pretrained = args.pretrained or (own and not args.from_scratch)
    detects = cfg.get('default_scope') != 'mmseg'
    backbones = [
        named_backbone(name, pretrained=pretrained, detects=detects) for name in args.backbones
    ]
    folder = args.out or Path('work_dirs', f'sweep-{Path(args.config).stem}')
    command = f'python tools/benchmark.py {" ".join(map(shlex.quote, sys.argv[1:]))}'
    sweep = Sweep(
        cfg,
        backbones,
        folder,
        command=command,
        pretrained=pretrained,
        gpus=args.gpus,
        size=tuple(args.size) if args.size else None,
    )
    make_demo_data(cfg)
    train, test = ([sys.executable, str(ROOT / f'tools/{name}.py')] for name in ('train', 'test'))
    if args.gpus > 1:
        processes = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={args.gpus}']
        train = [sys.executable, *processes, *train[1:], '--launcher', 'pytorch']
    be_quiet()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # takes the training along, as Ctrl-C
    console = Console()
    bars = Progress('{task.description}', BarColumn(), '{task.fields[state]}', console=console)
    with bars:
        tasks = {b.name: bars.add_task(b.name, total=1.0, state='waiting') for b in backbones}
        sweep.train(
            train,
            test,
            progress=lambda told: bars.update(
                tasks[told.name], completed=told.share, state=escape(told.state)
            ),
        )
    with console.status('') as status:
        sweep.measure(
            rounds=args.rounds,
            pictures=args.pictures,
            device=args.device,
            progress=status.update,
        )
    failed = [b.name for b in backbones if sweep.state(b.name)['status'] != 'done']
    console.print(f'report: {folder / "report.html"}', soft_wrap=True, markup=False)
    if failed:
        sys.exit(f'failed: {", ".join(failed)} (logs: {folder}/runs/*/output.log)')


def make_demo_data(cfg: Config) -> None:
    """Make the demo data where a config reads them and they aren't there yet."""
    root = Path(cfg.get('data_root') or '')
    if root == DEMO_DATA and not root.exists():
        make_digits(root)


def run_memory(args: argparse.Namespace) -> None:
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
    be_quiet()
    console = Console()
    with console.status('') as status:
        costs = plan(cfg, size=size, modes=args.modes, device=args.device, progress=status.update)
    if args.json:
        modes = [{**asdict(cost), 'seconds': cost.seconds if cost.ran else None} for cost in costs]
        figures = dict(size=size, device=args.device, modes=modes)
        args.json.write_text(json.dumps(figures, indent=1) + '\n')
    table = Table('memory mode', 'fixed (GB)', 'GB per image', 'largest batch', 'relative time')
    first = next((cost.seconds for cost in costs if cost.ran), math.inf)
    for cost in costs:
        values = (cost.fixed, cost.per_image)
        figures = ('' if value is None else f'{value / GB:.3g}' for value in values)
        time = f'{cost.seconds / first:.2f}' if cost.ran else ''
        table.add_row(cost.mode, *figures, str(cost.largest(gpu_bytes)), time)
    console.print(table)
    notes = [
        f'Training on images of {size[0]} x {size[1]} with {gpu_bytes / GB:.4g} GB, of which '
        f'{usable(gpu_bytes) / GB:.1f} are taken for usable: a tenth and 0.6 GB are kept for '
        'fragmentation and the CUDA context.',
        'Distributed training needs the bytes of all gradients once more.',
        'Times are of single steps per image: a hint.',
    ]
    if args.device == 'cpu':
        notes.append(
            'Estimated from the sizes of tensors on a CPU: convolution workspaces of cuDNN are not '
            'in it.'
        )
    console.print(' '.join(notes))
    batch = max(batch_size(cfg), costs[0].smallest)
    cost = best(costs, gpu_bytes, batch)
    if cost is None:
        smallest = costs[0].smallest
        sys.exit(
            f'not even a batch of {smallest} fits: try --amp-dtype bfloat16, or a smaller --size'
        )
    batch = min(batch, cost.largest(gpu_bytes))
    changes = ' '.join(settings(cfg, cost.mode, batch))
    how = f'with --cfg-options {changes}' if changes else 'with the config as it is'
    console.print(f'A batch of {batch} per GPU fits {how}.', soft_wrap=True, markup=False)


def be_quiet() -> None:
    """Keep libraries from telling what nobody asked."""
    os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # the profiler tells of each start and stop
    MMLogger.get_current_instance().setLevel('WARNING')  # optimizers list their settings
    warnings.simplefilter('ignore', UserWarning)  # mmseg advises of losses


if __name__ == '__main__':
    main()
