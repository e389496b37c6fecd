"""One report of several sweeps."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmdense.benchmark.report import VERSION, write_report
from mmdense.errors import UserError, warn
from mmdense.files import atomic_write, check_writable

SETTINGS = ('task', 'config', 'schedule', 'data', 'pretrained', 'frozen')
SETTINGS += ('rule', 'seeds', 'corruptions')


def merge_sweeps(folders: Sequence[Path], out: Path, *, columns: Sequence[str] = ()) -> None:
    """Write one report of several sweeps, of the same settings, to a folder.

    Times and memory are left out where sweeps were measured on other machines or in other ways. The
    truth in pictures is the first one's. UserError if a folder has no ``results.json``, the sweeps
    have other settings, or two have a backbone of the same name.
    """
    results = [_read(folder) for folder in folders]
    first = results[0]
    for folder, other in zip(folders, results, strict=True):
        for key in SETTINGS:
            if other.get(key) != first.get(key):
                raise UserError(
                    f'{folder} cannot be merged: its {key} is {other.get(key)!r}, not '
                    f'{first.get(key)!r} as in {folders[0]}'
                )
    rows = [
        dict(row, folder=folder)
        for folder, r in zip(folders, results, strict=True)
        for row in r['rows']
    ]
    names = [row['backbone'] for row in rows]
    if len({*names}) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f'{twice} is in two sweeps')
    check_writable(out / 'results.json')
    conditions = ([r['machine'] | dict(date=None), r['measured']] for r in results)
    alike = len({json.dumps(each, sort_keys=True) for each in conditions}) == 1
    if not alike:
        warn('the sweeps were measured on other machines or in other ways: no times and memory')
    for row in rows:
        folder = row.pop('folder')
        row['pictures'] = [_copy(folder, file, out) for file in row['pictures']]
        [_copy(folder, seed['matches'], out) for seed in row['seeds'] if 'matches' in seed]
        if not alike:
            row |= dict(infer={}, train=None)
    metrics = dict.fromkeys(name for r in results for name in r['metrics'])
    merged = dict(
        first,
        command=' && '.join(r['command'] for r in results),
        metrics=[*metrics],
        columns=list(columns),
        rows=rows,
        published=[*{row['name']: row for r in results for row in r['published']}.values()],
        truth=[_copy(folders[0], file, out) for file in first['truth']],
        legend={k: v for r in results for k, v in r['legend'].items()},
    )
    atomic_write(out / 'results.json', json.dumps(merged, indent=1).encode())
    write_report(out)


def _read(folder: Path) -> dict[str, Any]:
    try:
        results = json.loads((folder / 'results.json').read_text(encoding='utf-8'))
    except (OSError, ValueError) as error:
        raise UserError(f'{folder} is not the folder of a sweep: no results.json') from error
    if results.get('version') != VERSION:
        raise UserError(f'{folder} was written by another version: run its sweep again')
    return results


def _copy(folder: Path, file: str, out: Path) -> str:
    (out / file).parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(folder / file, out / file)
    return file
