"""The report of a sweep: one HTML file that needs nothing else, a page of Markdown, and a CSV file.

Plots are SVG in the HTML, and PNG files beside the Markdown.
"""

from __future__ import annotations

import base64
import csv
import html
import io
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.resources import files
from pathlib import Path
from string import Template
from typing import Any, NamedTuple

import cv2

from mmdense.benchmark.drawing import (
    Box,
    Dot,
    Drawing,
    Line,
    Point,
    Scale,
    Text,
    add_axes,
    add_labels,
    add_legend,
    spread,
    style,
    svg,
    text_width,
    write_png,
)
from mmdense.errors import UserError

__all__ = ['frontier', 'write_report']

MISSING = '–'
WIDTHS = dict(wide=560, narrow=360)  # pixels; the style sheet shows one of them
HEIGHT = 340
CURVE_POINTS = 150
PICTURE_SIDE, PICTURE_BYTES = 320, 24_000  # what is larger is made smaller
DASHES = ((), (7, 3), (2, 2), (9, 3, 2, 3), (4, 4))
PARTS = (  # of a model: the name in results.json, in the CSV file, heading, unit, its size
    ('parameters', 'parameters_m', 'parameters', 'M', 1e6),
    ('macs', 'multiply_adds_g', 'multiply-adds', 'G', 1e9),
    ('activations', 'activations_m', 'activations', 'M', 1e6),
)
COSTS = (  # in the CSV file, group, heading, unit, where and under which name, unit's size, better
    ('infer_p50_ms', 'Inference', 'median', 'ms', 'infer', 'p50', 1e-3, 'min'),
    ('infer_p95_ms', 'Inference', 'p95', 'ms', 'infer', 'p95', 1e-3, 'min'),
    ('infer_images_per_s', 'Inference', 'images', 'per s', 'infer', 'throughput', 1, 'max'),
    ('infer_speed', 'Inference', 'speed', 'relative', 'infer', 'ratio', 1, 'max'),
    ('infer_memory_mb', 'Inference', 'memory', 'MB', 'infer', 'memory', 1e6, 'min'),
    ('train_p50_ms', 'Training step', 'median', 'ms', 'train', 'p50', 1e-3, 'min'),
    ('train_p95_ms', 'Training step', 'p95', 'ms', 'train', 'p95', 1e-3, 'min'),
    ('train_images_per_s', 'Training step', 'images', 'per s', 'train', 'throughput', 1, 'max'),
    ('train_speed', 'Training step', 'speed', 'relative', 'train', 'ratio', 1, 'max'),
    ('train_memory_mb', 'Training step', 'memory', 'MB', 'train', 'memory', 1e6, 'min'),
    *(
        (name, 'Model', title, unit, 'model', key, size, 'min')
        for key, name, title, unit, size in PARTS
    ),
    ('training_min', 'Training', 'time', 'min', 'took', 'seconds', 60, ''),
)
SAID = {'Inference': 'inference, ', 'Training step': 'training step, ', 'Training': 'training '}
ONLY_IN_CSV = {'train_p95_ms', 'train_images_per_s', 'train_speed', 'activations_m'}


@dataclass(frozen=True)
class Column:
    """A figure of each row.

    Attributes:
        name: In the CSV file, with the unit.
        group: The heading over several columns.
        title: The heading.
        unit: Of the figures; '' has none.
        values: The rows' figures; None of one that has none.
        better: 'max', 'min', or '' where neither is.
        shown: In the tables; all are in the CSV file.
    """

    name: str
    group: str
    title: str
    unit: str
    values: Sequence[float | None]
    better: str
    shown: bool = True

    @property
    def known(self) -> list[float]:
        return [value for value in self.values if value is not None]

    @property
    def full_title(self) -> str:
        return f'{self.title} ({self.unit})' if self.unit else self.title

    @property
    def best(self) -> float | None:
        """The best figure; None if all are the same, or none is better."""
        if not self.better or len(set(self.known)) < 2:
            return None
        return max(self.known) if self.better == 'max' else min(self.known)

    @cached_property
    def digits(self) -> int:
        """Digits behind the point: as many for all figures."""
        sizes = [abs(value) for value in self.known if value] or [1.0]
        middle = math.sqrt(min(sizes) * max(sizes))
        return min(max(2 - math.floor(math.log10(middle)), 0), 3)

    def say(self, value: float | None) -> str:
        return MISSING if value is None else f'{value:.{self.digits}f}'


class Plot(NamedTuple):
    """The metric against a column."""

    column: Column
    file: str
    title: str
    axis: str


def write_report(folder: Path) -> None:
    """Write report.html, report.md and results.csv beside results.json; plots into pictures/.

    Args:
        folder: Holds results.json, and the pictures that it names.

    Raises:
        UserError: There is no results.json, or it cannot be read.
    """
    results = _read(folder / 'results.json')
    columns = _columns(results)
    (folder / 'results.csv').write_text(_csv(results, columns), encoding='utf-8')
    (folder / 'report.html').write_text(_html(results, columns, folder), encoding='utf-8')
    (folder / 'report.md').write_text(_markdown(results, columns, folder), encoding='utf-8')


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding='utf-8'))
    except FileNotFoundError:
        raise UserError(f'there is no {file}: run tools/benchmark.py sweep first') from None
    except ValueError as error:
        raise UserError(f'{file} is damaged ({error}): run the sweep again') from None


# Figures.


def _finite(value: float | None, unit: float = 1) -> float | None:
    return value / unit if value is not None and math.isfinite(value) else None


def _columns(results: Mapping[str, Any]) -> list[Column]:
    rows = results['rows']
    columns = []
    for name in results['metrics']:
        title, _, unit = name.partition(' (')  # such as 'mIoU (%)'
        # What was measured half-way through a training must not be taken for its outcome.
        values = [_finite(r['metrics'].get(name)) if r['status'] == 'done' else None for r in rows]
        columns.append(Column(_slug(name), 'Accuracy', title, unit.rstrip(')'), values, 'max'))
    costs = [_costs(row) for row in rows]
    for name, group, title, unit, where, key, size, better in COSTS:
        values = [_finite(cost[where].get(key), size) for cost in costs]
        columns.append(Column(name, group, title, unit, values, better, name not in ONLY_IN_CSV))
    return columns


def _costs(row: Mapping[str, Any]) -> dict[str, Mapping[str, float]]:
    """Return a row's costs under the names of ``COSTS``."""
    parts = row['parts'].values()
    model = {key: sum(part[key] for part in parts) for key, *_ in PARTS} if parts else {}
    took = {'seconds': row['seconds']} if row['status'] == 'done' else {}
    return dict(infer=row['infer'] or {}, train=row['train'] or {}, model=model, took=took)


def _part_columns(results: Mapping[str, Any]) -> list[Column]:
    rows = results['rows']
    columns = []
    for part in dict.fromkeys(name for row in rows for name in row['parts']):
        for key, slug, title, unit, size in PARTS:
            values = [_finite(row['parts'].get(part, {}).get(key), size) for row in rows]
            columns.append(Column(f'{_slug(part)}_{slug}', part, title, unit, values, ''))
    return columns


def _slug(text: str) -> str:
    words = ''.join(c if c.isalnum() else ' ' for c in text.lower().replace('%', 'percent'))
    return '_'.join(words.split())


def _in_order(metric: Column) -> list[int]:
    """Return the rows' numbers by a metric, best first; those without it last."""
    keys = [math.inf if value is None else -value for value in metric.values]
    return sorted(range(len(keys)), key=keys.__getitem__)


def _plots(results: Mapping[str, Any], columns: Sequence[Column]) -> list[Plot]:
    measured = results['measured']
    if measured is None:
        return []
    named = {column.name: column for column in columns}
    one, many = (
        'an image' if measured[key] == 1 else f'{measured[key]} images'
        for key in ('infer_batch', 'train_batch')
    )
    plots = [
        Plot(named['infer_p50_ms'], 'latency', 'latency', f'median latency of {one} (ms)'),
        Plot(named['multiply_adds_g'], 'macs', 'multiply-adds', 'multiply-adds (G)'),
        Plot(
            named['train_memory_mb'], 'memory', 'training memory', f'training memory of {many} (MB)'
        ),
        Plot(named['parameters_m'], 'parameters', 'parameters', 'parameters (M)'),
    ]
    return [plot for plot in plots if _both(columns[0], plot.column)]


def _both(metric: Column, cost: Column) -> list[tuple[int, float, float]]:
    """Return (row, cost, metric) of the rows that have both."""
    pairs = enumerate(zip(cost.values, metric.values, strict=True))
    return [(i, x, y) for i, (x, y) in pairs if x is not None and y is not None]


def frontier(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return which points (cost, quality) none beats in one without being beaten in the other.

    They come by rising cost; of equal points the first one.
    """
    order = sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1]))
    found: list[int] = []
    for i in order:
        if not found or points[i][1] > points[found[-1]][1]:
            found.append(i)
    return found


def _looks(results: Mapping[str, Any]) -> dict[str, int]:
    names = dict.fromkeys(row['family'] for row in results['rows'])
    return {name: i for i, name in enumerate(names)}


# Drawing.


def _short(name: str) -> str:
    return name if len(name) <= 26 else f'{name[:15]}…{name[-10:]}'


def _scatter(
    results: Mapping[str, Any], metric: Column, plot: Plot, *, width: float, legend: bool = False
) -> Drawing:
    """Draw the metric against a cost, with the frontier; a legend names the families below."""
    looks = _looks(results)
    found = _both(metric, plot.column)
    drawing = Drawing(width, HEIGHT, f'{metric.full_title} against {plot.title}')
    across = Scale.over([x for _, x, _ in found], 48, width - 12)
    up = Scale.over([y for _, _, y in found], HEIGHT - 44, 30)
    front = frontier([(x, y) for _, x, y in found])
    spots = [Point(across(x), up(y)) for _, x, y in found]
    steps: list[Point] = []
    for i in front:
        steps += [Point(spots[i].x, steps[-1].y if steps else up.start), spots[i]]
    steps.append(Point(across.end, steps[-1].y))
    drawing.marks.append(Line((*steps, Point(across.end, up.start)), closed=True))
    x_title = f'← {plot.axis}, lower is better'
    y_title = f'↑ {metric.full_title}, higher is better'
    add_axes(drawing, across, up, x_title=x_title, y_title=y_title)
    drawing.marks.append(Line(tuple(steps), 'frontier'))
    dots, names = [], []
    # Those of the frontier are placed first and drawn last.
    for i in [*front, *(i for i in range(len(found)) if i not in front)]:
        row, x, y = found[i]
        name, family = (results['rows'][row][key] for key in ('backbone', 'family'))
        figures = f'{metric.full_title} {metric.say(y)}, {plot.axis} {plot.column.say(x)}'
        dots.append(Dot(spots[i], looks[family], i in front, row, f'{name} ({family}): {figures}'))
        names.append(_short(name))
    room = Box(across.start + 1, up.end - 8, across.end + 8, up.start - 1)
    add_labels(drawing, dots, names, room=room, path=steps)
    drawing.marks += reversed(dots)
    if legend:
        add_legend(drawing, looks)
    return drawing


def _curves(
    results: Mapping[str, Any],
    curves: Mapping[int, Sequence[tuple[float, float]]],
    *,
    title: str,
    axis: str,
    width: float,
) -> Drawing:
    """Draw curves over iterations, with the backbones' names at their ends."""
    rows = results['rows']
    looks = _looks(results)
    names = {row: _short(rows[row]['backbone']) for row in curves}
    height = max(HEIGHT, 15 * len(curves) + 74)
    drawing = Drawing(width, height, title)
    edge = width - max(text_width(name, 'label') for name in names.values()) - 6
    across = Scale.over([0, *(x for curve in curves.values() for x, _ in curve)], 48, edge - 44)
    across = Scale(0, across.high / 1.08, False, across.start, across.end)
    up = Scale.over([y for curve in curves.values() for _, y in curve], height - 44, 30)
    add_axes(drawing, across, up, x_title='iteration', y_title=axis)
    ends = {row: Point(across(curve[-1][0]), up(curve[-1][1])) for row, curve in curves.items()}
    order = sorted(ends, key=lambda row: ends[row].y)
    heights = spread([ends[row].y for row in order], 15, up.end, up.start)
    members: dict[str, int] = {}
    for row, y in zip(order, heights, strict=True):
        drawing.marks += [
            Line((ends[row], Point(edge - 30, y)), 'leader', row=row),
            Text(Point(edge, y + 4), names[row], row=row),
        ]
    for row, curve in curves.items():
        family = rows[row]['family']
        members[family] = members.get(family, -1) + 1
        style = dict(look=looks[family], row=row, title=rows[row]['backbone'])
        dash = DASHES[members[family] % len(DASHES)]
        y = heights[order.index(row)]
        drawing.marks += [
            Line(tuple(Point(across(x), up(y)) for x, y in curve), dash=dash, **style),
            Line((Point(edge - 30, y), Point(edge - 4, y)), dash=dash, **style),  # a key
            Dot(ends[row], full=False, **style),
        ]
    return drawing


def _thin(curve: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """Return (iteration, value) of finite values, as means of neighbours where they are many."""
    known = [(x, y) for x, y in curve if _finite(y) is not None]
    size = math.ceil(len(known) / CURVE_POINTS)
    parts = [known[i : i + size] for i in range(0, len(known), size or 1)]
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts]


# Words.


def _title(results: Mapping[str, Any]) -> str:
    return f'Backbones in {Path(results["config"]).stem}'


def _subtitle(results: Mapping[str, Any]) -> str:
    rows = results['rows']
    counts = Counter(row['status'] for row in rows)
    states = [f'{counts[s]} {s}' for s in ('done', 'failed', 'training', 'waiting') if counts[s]]
    start = 'pretrained' if results['pretrained'] else 'random'
    return (
        f'{results["task"].capitalize()} on {results["data"]}: {results["schedule"]} for each '
        f'backbone, from {start} weights. {_number(len(rows), "backbone")}: {", ".join(states)}.'
    )


def _number(count: int, noun: str) -> str:
    return f'{count} {noun}' if count == 1 else f'{count} {noun}s'


def _status(row: Mapping[str, Any]) -> str:
    if row['status'] == 'failed':
        return f'failed: {row["error"]}'
    return row.get('error') or ('' if row['status'] == 'done' else row['status'])


def _findings(results: Mapping[str, Any], columns: Sequence[Column]) -> list[str]:
    """Return what stands out, as sentences; none unless two rows are there to compare."""
    names = [row['backbone'] for row in results['rows']]
    named = {column.name: column for column in columns}
    found = []
    for what, column in (
        (f'Best {columns[0].title}', columns[0]),
        ('Fastest inference', named['infer_p50_ms']),
        ('Least memory in training', named['train_memory_mb']),
        ('Fewest multiply-adds', named['multiply_adds_g']),
    ):
        if column.best is not None:
            values = zip(names, column.values, strict=True)
            best = _list(name for name, value in values if value == column.best)
            found.append(f'{what}: {best}, {column.say(column.best)} {column.unit}'.rstrip() + '.')
    # Who is on the frontiers of all plots and who on none, of those that all plots have.
    known, fronts = set(range(len(names))), []
    for plot in _plots(results, columns):
        both = _both(columns[0], plot.column)
        known &= {row for row, _, _ in both}
        fronts.append({both[i][0] for i in frontier([(x, y) for _, x, y in both])})
    if not fronts or len(known) < 2:
        return found
    always = known.intersection(*fronts)
    never = known.difference(*fronts)
    every = 'On the frontier of every plot, so that no other is both better and cheaper'
    for what, rows in ((every, always), ('On no frontier', never)):
        if rows:
            found.append(f'{what}: {_list(names[row] for row in sorted(rows))}.')
    return found


def _list(names: Iterable[str]) -> str:
    *names, last = names
    return f'{", ".join(names)} and {last}' if names else last


def _how(results: Mapping[str, Any]) -> list[str]:
    """Return how it was measured, as paragraphs without the command."""
    rows, measured, machine = (results[key] for key in ('rows', 'measured', 'machine'))
    said = [
        f'{_list(results["metrics"])} on the validation data, after training for '
        f'{results["schedule"]}. Each backbone was trained once: small differences may be chance.'
    ]
    if measured is None or not any(row['infer'] or row['train'] for row in rows):
        said.append('Times and memory were not measured.')
    else:
        layout = ', channels-last' if measured['channels_last'] else ''
        said.append(
            f'Inference is the whole model, post-processing included, on '
            f'{_number(measured["infer_batch"], "test image")} at a time; a training step is '
            f'forward and backward on {_number(measured["train_batch"], "training image")}, '
            f'without the update. Both ran {_number(measured["rounds"], "round")} on '
            f'{measured["device"]}{layout}, all backbones in turn and in random order. Median and '
            'p95, the 95th percentile, are over the rounds. Speed is relative to the fastest, '
            'whose is 1. Memory is that of weights and all else at the peak, without the '
            "optimizer's states; MB are 1,000,000 bytes."
        )
        for form, what in (('deployed', 'in deployed form'), ('trained', 'as trained')):
            names = [r['backbone'] for r in rows if r['infer'] and r['form'] == form]
            if names:
                said.append(f'Inference {what}: {_list(names)}.')
    if any(row['parts'] for row in rows):
        size = f' of {measured["size"][0]} x {measured["size"][1]} pixels' if measured else ''
        said.append(
            'Multiply-adds are those of convolutions and matrix products in the whole model, for '
            f'one image{size}; of a pruned CondenseNetV2, those of the connections that are left.'
        )
    versions = ', '.join(f'{name} {version}' for name, version in machine['versions'].items())
    said.append(
        f'{machine["date"]}, {machine["device"]}; {versions}; OMP_WAIT_POLICY '
        f'{machine["omp_wait_policy"]}.'
    )
    return said


# Files.


def _csv(results: Mapping[str, Any], columns: Sequence[Column]) -> str:
    """Return a line for each backbone; units are in the names of the columns."""
    columns = [*columns, *_part_columns(results)]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    words = ('backbone', 'family', 'status', 'error', 'form')
    writer.writerow([*words, *(column.name for column in columns)])
    for i, row in enumerate(results['rows']):
        figures = ('' if c.values[i] is None else f'{c.values[i]:.6g}' for c in columns)
        writer.writerow([*(row.get(word) or '' for word in words), *figures])
    return text.getvalue()


def _markdown(results: Mapping[str, Any], columns: Sequence[Column], folder: Path) -> str:
    """Return the page, and write its plots."""
    shown = [c for c in columns if c.shown and c.known]
    titles = ['backbone', *(f'{SAID.get(c.group, "")}{c.full_title}' for c in shown)]
    lines = [titles, ['---', *('--:' for _ in shown)]]
    for i in _in_order(columns[0]):
        row = results['rows'][i]
        status = f' ({_status(row)})' if _status(row) else ''
        lines.append([row['backbone'] + status, *(c.say(c.values[i]) for c in shown)])
    table = '\n'.join('| ' + ' | '.join(_plain(c) for c in line) + ' |' for line in lines)
    plots = []
    for plot in _plots(results, columns):
        file = Path('pictures') / f'plot_{plot.file}.png'
        (folder / file).parent.mkdir(exist_ok=True)
        drawing = _scatter(results, columns[0], plot, width=WIDTHS['wide'], legend=True)
        write_png(drawing, folder / file)
        plots.append(f'![{_plain(drawing.title)}]({file.as_posix()})')
    legend = 'Filled: no other is better in both. The line joins those.'
    how = [*(_plain(text) for text in _how(results)), f'    {" ".join(results["command"].split())}']
    parts = [f'# {_plain(_title(results))}', _plain(_subtitle(results)), table]
    if plots:
        parts += ['## Accuracy against cost', legend, *plots]
    return '\n\n'.join([*parts, '## How it was measured', *how]) + '\n'


def _plain(text: str) -> str:
    """Return a text that Markdown takes for nothing but text."""
    text = ' '.join(text.split())
    return html.escape(text, quote=False).replace('|', '\\|').replace('`', "'")


def _html(results: Mapping[str, Any], columns: Sequence[Column], folder: Path) -> str:
    page = (files('mmdense.benchmark') / 'sweep_report.html').read_text(encoding='utf-8')
    escape = html.escape
    findings = ''.join(f'<li>{escape(text)}</li>' for text in _findings(results, columns))
    how = ''.join(f'<p>{escape(text)}</p>' for text in _how(results))
    command = f'<pre tabindex="0"><code>{escape(results["command"])}</code></pre>'
    config = f'<p>Config: <code>{escape(results["config"])}</code></p>'
    sections = [
        ('At a glance', f'<ul>{findings}</ul>' if findings else ''),
        ('Results', _html_table(results, columns)),
        ('Accuracy against cost', _html_plots(results, columns)),
        ('Training', _html_curves(results)),
        ('Predictions', _html_pictures(results, columns[0], folder)),
        ('Parts of the models', _html_parts(results, columns)),
        ('How it was measured', how + config + command),
    ]
    body = ''.join(
        f'<section aria-labelledby="section-{i}"><h2 id="section-{i}">{title}</h2>{text}</section>'
        for i, (title, text) in enumerate(sections)
        if text
    )
    return Template(page).substitute(
        title=escape(_title(results)),
        subtitle=escape(_subtitle(results)),
        style=style(),
        body=body,
    )


def _swatch(look: int) -> str:
    return svg(Drawing(16, 16, '', [Dot(Point(8, 8), look)]), 'swatch').replace(
        'role="img" aria-label=""', 'aria-hidden="true"'
    )


def _breakable(name: str) -> str:
    """Return a name that a narrow column breaks where its words end."""
    return re.sub('([_:./])', r'\1<wbr>', html.escape(name))


def _scroll(name: str, content: str) -> str:
    """Return content that scrolls sideways, by keyboard as well."""
    return f'<div class="scroll" role="region" aria-label="{name}" tabindex="0">{content}</div>'


def _head(columns: Sequence[Column], *, first: str = '') -> str:
    """Return a table's head, groups over columns: sortable if the first to sort by is given."""

    def cell(title: str, unit: str, attributes: str) -> str:
        unit = f' <small>{html.escape(unit)}</small>' if unit else ''
        text = f'{html.escape(title)}{unit}'
        text = f'<button type="button">{text}</button>' if first else text
        return f'<th scope="col" {attributes}>{text}</th>'

    over = ''.join(
        f'<th scope="colgroup" colspan="{count}">{html.escape(group)}</th>'
        for group, count in Counter(column.group for column in columns).items()
    )
    corner = cell('Backbone', '', 'rowspan="2" data-column="0" data-first="ascending"')
    cells = ''
    for i, column in enumerate(columns, 1):
        order = ' aria-sort="descending"' if column.name == first else ''
        better = f'data-first="{"descending" if column.better == "max" else "ascending"}"'
        cells += cell(column.title, column.unit, f'data-column="{i}" {better}{order}')
    return f'<thead><tr>{corner}{over}</tr><tr>{cells}</tr></thead>'


def _body(results: Mapping[str, Any], columns: Sequence[Column], order: Sequence[int]) -> str:
    looks = _looks(results)
    lines = []
    for i in order:
        row = results['rows'][i]
        status = html.escape(_status(row))
        note = f'<span class="note {row["status"]}">{status}</span>' if status else ''
        name = f'{_swatch(looks[row["family"]])}<span>{_breakable(row["backbone"])}</span>'
        cells = ''
        for column in columns:
            value = column.values[i]
            mark = ' class="best"' if value is not None and value == column.best else ''
            given = '' if value is None else f' data-value="{value:.9g}"'
            cells += f'<td{mark}{given}>{column.say(value)}</td>'
        if all(column.values[i] is None for column in columns):
            cells, note = f'<td class="whole" colspan="{len(columns) or 1}">{note}</td>', ''
        head = f'<div title="{html.escape(row["family"])}">{name}</div>{note}'
        lines.append(f'<tr data-row="{i}"><th scope="row">{head}</th>{cells}</tr>')
    return f'<tbody>{"".join(lines)}</tbody>'


def _html_table(results: Mapping[str, Any], columns: Sequence[Column]) -> str:
    shown = [c for c in columns if c.shown and c.known]
    table = _head(shown, first=columns[0].name) + _body(results, shown, _in_order(columns[0]))
    note = '<p class="hint">Click a heading to sort. The best figure of a column is bold.</p>'
    return note + _scroll('Results', f'<table id="results">{table}</table>')


def _html_parts(results: Mapping[str, Any], columns: Sequence[Column]) -> str:
    parts = [column for column in _part_columns(results) if column.known]
    if not parts:
        return ''
    order = [i for i in _in_order(columns[0]) if results['rows'][i]['parts']]
    table = f'<table>{_head(parts)}{_body(results, parts, order)}</table>'
    summary = '<summary>What backbone, neck and heads take of each model</summary>'
    return f'<details>{summary}{_scroll("Parts of the models", table)}</details>'


def _figures(results: Mapping[str, Any], draws: Iterable[Callable[..., Drawing]]) -> str:
    """Return figures below a legend, each drawn for screens of several widths."""
    names = ''.join(f'<li>{_swatch(i)}{html.escape(n)}</li>' for n, i in _looks(results).items())
    figures = ''
    for draw in draws:
        drawings = {name: draw(width=width) for name, width in WIDTHS.items()}
        pictures = ''.join(svg(drawing, name) for name, drawing in drawings.items())
        title = html.escape(drawings['wide'].title)
        figures += f'<figure><figcaption>{title}</figcaption>{pictures}</figure>'
    legend = f'<ul class="legend" aria-label="Families">{names}</ul>'
    return f'{legend}<div class="plots">{figures}</div>' if figures else ''


def _html_plots(results: Mapping[str, Any], columns: Sequence[Column]) -> str:
    plots = _plots(results, columns)
    if not plots:
        return '<p>Nothing to plot yet: no backbone has both an accuracy and a cost.</p>'
    hint = (
        '<p class="hint">The best corner is the upper left. Filled marks and bold names: no other '
        'backbone is better in both. All in the tinted area are beaten.</p>'
    )
    return hint + _figures(results, (partial(_scatter, results, columns[0], p) for p in plots))


def _html_curves(results: Mapping[str, Any]) -> str:
    metric = results['metrics'][0]
    draws = []
    for title, axis, curves in (
        ('Training loss', 'loss', [row['losses'] for row in results['rows']]),
        (
            f'{metric} on validation data',
            metric,
            [[(v['iter'], v.get(metric)) for v in r['validations']] for r in results['rows']],
        ),
    ):
        known = {i: thin for i, curve in enumerate(curves) if (thin := _thin(curve))}
        if known:
            draws.append(partial(_curves, results, known, title=title, axis=axis))
    return _figures(results, draws)


def _html_pictures(results: Mapping[str, Any], metric: Column, folder: Path) -> str:
    """Return a table: an image a row, the truth and then the backbones across."""
    order = [i for i in _in_order(metric) if results['rows'][i]['pictures']]
    if not order:
        return ''
    heads, lists = ['<th scope="col">truth</th>'], [('truth', results['truth'])]
    for i in order:
        row = results['rows'][i]
        score = f'<small>{html.escape(metric.title)} {metric.say(metric.values[i])}</small>'
        score = '' if metric.values[i] is None else score
        heads.append(f'<th scope="col" data-row="{i}">{_breakable(row["backbone"])}{score}</th>')
        lists.append((row['backbone'], row['pictures']))
    lines = []
    for number in range(max(len(names) for _, names in lists)):
        cells = ''
        for whose, names in lists:
            data = _picture(folder / names[number]) if number < len(names) else None
            alt = html.escape(f'{whose}, image {number + 1}')
            image = f'<button type="button"><img src="{data}" alt="{alt}"></button>'
            cells += f'<td>{image if data else MISSING}</td>'
        lines.append(f'<tr>{cells}</tr>')
    room = f'min-width:{8 * len(lists)}rem;max-width:{16 * len(lists)}rem'
    table = (
        f'<table id="pictures" style="{room}"><thead><tr>{"".join(heads)}</tr></thead>'
        f'<tbody>{"".join(lines)}</tbody></table>'
    )
    hint = '<p class="hint">Click a picture to see it large, beside the truth.</p>'
    return hint + _scroll('Predictions', table)


def _picture(file: Path) -> str | None:
    """Return a JPEG picture as the address of itself, smaller if it is large; None without one."""
    image = cv2.imread(str(file))
    if image is None:
        return None
    data, shrink = file.read_bytes(), min(1, PICTURE_SIDE / max(image.shape[:2]))
    if shrink < 1 or len(data) > PICTURE_BYTES:
        image = cv2.resize(image, None, fx=shrink, fy=shrink, interpolation=cv2.INTER_AREA)
        data = cv2.imencode('.jpg', image, [cv2.IMWRITE_JPEG_QUALITY, 82])[1].tobytes()
    return f'data:image/jpeg;base64,{base64.b64encode(data).decode()}'
