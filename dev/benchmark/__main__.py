"""Compare mmdense's backbones with other implementations of the same networks."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dev.benchmark.compare import DTYPES, MODES, Setting, compare
from dev.benchmark.networks import NETWORKS, PEERS
from dev.benchmark.report import markdown
from mmdense.benchmark.timing import machine
from mmdense.cli import example, report_errors
from mmdense.errors import UserError


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='python -m dev.benchmark', description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser(
        'compare',
        help='time networks with the same weights in interleaved rounds',
        **example('-m dev.benchmark compare --names densenet121 --mode infer train'),
    )
    command.add_argument('--names', nargs='+', required=True, choices=list(NETWORKS))
    command.add_argument(
        '--against', nargs='+', choices=PEERS, help='peers (default: all that have the network)'
    )
    command.add_argument('--mode', nargs='+', choices=MODES, default=['infer'])
    command.add_argument('--size', nargs=2, type=int, default=(512, 512), metavar=('H', 'W'))
    command.add_argument('--batch', type=int, default=1)
    command.add_argument('--dtype', nargs='+', choices=list(DTYPES), default=['float32'])
    command.add_argument('--rounds', type=int, default=30)
    command.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    command.add_argument('--threads', type=int, default=2, help='CPU threads (%(default)s)')
    command.add_argument('--no-compile', action='store_true', help='skip torch.compile')
    command.add_argument('--no-memory', action='store_true', help='skip peak memory')
    command.add_argument('--json', type=Path, help='append the results to this file')
    return parser


@report_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    console = Console()
    record = _open_record(args.json, args.device)
    for name in args.names:
        peers = [p for p in args.against or NETWORKS[name].peers if p in NETWORKS[name].peers]
        if not peers:
            raise UserError(f'{args.against} do not have {name}')
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
                    args.json.write_text(json.dumps(record, indent=1) + '\n', encoding='utf-8')


def _open_record(file: Path | None, device: str) -> dict[str, Any]:
    """Return the record in a file, or a new one of this machine and these versions.

    Raises:
        UserError: If the file is from another machine or from other versions.
    """
    record = {**machine(device), 'results': []}
    if file is None or not file.exists():
        return record
    earlier = json.loads(file.read_text(encoding='utf-8'))
    if {**earlier, 'results': [], 'date': record['date']} != record:  # the date may have changed
        raise UserError(f'{file} is from another machine or other versions: name another file')
    return earlier


if __name__ == '__main__':
    main()
