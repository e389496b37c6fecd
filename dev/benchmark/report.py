"""Markdown tables of recorded comparisons, for docs/performance.md."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dev.markdown import table

__all__ = ['best_result', 'markdown', 'training_results']

# Speedups that are aimed at on a CPU, for inference at 512 x 512, batch 1.
TARGETS = {
    ('condensenetv2_a', 'float32'): 2.5,
    ('condensenetv2_b', 'float32'): 2.5,
    ('condensenetv2_c', 'float32'): 3.5,
    ('densenet121', 'float32'): 1.15,
    ('densenet121', 'bfloat16'): 1.2,
    ('rdnet_tiny', 'float32'): 1.1,
    ('rdnet_tiny', 'bfloat16'): 1.5,
    ('rexnet_100', 'float32'): 1.1,
    ('rexnet_100', 'bfloat16'): 1.1,
}
# For training on a CPU with memory='lean' at 512 x 512, batch 2: share of a peer's memory, speedup
# over it.
TRAINING_TARGETS = {
    ('densenet121', 'torchvision'): (0.333, 1.0),
    ('densenet121', 'torchvision_memory_efficient'): (0.65, 1.0),
    ('rdnet_tiny', 'timm'): (0.5, 0.95),
}
COLUMNS = ('speedup', '95 % interval', 'ms', 'of floor (%)', 'error', 'memory (MB)')
LESS_EXACT = ' (larger error than the peers)'


def markdown(records: Sequence[Mapping[str, Any]]) -> str:
    """Return the tables of records, each a dict of a machine and the ``results`` on it."""
    return '\n'.join(part for record in records for part in _record(record))


def _record(record: Mapping[str, Any]) -> list[str]:
    versions = ', '.join(f'{name} {version}' for name, version in record['versions'].items())
    results = record['results']
    inference = [_inference(r) for r in results if r['setting']['mode'] == 'infer']
    training = [
        row for r in results if r['setting']['mode'] == 'train' for row in training_results(r)
    ]
    parts = [
        f'## {record["device"]}, {record["date"]}\n',
        f'{versions}; OMP_WAIT_POLICY {record["omp_wait_policy"]}.\n',
    ]
    for title, rows in (('Inference', inference), ('Training', training)):
        if len({row['images'] for row in rows}) == 1:  # the titles below have it
            rows = [{**row, 'images': ''} for row in rows]
        if rows:
            parts += [f'### {title}\n', table(rows)]
    for result in results:
        parts += [f'### {_title(result["setting"])}\n', table(_details(result))]
    return parts


def _title(setting: Mapping[str, Any]) -> str:
    mode = dict(infer='inference', train='training')[setting['mode']]
    return f'{setting["network"]}, {mode}, {setting["dtype"]}, {_images(setting)}'


def _images(setting: Mapping[str, Any]) -> str:
    height, width = setting['size']
    return f'{height} x {width}, batch {setting["batch"]}'


def _target(targets: Mapping[tuple[str, str], Any], setting: Mapping[str, Any], key: str) -> Any:
    return targets.get((setting['network'], key)) if setting['device'] == 'cpu' else None


def best_result(result: Mapping[str, Any]) -> tuple[str, Mapping[str, Any]]:
    """Return the name and figures of mmdense's fastest configuration."""
    rows = result['contenders'].items()
    candidates = [(n, row) for n, row in rows if n.startswith('mmdense') and 'ratio' in row]
    return max(candidates, key=lambda item: item[1]['ratio'])


def _inference(result: Mapping[str, Any]) -> dict[str, str]:
    setting = result['setting']
    name, row = best_result(result)
    target = _target(TARGETS, setting, setting['dtype'])
    note = LESS_EXACT if name in result['inexact'] else ''
    return {
        'network': setting['network'],
        'dtype': setting['dtype'],
        'images': _images(setting),
        'mmdense': (name.removeprefix('mmdense').lstrip(', ') or 'plain') + note,
        'fastest peer': result['peer'],
        'speedup': f'{row["ratio"]:.2f}',
        '95 % interval': _interval(row),
        'target': f'{target} ({_met(row["ratio"] >= target)})' if target else '',
    }


def training_results(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return a row for each memory mode and each peer, both in their faster memory format."""
    setting = result['setting']
    fastest: dict[tuple[str, str], Mapping[str, Any]] = {}
    less_exact = set()
    for name, row in result['contenders'].items():
        whose, *form = [w for w in name.split(', ') if w not in ('channels-last', 'compiled')]
        key = (whose, *form, '')[:2]
        if 'memory' in row and row['ratio'] >= fastest.get(key, row)['ratio']:
            fastest[key] = row
        if name in result['inexact']:
            less_exact.add(key)
    rows = []
    for (whose, form), row in fastest.items():
        for (peer, _), other in fastest.items():
            if whose != 'mmdense' or peer == 'mmdense':
                continue
            speedup, share = row['ratio'] / other['ratio'], row['memory'] / other['memory']
            target = _target(TRAINING_TARGETS, setting, peer) if form == 'lean' else None
            met = target and share <= target[0] and speedup >= target[1]
            rows.append(
                {
                    'network': setting['network'],
                    'dtype': setting['dtype'],
                    'images': _images(setting),
                    'mmdense': (form or 'plain')
                    + (LESS_EXACT if (whose, form) in less_exact else ''),
                    'peer': peer,
                    'speedup': f'{speedup:.2f}',
                    'memory share': f'{share:.2f}',
                    'target': f'{target[0]} at {target[1]} ({_met(met)})' if target else '',
                }
            )
    return rows


def _met(is_met: bool) -> str:
    return 'met' if is_met else 'missed'


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
