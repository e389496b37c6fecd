"""Compare mmdense's backbones with others' of the same weights: ``python -m dev.benchmark``."""

import argparse
import json
import sys
from pathlib import Path

import torch
from rich.console import Console

from dev.benchmark.compare import DTYPES, MODES, Setting, compare
from dev.benchmark.networks import NETWORKS, PEERS
from dev.benchmark.report import markdown
from mmdense import cli as options
from mmdense.benchmark.timing import machine
from mmdense.cli import report_errors
from mmdense.errors import UserError

ROOT = Path(__file__).parents[2]
RESULTS, PAGE = ROOT / 'dev/benchmark/results', ROOT / 'docs/performance.md'
DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
BEGIN = '<!-- tables: written by python -m dev.benchmark report -->\n'


@report_errors
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True)
    against = commands.add_parser(
        'compare',
        help="time backbones beside others' of the same weights, in interleaved rounds",
        **options.example('-m dev.benchmark compare --names densenet121 --mode infer train'),
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
    page = commands.add_parser(
        'report',
        help='write docs/performance.md from dev/benchmark/results',
        **options.example('-m dev.benchmark report --check'),
    )
    page.add_argument('--check', action='store_true', help='write nothing; 1 if it is stale')
    page.set_defaults(run=run_report)
    args = parser.parse_args()
    args.run(args)


def run_compare(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    console = Console()
    record = {**machine(args.device), 'results': []}
    if args.json and args.json.exists():
        held = json.loads(args.json.read_text())
        if {**held, 'results': [], 'date': record['date']} != record:  # it may be past midnight
            raise UserError(f'{args.json} is of another machine or version: name another file')
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
        sys.exit(f'{PAGE.name} is stale: run python -m dev.benchmark report')
    PAGE.write_text(fresh, encoding='utf-8')


if __name__ == '__main__':
    main()
