"""Tables from recorded comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ['markdown']

# Least ratio of times that was set out for, in inference on a CPU at 512 x 512, batch 1.
GOALS = {
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
# In training at 512 x 512, batch 2: largest share of a peer's memory, least ratio of times to it.
TRAINING_GOALS = {
    ('densenet121', 'torchvision'): (0.333, 1.0),
    ('densenet121', 'torchvision_memory_efficient'): (0.65, 1.0),
    ('rdnet_tiny', 'timm'): (0.5, 0.95),
}
DOUBT = ' (further from float64 than the peers)'
SUMMARY = ('network', 'type', 'ours', 'fastest peer', 'times as fast', '95 %', 'goal')
TRAINING = ('network', 'type', 'ours', 'peer', 'times as fast', 'share of its memory', 'goal')
DETAIL = ('contender', 'times as fast', '95 %', 'error', 'memory (MB)')


def markdown(records: Sequence[Mapping[str, Any]]) -> str:
    """Return the tables of records, each a dict of machine and ``results`` of ``compare``."""
    return '\n\n'.join(part for record in records for part in _record(record)) + '\n'


def _record(record: Mapping[str, Any]) -> list[str]:
    versions = ', '.join(f'{name} {version}' for name, version in record['versions'].items())
    parts = [
        f'## {record["device"]}, {record["date"]}',
        f'{versions}; OMP_WAIT_POLICY {record["omp_wait_policy"]}.',
    ]
    inference = [_summary(result) for result in _of(record, 'infer')]
    training = [row for result in _of(record, 'train') for row in _training(result)]
    if inference:
        parts += ['### Inference', _table(SUMMARY, inference, numbers=(4, 5, 6))]
    if training:
        parts += ['### Training', _table(TRAINING, training, numbers=(4, 5, 6))]
    for result in record['results']:
        parts += [f'### {_title(result["setting"])}', _table(DETAIL, _detail(result), (1, 2, 3, 4))]
    return parts


def _of(record: Mapping[str, Any], mode: str) -> list[Mapping[str, Any]]:
    return [result for result in record['results'] if result['setting']['mode'] == mode]


def _title(setting: Mapping[str, Any]) -> str:
    height, width = setting['size']
    mode = dict(infer='inference', train='training')[setting['mode']]
    return (
        f'{setting["network"]}, {mode}, {setting["dtype"]}, {height} x {width}, '
        f'batch {setting["batch"]}'
    )


def _summary(result: Mapping[str, Any]) -> list[str]:
    setting, rows = result['setting'], result['contenders']
    ours = {k: row for k, row in rows.items() if k.startswith('mmdense') and 'ratio' in row}
    best = max(ours, key=lambda name: ours[name]['ratio'])
    goal = GOALS.get((setting['network'], setting['dtype']))
    reached = '' if goal is None else f'{goal} ({_met(ours[best]["ratio"] >= goal)})'
    doubt = DOUBT if best in result['inexact'] else ''
    return [
        setting['network'],
        setting['dtype'],
        best.removeprefix('mmdense').lstrip(', ') + doubt or 'plain',
        result['peer'],
        f'{ours[best]["ratio"]:.2f}',
        _interval(ours[best]),
        reached,
    ]


def _training(result: Mapping[str, Any]) -> list[list[str]]:
    """Return a line for each way to save memory and each peer, both in their faster formats."""
    setting = result['setting']
    faster: dict[tuple[str, str], Mapping[str, Any]] = {}
    doubts = set()
    for name, row in result['contenders'].items():
        whose, *form = [w for w in name.split(', ') if w not in ('channels-last', 'compiled')]
        at = (whose, *form, '')[:2]
        if 'memory' in row and row['ratio'] > faster.get(at, row)['ratio'] - 1e-9:
            faster[at] = row
        if name in result['inexact']:
            doubts.add(at)
    lines = []
    for (whose, form), ours in faster.items():
        if whose != 'mmdense':
            continue
        for (peer, _), theirs in faster.items():
            if peer == 'mmdense':
                continue
            speed, share = ours['ratio'] / theirs['ratio'], ours['memory'] / theirs['memory']
            goal = TRAINING_GOALS.get((setting['network'], peer)) if form == 'lean' else None
            reached = ''
            if goal is not None:
                most, least = goal
                met = _met(share <= most and speed >= least)
                reached = f'{most} at {least} ({met})'
            name = (form or 'plain') + (DOUBT if (whose, form) in doubts else '')
            cells = [f'{speed:.2f}', f'{share:.2f}', reached]
            lines.append([setting['network'], setting['dtype'], name, peer, *cells])
    return lines


def _met(is_met: bool) -> str:
    return 'met' if is_met else 'not met'


def _detail(result: Mapping[str, Any]) -> list[list[str]]:
    lines = []
    for name, row in result['contenders'].items():
        if 'failed' in row:
            lines.append([name, row['failed'].replace('|', '/')[:80], '', '', ''])
            continue
        memory = f'{row["memory"] / 1e6:.0f}' if 'memory' in row else ''
        lines.append([name, f'{row["ratio"]:.2f}', _interval(row), f'{row["error"]:.1e}', memory])
    return lines


def _interval(row: Mapping[str, Any]) -> str:
    low, high = row['interval']
    return f'{low:.2f} to {high:.2f}'


def _table(titles: Sequence[str], rows: Sequence[Sequence[str]], numbers: Sequence[int]) -> str:
    rule = ['--:' if column in numbers else '---' for column in range(len(titles))]
    return '\n'.join('| ' + ' | '.join(row) + ' |' for row in [titles, rule, *rows])
