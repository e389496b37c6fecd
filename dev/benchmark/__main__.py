"""Compare mmdense's backbones, and detectors on them, with other implementations."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dev.benchmark import gpu
from dev.benchmark.compare import DTYPES, MMDENSE, MODES, Setting, compare
from dev.benchmark.detectors import CONFIGS, compare_detectors
from dev.benchmark.detectors import FORMS as DETECTOR_FORMS
from dev.benchmark.floors import device_peaks
from dev.benchmark.networks import NETWORKS, PEERS
from dev.benchmark.report import markdown
from dev.benchmark.side_by_side import compare_side_by_side
from mmdense.benchmark.timing import machine
from mmdense.cli import example, report_errors, silence_libraries
from mmdense.errors import UserError


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog='python -m dev.benchmark', description=__doc__)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser(
        'compare',
        help='time networks with the same weights in interleaved rounds',
        **example('-m dev.benchmark compare --names densenet121 --mode infer train'),
    )
    command.set_defaults(run=_compare)
    command.add_argument('--names', nargs='+', required=True, choices=list(NETWORKS))
    _add_options(command)
    command.add_argument(
        '--against', nargs='+', choices=PEERS, help='peers (default: all that have the network)'
    )
    command.set_defaults(mode=['infer'], size=(512, 512), batch=1, dtype=['float32'], rounds=30)
    command.add_argument('--no-memory', action='store_true', help='skip peak memory')
    command.add_argument(
        '--forms', nargs='+', help="forms of mmdense's network, such as lean (default: all)"
    )
    command.add_argument(
        '--cuda-graphs', action='store_true', help='time inference in CUDA graphs too (on a GPU)'
    )
    command = commands.add_parser(
        'detectors',
        help="time Faster R-CNN on these backbones and on timm's, with the same weights",
        **example('-m dev.benchmark detectors --names densenet121 --mode train'),
    )
    command.set_defaults(run=_detectors, mode=[*MODES], batch=2, rounds=10)
    command.add_argument('--names', nargs='+', choices=list(CONFIGS), default=list(CONFIGS))
    command.add_argument(
        '--forms',
        nargs='+',
        choices=sorted({form for forms in DETECTOR_FORMS.values() for form in forms}),
        default=['plain', 'deployed'],
        help="forms of mmdense's backbone, each in the modes that have it (default: %(default)s)",
    )
    _add_options(command)
    command = commands.add_parser(
        'gpu',
        help='run all checks and timings of a GPU (dev/benchmark/gpu.sh)',
        **example('-m dev.benchmark gpu --dry --json work_dirs/gpu.json'),
    )
    command.set_defaults(run=_gpu)
    command.add_argument('--dry', action='store_true', help='run on the CPU, with tiny sizes')
    command.add_argument(
        '--limit', type=int, default=480, help='seconds for all parts (%(default)s)'
    )
    command.add_argument('--parts', nargs='+', choices=gpu.PARTS, help='(default: all)')
    command.add_argument('--json', type=Path, help='record (dev/benchmark/results/DEVICE.json)')
    command.add_argument('--until', type=float, help=argparse.SUPPRESS)
    return parser


def _add_options(command: argparse.ArgumentParser) -> None:
    """Add what both comparisons have; the defaults differ."""
    command.add_argument('--mode', nargs='+', choices=MODES)
    command.add_argument('--size', nargs=2, type=int, metavar=('H', 'W'))
    command.add_argument('--batch', type=int)
    command.add_argument('--dtype', nargs='+', choices=list(DTYPES))
    command.add_argument('--rounds', type=int)
    command.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    command.add_argument('--threads', type=int, default=2, help='CPU threads (%(default)s)')
    command.add_argument('--no-compile', action='store_true', help='skip torch.compile')
    command.add_argument('--json', type=Path, help='append the results to this file')


@report_errors
def main(argv: Sequence[str] | None = None) -> None:
    args = parser().parse_args(argv)
    args.run(args)


def _compare(args: argparse.Namespace) -> None:
    torch.set_num_threads(args.threads)
    if args.cuda_graphs and 'infer' not in args.mode:
        raise UserError('--cuda-graphs is for inference: add --mode infer')
    options = dict(
        compiled=not args.no_compile,
        graphs=args.cuda_graphs,
        forms=args.forms,
        rounds=args.rounds,
        memory=not args.no_memory,
    )
    settings = [
        (
            Setting(name, mode, tuple(args.size), args.batch, dtype, args.device),
            dict(options, against=_peers(name, args.against)),
        )
        for name in args.names
        for mode in args.mode
        for dtype in args.dtype
    ]
    peaks = device_peaks(args.device, args.dtype)
    _measure(settings, args.device, args.json, partial(compare, peaks=peaks))


def _detectors(args: argparse.Namespace) -> None:
    silence_libraries()
    torch.set_num_threads(args.threads)
    on_cpu = args.device == 'cpu'
    size = tuple(args.size or ((320, 320) if on_cpu else (800, 1344)))
    dtypes = args.dtype or ['float32' if on_cpu else 'bfloat16']
    options = dict(compiled=not args.no_compile, forms=args.forms, rounds=args.rounds)
    settings = [
        (Setting(name, mode, size, args.batch, dtype, args.device), options)
        for name in args.names
        for mode in args.mode
        for dtype in dtypes
    ]
    _measure(settings, args.device, args.json, compare_detectors)


def _peers(name: str, against: Sequence[str] | None) -> list[str]:
    known = NETWORKS[name].peers
    peers = [peer for peer in against or known if peer in known]
    if not peers:
        raise UserError(f'{against} do not have {name}')
    return peers


def _gpu(args: argparse.Namespace) -> None:
    if not args.until:
        sys.exit(gpu.main(dry=args.dry, limit=args.limit, names=args.parts, file=args.json))
    # The part that measures, in a process that gpu.main started.
    limit = min(gpu.LIMIT, args.until - time.monotonic())
    results = compare_side_by_side(
        gpu.timings(dry=args.dry),
        rounds=1 if args.dry else 10,
        patience=limit * gpu.PREPARING,
        peaks=None if args.dry else device_peaks(),
    )
    record = machine('cpu' if args.dry else 'cuda') | dict(results=[])
    for result in results:
        _save(record, result, args.json)
    failed = [
        f'{result["setting"]["network"]}, {name}: {row["failed"]}'
        for result in record['results']
        for name, row in result['contenders'].items()
        if name.startswith(MMDENSE) and 'failed' in row
    ]
    if failed:
        raise UserError('; '.join(failed))


def _measure(
    settings: Sequence[tuple[Setting, dict[str, Any]]],
    device: str,
    file: Path | None,
    measure: Callable[..., dict[str, Any]],
) -> None:
    """Compare in each setting, with its options; print results and append them to a file."""
    console = Console()
    record = _open_record(file, device)
    for setting, options in settings:
        with console.status('') as status:
            result = measure(
                setting,
                **options,
                progress=lambda text, name=setting.network: status.update(f'{name}: {text}'),
            )
        _save(record, result, file)


def _save(record: dict[str, Any], result: dict[str, Any], file: Path | None) -> None:
    """Print a result and append it to a record and its file."""
    record['results'].append(result)
    text = markdown([{**record, 'results': [result]}])
    Console().print(text[text.index('###') :], highlight=False, soft_wrap=True)
    if file:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(record, indent=1) + '\n', encoding='utf-8')


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
