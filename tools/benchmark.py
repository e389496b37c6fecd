"""Train and test a config with one backbone after the other, and report; merge such reports."""

import argparse
import re
import shlex
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path

from mmdense import cli  # sets what torch reads when it is loaded

# isort: split
import torch
from mmengine.config import Config, DictAction
from rich.console import Console
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from mmdense.benchmark.backbones import find_backbone, read_rows
from mmdense.benchmark.merge import merge_sweeps
from mmdense.benchmark.published import PUBLISHED, find_published
from mmdense.benchmark.robustness import SEVERITIES
from mmdense.benchmark.runs import run_as_job
from mmdense.benchmark.sweep import TASKS, Sweep
from mmdense.benchmark.timing import FORMS, PRECISIONS, Conditions
from mmdense.config.edit import set_length
from mmdense.config.read import load_config
from mmdense.datasets import make_digits
from mmdense.errors import UserError, not_negative, positive

ROOT = Path(__file__).parents[1]
DEMO = ROOT / 'configs/detection/demo/faster-rcnn_rdnet-nano_fpn_8e_digits.py'
DEMO_DATA = Path('data/digits')


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    commands = parser.add_subparsers(required=True, dest='command')
    sweep = commands.add_parser(
        'sweep',
        help='train and test a config with one backbone after the other, and report',
        description='Train, test and measure the same head, data and schedule with each backbone,\n'
        'and write DIR/report.html, report.md, results.json, .csv and .tex. Started again with\n'
        'the same settings, a sweep continues where it stopped. A CondenseNetV2 that starts from\n'
        'random weights learns its connections during the training.',
        **cli.example(
            'tools/benchmark.py sweep --backbones configs/detection/demo/*nano_fpn* timm:resnet10t'
        ),
    )
    sweep.add_argument(
        '--backbones',
        nargs='+',
        default=[],
        metavar='NAME',
        help='FAMILY-ARCH such as rdnet-t, timm:NETWORK, or a config file to take one from; with '
        '@CHECKPOINT tested, not trained; published:NAME shows published figures',
    )
    sweep.add_argument(
        '--published',
        action='store_true',
        help="show published figures of the backbones with the config's head and data set",
    )
    sweep.add_argument(
        '--rows', metavar='FILE', help='YAML or Python file of rows with settings of their own'
    )
    sweep.add_argument('--config', default=str(DEMO), help='config to put them into (the demo)')
    sweep.add_argument('--out', type=Path, metavar='DIR', help='folder (work_dirs/sweep-CONFIG)')
    sweep.add_argument('--data-root', metavar='DIR', help='folder of the data')
    sweep.add_argument(
        '--epochs', type=positive, metavar='N', help="length of training (the config's)"
    )
    sweep.add_argument(
        '--iters', type=positive, metavar='N', help='the same for iteration-based configs'
    )
    start = sweep.add_mutually_exclusive_group()
    start.add_argument(
        '--pretrained', action='store_true', help="start from ImageNet weights (as the config's)"
    )
    start.add_argument('--from-scratch', action='store_true', help='start from random weights')
    sweep.add_argument(
        '--frozen', action='store_true', help='train necks and heads only, to compare weights'
    )
    sweep.add_argument(
        '--corruptions',
        nargs='+',
        default=[],
        metavar='NAME',
        help="test on corrupted images too, such as gaussian_noise; 'all' are the common fifteen",
    )
    sweep.add_argument(
        '--severities',
        nargs='+',
        type=int,
        choices=SEVERITIES,
        default=[*SEVERITIES],
        metavar='1..5',
        help='of the corruptions (all five)',
    )
    sweep.add_argument(
        '--gpus', type=positive, default=1, metavar='N', help='train on N GPUs (torchrun)'
    )
    sweep.add_argument(
        '--size', nargs=2, type=positive, metavar=('H', 'W'), help='to count MACs for (the largest)'
    )
    sweep.add_argument(
        '--rounds', type=positive, default=20, help='timed runs of each (%(default)s)'
    )
    sweep.add_argument(
        '--form',
        choices=(*FORMS, 'both'),
        default='both',
        help="the backbones' form in inference (%(default)s)",
    )
    sweep.add_argument(
        '--batch', type=positive, default=8, help='images at once, for throughput (%(default)s)'
    )
    sweep.add_argument(
        '--precision', choices=PRECISIONS, default='fp32', help='of inference (%(default)s)'
    )
    sweep.add_argument(
        '--onnx', action='store_true', help='export the models, and time the files as well'
    )
    sweep.add_argument('--compile', action='store_true', help='compile backbones for inference')
    sweep.add_argument(
        '--memory-format',
        choices=('contiguous', 'channels_last'),
        help="of backbones as trained, in inference (the config's)",
    )
    sweep.add_argument(
        '--pictures', type=not_negative, default=6, help='images to draw (%(default)s)'
    )
    sweep.add_argument(
        '--device', choices=('cpu', 'cuda'), help="to measure on (the GPU if there's one)"
    )
    sweep.add_argument(
        '--seeds',
        type=positive,
        default=1,
        metavar='N',
        help='trainings of each (%(default)s)',
    )
    sweep.add_argument(
        '--parallel', type=positive, metavar='N', help='train N at a time, as jobs (extra: jobs)'
    )
    sweep.add_argument(
        '--launcher', choices=('local', 'slurm'), default='local', help='of jobs (%(default)s)'
    )
    sweep.add_argument(
        '--job-options',
        nargs='+',
        default={},
        action=DictAction,
        metavar='KEY=VALUE',
        help="of submitit's executor, such as slurm_partition=gpu timeout_min=1440 mem_gb=64",
    )
    add_columns(sweep)
    cli.add_cfg_options(sweep)
    merge = commands.add_parser(
        'merge',
        help='make one report of several sweeps',
        description='Make one report of sweeps with the same task, config, data and schedule.',
        **cli.example('tools/benchmark.py merge work_dirs/sweep-a work_dirs/sweep-b --out both'),
    )
    merge.add_argument('folders', nargs='+', type=Path, metavar='DIR', help='folders of sweeps')
    merge.add_argument('--out', type=Path, required=True, metavar='DIR', help='folder to write')
    add_columns(merge)
    return parser


def add_columns(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        '--columns',
        nargs='+',
        default=[],
        metavar='NAME',
        help='columns of the tables, by their names in results.csv, such as box_ap trained_p50_ms',
    )


@cli.report_errors
def main(argv: Sequence[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parser().parse_args(argv)
    if args.command == 'merge':
        merge_sweeps(args.folders, args.out, columns=args.columns)
        Console().print(f'report: {args.out / "report.html"}', soft_wrap=True, markup=False)
        return
    config_options = dict(args.cfg_options or {})
    if args.data_root:
        config_options['data_root'] = args.data_root
    cfg = load_config(args.config, options=config_options)
    set_length(cfg, epochs=args.epochs, iters=args.iters)
    has_weights = (cfg.model.get('backbone') or {}).get('init_cfg') is not None
    pretrained = args.pretrained or (has_weights and not args.from_scratch)
    task = TASKS.get(cfg.get('default_scope'), 'detection')
    start = dict(pretrained=pretrained, detection=task == 'detection')
    asked = [name for name in args.backbones if name.startswith(PUBLISHED)]
    backbones = [find_backbone(name, **start) for name in args.backbones if name not in asked]
    backbones += read_rows(args.rows, **start) if args.rows else []
    published = find_published([name.removeprefix(PUBLISHED) for name in asked], task)
    if args.published:
        like = find_published((b.name for b in backbones), task, like=args.config)
        published += [row for row in like if row not in published]
    if not backbones:
        raise UserError('name --backbones, or a file of --rows')
    folder = args.out or Path('work_dirs', f'sweep-{Path(args.config).stem}')
    sweep = Sweep(
        cfg,
        backbones,
        folder,
        command=f'python tools/benchmark.py {shlex.join(argv)}',
        pretrained=pretrained,
        gpus=args.gpus,
        size=tuple(args.size) if args.size else None,
        seeds=args.seeds,
        columns=args.columns,
        published=published,
        frozen=args.frozen,
        corruptions=args.corruptions,
        severities=args.severities,
    )
    cluster = args.launcher == 'slurm'
    jobs = None
    if cluster or args.parallel:
        jobs = dict(cluster=args.launcher, parallel=args.parallel, options=args.job_options)
    make_demo_data(cfg)
    train = [sys.executable, str(ROOT / 'tools/train.py')]
    if args.gpus > 1:
        processes = ['-m', 'torch.distributed.run', '--standalone', f'--nproc_per_node={args.gpus}']
        train = [sys.executable, *processes, *train[1:], '--launcher', 'pytorch']
    cli.silence_libraries()
    console = Console()
    lines = Lines(console)
    conditions = Conditions(
        device=args.device or ('cuda' if torch.cuda.is_available() else 'cpu'),
        rounds=args.rounds,
        forms=[*FORMS] if args.form == 'both' else [args.form],
        batch=args.batch,
        precision=args.precision,
        compiled=args.compile,
        onnx=args.onnx,
        channels_last=args.memory_format and args.memory_format == 'channels_last',
    )
    with console.status('') as status:

        def show_name(name: str) -> None:
            status.update(f'one step of {name}')
            lines.show('one step of', name)

        sweep.try_out(conditions.device, show_name)
    board = Board(console, [run.name for runs in sweep.runs.values() for run in runs])
    with (
        Live(board, console=console, refresh_per_second=2) if console.is_terminal else nullcontext()
    ):

        def show(name: str, state: str, share: float) -> None:
            board.show(name, state, share)
            lines.show(name, state)

        sweep.train(train, show, jobs)
        sweep.test_corrupted(train, show, jobs)
    with console.status('') as status:

        def show_text(text: str) -> None:
            status.update(text)
            lines.show('measuring', text)

        options = dict(conditions=conditions, pictures=args.pictures)
        if cluster:
            show_text('in a job')
            job = dict(cluster=args.launcher, gpus=args.gpus, options=args.job_options)
            run_as_job(partial(sweep.measure, **options), folder / 'jobs', **job)
        else:
            sweep.measure(**options, progress=show_text)
    failed = [b.name for b in backbones if sweep.state(b.name)['status'] != 'done']
    for name in failed:  # in the table above a long line is cut
        console.print(f'{name}: {sweep.state(name)["error"]}', soft_wrap=True, markup=False)
    console.print(f'report: {folder / "report.html"}', soft_wrap=True, markup=False)
    if failed:
        sys.exit(f'failed: {", ".join(failed)} (logs: {folder}/runs/*/output.log)')


class Board:
    """Where each training stands, as a live table: those that run first, as many as fit."""

    def __init__(self, console: Console, names: Sequence[str]) -> None:
        self.console = console
        self.shares = dict.fromkeys(names, 0.0)
        self.cells = {name: ['waiting', '', '', ''] for name in names}

    def show(self, name: str, state: str, share: float) -> None:
        self.shares[name] = share
        self.cells.setdefault(name, ['', '', '', ''])
        if match := re.fullmatch(r'(.*? of \d+), (.*) left, loss ([^,]+)(?:, (.*))?', state):
            self.cells[name] = [text or '' for text in match.groups()]
        else:
            self.cells[name][:2] = state, ''

    def __rich__(self) -> Table:
        done = [name for name, (state, *_) in self.cells.items() if state == 'done']
        table = Table('training', '', 'state', 'left', 'loss', 'accuracy', box=None)
        table.title = f'{len(done)} of {len(self.cells)} trainings done'
        waiting = [name for name, (state, *_) in self.cells.items() if state == 'waiting']
        running = [name for name in self.cells if name not in {*done, *waiting}]
        for name in [*running, *done[::-1], *waiting][: max(self.console.height - 4, 1)]:
            bar = ProgressBar(1.0, self.shares[name], width=16)
            cells = (Text(text, overflow='ellipsis', no_wrap=True) for text in self.cells[name])
            table.add_row(Text(name), bar, *cells)
        return table


class Lines:
    """The progress as lines, where there is no terminal: each new activity, and once a minute."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.last: dict[str, tuple[str, float]] = {}  # by name, since several train at a time

    def show(self, name: str, state: str) -> None:
        activity, now = state.partition(' ')[0], time.monotonic()
        before, then = self.last.get(name, ('', 0.0))
        if self.console.is_terminal or (activity == before and now < then + 60):
            return
        self.last[name] = activity, now
        self.console.print(f'{name}: {state}', soft_wrap=True, markup=False, highlight=False)


def make_demo_data(cfg: Config) -> None:
    """Make the demo data if the config reads them and they don't exist yet."""
    root = Path(cfg.get('data_root') or '')
    if root == DEMO_DATA and not root.exists():
        make_digits(root)


if __name__ == '__main__':
    main()
