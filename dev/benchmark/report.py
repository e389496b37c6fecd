"""Markdown tables of recorded comparisons, for docs/performance.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dev.markdown import table

__all__ = ['best_result', 'markdown', 'training_results']

# Speedups over the fastest peer that are aimed at on a CPU.
INFERENCE_GOALS = {
    ('condensenetv2_a', 'float32'): 4.0,
    ('condensenetv2_b', 'float32'): 5.0,
    ('condensenetv2_c', 'float32'): 6.5,
    ('densenet121', 'float32'): 1.4,
    ('densenet121', 'bfloat16'): 1.3,
    ('rdnet_tiny', 'float32'): 1.1,
    ('rdnet_tiny', 'bfloat16'): 1.2,
    ('rexnet_100', 'float32'): 1.3,
    ('rexnet_100', 'bfloat16'): 1.4,
}
TRAINING_GOAL = 1.0  # of the fastest form
LEAN_GOAL = 1.0  # speed of lean over that of plain
DETECTOR_GOAL = 1.1
MODES = dict(infer='inference', train='training')
COLUMNS = ('speedup', '95 % interval', 'ms', 'of floor (%)', 'error', 'memory (MB)')
LESS_EXACT = ' (larger error than the peers)'


def markdown(records: Sequence[Mapping[str, Any]]) -> str:
    """Return the tables of records, each a dict of a machine and the ``results`` on it."""
    return '\n'.join(part for record in records for part in _record(record))


def _record(record: Mapping[str, Any]) -> list[str]:
    versions = ', '.join(f'{name} {version}' for name, version in record['versions'].items())
    results = record['results']
    tables: dict[str, list[dict[str, str]]] = {'Inference': [], 'Training': [], 'Detectors': []}
    for result in results:
        if 'faster-rcnn' in result['setting']['network']:
            tables['Detectors'].append(_detector(result))
        elif result['setting']['mode'] == 'infer':
            tables['Inference'].append(_inference(result))
        else:
            tables['Training'] += training_results(result)
    parts = [
        f'## {record["device"]}, {record["date"]}\n',
        f'{versions}; OMP_WAIT_POLICY {record["omp_wait_policy"]}.\n',
    ]
    for title, rows in tables.items():
        if len({row['images'] for row in rows}) == 1:  # the titles below have it
            rows = [{**row, 'images': ''} for row in rows]
        if rows:
            parts += [f'### {title}\n', table(rows)]
    for result in results:
        parts += [f'### {_title(result["setting"])}\n', table(_details(result))]
    return parts


def _title(setting: Mapping[str, Any]) -> str:
    return f'{setting["network"]}, {MODES[setting["mode"]]}, {setting["dtype"]}, {_images(setting)}'


def _images(setting: Mapping[str, Any]) -> str:
    height, width = setting['size']
    return f'{height} x {width}, batch {setting["batch"]}'


def _goal(speedup: float, goal: float | None, setting: Mapping[str, Any]) -> str:
    if goal is None or setting['device'] != 'cpu':
        return ''
    return f'{goal} ({"met" if speedup >= goal else "missed"})'


def best_result(result: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Return the name and figures of mmdense's fastest configuration."""
    rows = result['contenders'].items()
    candidates = [(n, row) for n, row in rows if n.startswith('mmdense') and 'ratio' in row]
    return max(candidates, key=lambda item: item[1]['ratio'])


def _summary(result: Mapping[str, Any], name: str, goal: float | None) -> dict[str, str]:
    """Return the cells of one of mmdense's configurations."""
    setting, row = result['setting'], result['contenders'][name]
    note = LESS_EXACT if name in result['inexact'] else ''
    return {
        'network': setting['network'],
        'dtype': setting['dtype'],
        'images': _images(setting),
        'mmdense': (name.removeprefix('mmdense').lstrip(', ') or 'plain') + note,
        'fastest peer': result['peer'],
        'speedup': f'{row["ratio"]:.2f}',
        '95 % interval': _interval(row),
        'goal': _goal(row['ratio'], goal, setting),
    }


def _inference(result: Mapping[str, Any]) -> dict[str, str]:
    setting = result['setting']
    goal = INFERENCE_GOALS.get((setting['network'], setting['dtype']))
    return _summary(result, best_result(result)[0], goal)


def _detector(result: Mapping[str, Any]) -> dict[str, str]:
    cells = _summary(result, best_result(result)[0], DETECTOR_GOAL)
    return {'detector': cells.pop('network'), 'mode': MODES[result['setting']['mode']], **cells}


def training_results(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return a row for each memory mode, in its fastest configuration."""
    contenders, peer = result['contenders'], result['contenders'][result['peer']]
    fastest: dict[str, str] = {}
    for name, row in contenders.items():
        library, *words = [w for w in name.split(', ') if w not in ('channels-last', 'compiled')]
        if library == 'mmdense' and 'ratio' in row:
            form = (*words, 'plain')[0]
            if row['ratio'] > contenders.get(fastest.get(form), dict(ratio=0))['ratio']:
                fastest[form] = name
    best = best_result(result)[0]
    rows = []
    for form, name in fastest.items():
        row = contenders[name]
        cells = _summary(result, name, TRAINING_GOAL if name == best else None)
        plain = contenders.get(name.replace(f', {form}', ''), row)
        cells['against plain'] = ''
        if plain is not row and 'ratio' in plain:
            speed = row['ratio'] / plain['ratio']
            goal = _goal(speed, LEAN_GOAL if form == 'lean' else None, result['setting'])
            cells['against plain'] = f'{speed:.2f}' + (f', goal {goal}' if goal else '')
        known = 'memory' in row and 'memory' in peer
        cells['memory share'] = f'{row["memory"] / peer["memory"]:.2f}' if known else ''
        rows.append(cells)
    return rows


def _details(result: Mapping[str, Any]) -> list[dict[str, str]]:
    rows = []
    for name, row in result['contenders'].items():
        cells = dict.fromkeys(COLUMNS, '')
        if 'failed' in row:
            cells['speedup'] = row['failed'].replace('|', '/')[:80]
        else:
            cells['speedup'] = f'{row["ratio"]:.2f}'
            cells['95 % interval'] = _interval(row)
            cells['error'] = f'{row["error"]:.1e}'
            cells['memory (MB)'] = f'{row["memory"] / 1e6:.0f}' if 'memory' in row else ''
            if 'milliseconds' in row:  # on a GPU
                cells['ms'] = f'{row["milliseconds"]:.2f}'
            if 'of_floor' in row:
                cells['of floor (%)'] = f'{100 * row["of_floor"]:.0f}'
        rows.append({'configuration': name, **cells})
    return rows


def _interval(row: Mapping[str, Any]) -> str:
    low, high = row['interval']
    return f'{low:.2f} to {high:.2f}'
