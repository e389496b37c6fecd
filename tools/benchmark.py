"""Measure what backbones cost, against those of others, and what training a config takes."""

import argparse
import json
import math
import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch
from mmengine.logging import MMLogger
from rich.console import Console
from rich.table import Table

from mmdense.apis import options, report_errors
from mmdense.apis.config import load_config, use_amp
from mmdense.benchmark.compare import DTYPES, MODES, Setting, compare, machine
from mmdense.benchmark.networks import NETWORKS, PEERS
from mmdense.benchmark.plan import (
    GB,
    batch_size,
    best,
    plan,
    settings,
    training_size,
    usable,
)
from mmdense.benchmark.report import markdown
from mmdense.engine.files import check_writable
from mmdense.errors import UserError

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / 'benchmarks/results', ROOT / 'docs/performance.md'
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
BEGIN = '<!-- tables: written by tools/benchmark.py report -->\n'


@report_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    against = commands.add_parser(
        'compare', help="time backbones beside others' of the same weights, in interleaved rounds"
    )
    against.add_argument('--names', nargs='+', required=True, choices=list(NETWORKS))
    against.add_argument(
        '--against', nargs='+', choices=PEERS, help='peers (all that have the network)'
    )
    against.add_argument('--mode', nargs='+', choices=MODES, default=['infer'])
    against.add_argument('--size', nargs=2, type=int, default=(512, 512), metavar=('H', 'W'))
    against.add_argument('--batch', type=int, default=1)
    against.add_argument('--dtype', nargs='+', choices=list(DTYPES), default=['float32'])
    against.add_argument('--rounds', type=int, default=30)
    against.add_argument('--device', default=DEVICE)
    against.add_argument('--threads', type=int, default=2, help='of a CPU (%(default)s)')
    against.add_argument('--no-compile', action='store_true', help='leave torch.compile out')
    against.add_argument('--no-memory', action='store_true', help='measure times alone')
    against.add_argument('--json', type=Path, help='add the results to this file')
    against.set_defaults(run=run_compare)
    add_memory(commands)
    page = commands.add_parser('report', help='write docs/performance.md from benchmarks/results')
    page.add_argument('--check', action='store_true', help='write nothing; 1 if it is stale')
    page.set_defaults(run=run_report)
    args = parser.parse_args()
    args.run(args)


def add_memory(commands: argparse._SubParsersAction) -> None:
    memory = commands.add_parser(
        'memory', help='say which batch each memory mode of a config fits into a GPU'
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
    os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # the profiler tells of each start and stop
    MMLogger.get_current_instance().setLevel('WARNING')  # optimizers list their settings
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
    console.print(f'A batch of {batch} per GPU fits {how}.', soft_wrap=True)


def run_compare(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    console = Console()
    record = {**machine(args.device), 'results': []}
    if args.json and args.json.exists():
        held = json.loads(args.json.read_text())
        if {**held, 'results': []} != record:
            raise UserError(f'{args.json} is of another machine, version or day: name another file')
        record = held
    for name in args.names:
        peers = [p for p in args.against or NETWORKS[name].peers if p in NETWORKS[name].peers]
        if not peers:
            raise UserError(f'none of {args.against} has {name}')
        for mode in args.mode:
            for dtype in args.dtype:
                setting = Setting(name, mode, tuple(args.size), args.batch, dtype, args.device)
                with console.status('') as status:
                    result = compare(
                        setting,
                        against=peers,
                        compiled=not args.no_compile,
                        rounds=args.rounds,
                        memory=not args.no_memory,
                        progress=lambda text, name=name: status.update(f'{name}: {text}'),
                    )
                record['results'].append(result)
                text = markdown([{**record, 'results': [result]}])
                console.print(text[text.index('###') :], highlight=False, soft_wrap=True)
                if args.json:
                    args.json.parent.mkdir(parents=True, exist_ok=True)
                    args.json.write_text(json.dumps(record, indent=1) + '\n')


def run_report(args: argparse.Namespace) -> None:
    records = [json.loads(file.read_text()) for file in sorted(RESULTS.glob('*.json'))]
    text = PAGE.read_text(encoding='utf-8')
    fresh = text.split(BEGIN)[0] + BEGIN + '\n' + markdown(records)
    if fresh == text:
        return
    if args.check:
        sys.exit(f'{PAGE.name} is stale: run python tools/benchmark.py report')
    PAGE.write_text(fresh, encoding='utf-8')


if __name__ == '__main__':
    main()
