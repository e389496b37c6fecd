"""Check and time mmdense on a GPU, in parts that fail alone: correctness first, then timings.

Each part is a process with a time limit. Checks run side by side, timings one by one, and what no
time is left for is recorded as skipped. A dry run has the same parts on the CPU with tiny sizes:
its times mean nothing.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from dev.benchmark.compare import Contender, Setting, contenders
from dev.markdown import table
from mmdense.benchmark.timing import machine
from mmdense.datasets import make_digits
from mmdense.errors import UserError
from mmdense.files import atomic_write

__all__ = ['PARTS', 'Part', 'main', 'run_parts', 'timings']

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / 'dev/benchmark/results'
DEMO = ROOT / 'configs/detection/demo/faster-rcnn_rdnet-nano_fpn_8e_digits.py'
ROOM = 16e9  # bytes of a GPU that a check may take
TAIL = 20  # lines at the end of a part's output that are recorded
BACKBONES, DEPLOY = 'tests/models/backbones', 'tests/models/deploy'
ACROSS = f'{BACKBONES}/test_device.py'  # compares devices with each other
# Limit in seconds, pytest's arguments on a GPU, and those of a dry run.
TESTS: dict[str, tuple[float, list[str], list[str]]] = dict(
    backbones=(
        200,
        [BACKBONES, f'--deselect={ACROSS}'],
        [f'{BACKBONES}/test_contract.py', '-k', 'ReXNet and gradients_reach'],
    ),
    ops=(200, ['tests/ops'], ['tests/ops/test_ops_roi.py', '-k', 'memory_format']),
    deploy=(200, [DEPLOY], [f'{DEPLOY}/test_deploy_contract.py', '-k', 'ReXNet and formats']),
    devices=(200, [ACROSS], [ACROSS, '-k', 'lean and NHWC and bfloat16']),
)
# Limit, options of tools/train.py, and the backbone's memory mode: an epoch of the demo each.
TRAININGS = {
    'demo-bfloat16': (120, ['--amp-dtype=bfloat16', '--channels-last'], 'lean'),
    'demo-float16': (120, ['--amp-dtype=float16'], 'recompute'),
    'demo-compiled': (150, ['--amp-dtype=bfloat16', '--compile-backbone'], 'plain'),
}
TIMES = 'times'  # the part that measures, after the checks
LIMIT, PREPARING = 300, 0.65  # its seconds, and the share of them for compilers
PARTS = [*TESTS, *TRAININGS, TIMES]
LARGE, SMALL, TINY = (800, 1344), (512, 512), (64, 64)
COMPILED = 'densenet121', 'rdnet_tiny'
SETTINGS = [  # mode, size, batch, and networks that are timed eagerly only
    ('train', LARGE, 2, ('rexnet_100',)),
    ('infer', SMALL, 1, ('rexnet_100', 'condensenetv2_c')),
    ('infer', LARGE, 16, ()),
]


@dataclass(frozen=True)
class Part:
    """A process, with its limit in seconds. A check is for correctness, not for times."""

    name: str
    command: Sequence[str | Path]
    limit: float
    is_check: bool = True


def timings(*, dry: bool) -> dict[Setting, list[Contender]]:
    """Return the settings to time, and the configurations of each, in channels-last."""
    settings = {}
    for mode, size, batch, eager in SETTINGS:
        where = (TINY, 2, 'bfloat16', 'cpu') if dry else (size, batch, 'bfloat16', 'cuda')
        for network in eager[:1] if dry else (*COMPILED, *eager):
            setting = Setting(network, mode, *where)
            against = ['official' if network.startswith('condensenet') else 'timm']
            options = dict(compiled=network in COMPILED, graphs=batch == 1 and not dry)
            settings[setting] = [
                contender
                for contender in contenders(setting, against=against, **options)
                if contender.channels_last
                and not (contender.compiled and contender.form == 'recompute')
            ]
    return settings


def main(
    *, dry: bool, limit: float, names: Sequence[str] | None = None, file: Path | None = None
) -> int:
    """Run the parts, write the record, print a table, and return 1 if a check is not ok.

    Args:
        dry: Run on the CPU, with tiny sizes.
        limit: Seconds for all parts.
        names: Some of ``PARTS``; by default all.
        file: The record; by default one named after the GPU, beside the others.

    Raises:
        UserError: If torch finds no GPU, or a dry run has no file.
    """
    end = time.monotonic() + limit
    if not dry and not torch.cuda.is_available():
        raise UserError('torch finds no GPU: --dry runs the same parts on the CPU')
    if dry and file is None:
        raise UserError('--dry needs --json FILE: its times are none of a record')
    record = {**_describe(dry), 'dry': dry, 'parts': [], 'results': []}
    file = file or RESULTS / f'{re.sub(r"[^a-z0-9]+", "-", record["device"].lower())}.json'
    file.parent.mkdir(parents=True, exist_ok=True)
    console = Console(highlight=False, markup=False, soft_wrap=True)

    def save(row: dict[str, Any]) -> None:
        console.print(f'{row["name"]}: {row["status"]} after {row["seconds"]:.0f} s')
        results = row.pop('results')
        record['results'] += results
        record['parts'].append(row)
        atomic_write(file, (json.dumps(record, indent=1) + '\n').encode())

    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        parts = [part for part in _parts(work, dry, end) if part.name in (names or PARTS)]
        if any(part.name in TRAININGS for part in parts):
            make_digits(work / 'data/digits', **(dict(train=8, val=2) if dry else {}))
        run_parts(parts, work, end=end, dry=dry, save=save)
    rows = [
        {
            'part': row['name'],
            'status': row['status'],
            'seconds': f'{row["seconds"]:.0f}',
            'last line': [*row['tail'], ''][-1 if row['tail'] else 0][:80],
        }
        for row in record['parts']
    ]
    console.print(table(rows) + f'\nrecorded in {file}')
    return int(any(row['check'] and row['status'] != 'ok' for row in record['parts']))


def run_parts(
    parts: Sequence[Part],
    work: Path,
    *,
    end: float,
    dry: bool,
    save: Callable[[dict[str, Any]], None],
) -> None:
    """Run the checks side by side, then the timings one by one.

    Args:
        parts: In the order of their rows.
        work: The folder that they run in and write to.
        end: Of all parts, on the monotonic clock.
        dry: See :func:`main`.
        save: Called with the row of each part: ``name``, ``check``, ``status`` ('ok', 'failed',
            'timeout' or 'skipped'), ``seconds``, ``limit``, ``tail`` (last lines) and ``results``
            (of :func:`.compare`).
    """
    cores = os.cpu_count() or 1
    jobs = max(2, cores // 2)
    if not dry:
        jobs = max(1, min(jobs, int(torch.cuda.get_device_properties(0).total_memory / ROOM)))
    environment = {
        **os.environ,
        'PYTHONPATH': os.pathsep.join(filter(None, [str(ROOT), os.environ.get('PYTHONPATH')])),
        'PYTHONUNBUFFERED': '1',
        'MMDENSE_TEST_DEVICE': 'cpu' if dry else 'cuda',
        'MMDENSE_OPS': 'torchvision',
        'OMP_NUM_THREADS': str(max(1, cores // jobs)),
        **({'TORCHDYNAMO_DISABLE': '1'} if dry else {}),  # compiling takes minutes
    }
    stop = threading.Event()

    def run(part: Part) -> dict[str, Any]:
        return _run(part, work, environment, end, stop)

    checks = [part for part in parts if part.is_check]
    with ThreadPoolExecutor(jobs) as pool:
        try:
            for row in pool.map(run, checks):
                save(row)
        except BaseException:  # such as Ctrl-C
            stop.set()
            raise
    for part in parts:
        if part not in checks:
            save(run(part))


def _run(
    part: Part, work: Path, environment: Mapping[str, str], end: float, stop: threading.Event
) -> dict[str, Any]:
    """Run a part, and return its row."""
    begin = time.monotonic()
    row = dict(name=part.name, check=part.is_check, status='skipped', limit=part.limit)
    row |= dict(seconds=0.0, tail=[], results=[])
    if begin >= end or stop.is_set():
        return row
    log, results = work / f'{part.name}.log', work / f'{part.name}.json'
    with log.open('w') as output:
        options = dict(stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
        try:
            process = subprocess.Popen(part.command, cwd=work, env=environment, **options)
        except OSError as error:
            return row | dict(status='failed', tail=[str(error)])
        try:
            while process.poll() is None and not stop.is_set():
                if time.monotonic() > min(begin + part.limit, end):
                    row['status'] = 'timeout'
                    break
                time.sleep(0.1)
            else:
                row['status'] = 'failed' if process.returncode else 'ok'
        finally:  # the processes that it started end with it
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    lines = log.read_text(errors='replace').splitlines()
    row |= dict(seconds=time.monotonic() - begin, tail=[x.rstrip() for x in lines if x][-TAIL:])
    if results.exists():  # of the settings that were done
        row['results'] = json.loads(results.read_text(encoding='utf-8'))['results']
    return row


def _parts(work: Path, dry: bool, end: float) -> list[Part]:
    python = sys.executable
    pytest = [python, '-m', 'pytest', '-q', '-rf', '--tb=short', '-p', 'no:cacheprovider']
    pytest += ['--rootdir', ROOT, '-c', ROOT / 'pyproject.toml']
    if not dry and importlib.util.find_spec('xdist'):
        pytest += ['-n', '4']
    parts = []
    for name, (limit, on_gpu, quick) in TESTS.items():
        arguments = quick if dry else [*on_gpu, *(['-m', 'not slow'] if name != 'devices' else [])]
        paths = [ROOT / x if x.startswith('tests') else x for x in arguments]
        parts.append(Part(name, [*pytest, *paths], limit))
    for name, (limit, arguments, memory) in TRAININGS.items():
        command = [python, ROOT / 'tools/train.py', DEMO, '--work-dir', work / name, *arguments]
        settings = ['train_cfg.max_epochs=1', f'model.backbone.memory={memory}']
        parts.append(Part(name, [*command, '--cfg-options', *settings], limit))
    command = [python, '-m', 'dev.benchmark', 'gpu', '--until', str(end)]
    command += ['--json', work / f'{TIMES}.json', *(['--dry'] if dry else [])]
    # Times need the machine for themselves, those of a dry run don't.
    parts.append(Part(TIMES, command, LIMIT, is_check=dry))
    return parts


def _describe(dry: bool) -> dict[str, Any]:
    """Return machine, versions and commit; neither nvidia-smi nor git need be there."""
    record = machine('cpu' if dry else 'cuda')
    record['commit'] = _output('git', '-C', ROOT, 'rev-parse', 'HEAD') or os.environ.get('COMMIT')
    if not dry:
        driver = _output('nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader')
        cuda = dict(cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version(), driver=driver)
        record['versions'] |= cuda
    return record


def _output(*command: str | Path) -> str | None:
    """Return the first line that a command prints, if it is there and succeeds."""
    with suppress(OSError, subprocess.CalledProcessError, IndexError):
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()[0]
    return None
