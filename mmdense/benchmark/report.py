"""The report of a sweep: an HTML page, a Markdown page with plots, and a CSV file.

The HTML page is one file that opens without a network: its plots are SVG, its pictures data URLs.
Layout and wording of the pages are in ``templates/``.
"""

import base64
import csv
import html
import itertools
import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import cv2
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from tabulate import tabulate

from mmdense.benchmark.bootstrap import RESAMPLES, compare_rows
from mmdense.benchmark.plots import (
    PALETTE,
    Item,
    plot_curves,
    plot_scatter,
    svg,
    swatch,
    write_png,
)
from mmdense.benchmark.robustness import FIGURES
from mmdense.benchmark.timing import FORMS
from mmdense.visualization.logs import METRIC_NAMES

VERSION = 4  # of results.json; docs/comparing.md describes it
NAMES = {*METRIC_NAMES.values(), *FIGURES}
MISSING = '–'
CURVE_POINTS = 150
LEARNED = 0.05  # a smaller metric, as a share of the largest possible, ranks nothing
PICTURE_SIDE, PICTURE_BYTES = 320, 24_000  # larger pictures are scaled down
COSTS = (  # key in results.json, in the CSV file, heading, unit, its size, which is better
    ('p50', 'p50_ms', 'median', 'ms', 1e-3, 'min'),
    ('p95', 'p95_ms', 'p95', 'ms', 1e-3, 'min'),
    ('throughput', 'images_per_s', 'images', 'per s', 1, 'max'),
    ('ratio', 'speed', 'speed', 'relative', 1, 'max'),
    ('memory', 'memory_mb', 'memory', 'MB', 1e6, 'min'),
)
PARTS = (
    ('parameters', 'parameters_m', 'parameters', 'M', 1e6, 'min'),
    ('macs', 'macs_g', 'MACs', 'G', 1e9, 'min'),
    ('activations', 'activations_m', 'activations', 'M', 1e6, 'min'),
)
GROUPS = dict(deployed='Inference, deployed', onnx='Inference, ONNX')
GROUPS |= dict(trained='Inference, as trained', train='Training step')
LATEX = {character: f'\\{character}' for character in '&%$#_{}'}
LATEX |= {'\\': r'\textbackslash{}', '~': r'\textasciitilde{}', '^': r'\textasciicircum{}'}
LATEX |= {'±': r'$\pm$', '–': '--', '→': r'$\to$'}
ONLY_IN_CSV = {'train_p95_ms', 'train_speed', 'activations_m'}
PREFIXES = {group: f'{group.lower()}, ' for group in GROUPS.values()} | {'Training': 'training '}


@dataclass(frozen=True)
class Column:
    """A figure of each backbone."""

    name: str  # in the CSV file, with the unit
    group: str  # the heading over several columns
    title: str
    unit: str  # '' for none
    values: Sequence[float | None]  # by row
    better: str = ''  # 'max' or 'min'
    deviations: Sequence[float | None] = ()  # standard deviations over the seeds

    @property
    def known(self) -> list[float]:
        return [value for value in self.values if value is not None]

    @property
    def full_title(self) -> str:
        return f'{self.title} ({self.unit})' if self.unit else self.title

    @property
    def best(self) -> float | None:
        """The best value; None if all are the same, or neither is better."""
        if not self.better or len(set(self.known)) < 2:
            return None
        return max(self.known) if self.better == 'max' else min(self.known)

    @cached_property
    def digits(self) -> int:
        """Digits after the point: as many for all values."""
        sizes = [abs(value) for value in self.known if value] or [1.0]
        middle = math.sqrt(min(sizes) * max(sizes))
        return min(max(2 - math.floor(math.log10(middle)), 0), 3)

    def text(self, value: float | None) -> str:
        return MISSING if value is None else f'{value:.{self.digits}f}'

    @property
    def spread(self) -> 'Column | None':
        """The standard deviations over the seeds, if there are any."""
        known = any(value is not None for value in self.deviations)
        return replace(self, name=f'{self.name}_std', values=self.deviations) if known else None

    def cell(self, row: int) -> str:
        """Return the text of a row, with the standard deviation if it has one."""
        text, deviation = self.text(self.values[row]), self.deviation(row)
        return text if deviation is None else f'{text} ± {deviation:.{self.digits}f}'

    def deviation(self, row: int) -> float | None:
        return self.deviations[row] if self.deviations else None


class Plot(NamedTuple):
    """A plot as SVG, and the PNG file of one of accuracy against cost."""

    title: str
    picture: Markup
    items: Sequence[Item]
    file: str = ''


def write_report(folder: Path) -> None:
    """Write report.html, report.md, results.csv, results.tex and the plots for ``results.json``."""
    results = json.loads((folder / 'results.json').read_text(encoding='utf-8'))
    report = Report(folder, results)
    report.write_csv(folder / 'results.csv')
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).with_name('templates')),
        autoescape=lambda name: not name.endswith('.tex.jinja'),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(breakable=_breakable, latex=_latex, listed=_listed, plain=_plain)
    for name in ('report.html', 'report.md', 'results.tex'):
        page = environment.get_template(f'{name}.jinja').render(report=report, results=results)
        (folder / name).write_text(page, encoding='utf-8')


class Report:
    """What the pages show, from the ``results`` of :meth:`.Sweep.report`."""

    palette, missing, resamples = PALETTE, MISSING, RESAMPLES

    def __init__(self, folder: Path, results: Mapping[str, Any]) -> None:
        self.folder, self.results, self.rows = folder, results, results['rows']
        # Metrics from the middle of a training are not its outcome.
        self.finished = [row if row['status'] == 'done' else None for row in self.rows]
        self.all_columns = [*self._metrics(), *self._costs()]
        self.metric = self.all_columns[0]
        self.costs = {column.name: column for column in self.all_columns}
        # Backbones are compared in the same form: the first one that all of them have.
        forms = [row['infer'] for row in self.rows if row['infer']]
        self.form = next((f for f in FORMS if all(f in each for each in forms)), 'trained')
        hidden = ONLY_IN_CSV | {
            f'{form}_{slug}'
            for form in {*GROUPS} - {self.form, 'train'}
            for _, slug, *_ in COSTS[1:]
        }
        chosen = results['columns'] or [
            column.name
            for column in self.all_columns
            if column.name not in hidden
            and (column.group != 'Accuracy' or column == self.metric or column.full_title in NAMES)
        ]
        known = {column.name: column for column in self.all_columns if column.known}
        self.columns = [known[name] for name in chosen if name in known]
        self.unknown = [name for name in results['columns'] if name not in known]
        sign = -1 if self.metric.better == 'max' else 1
        keys = [math.inf if value is None else sign * value for value in self.metric.values]
        self.ranked = sorted(range(len(keys)), key=keys.__getitem__)  # rows, best first
        self.differences = compare_rows(folder, self.finished, self.metric.full_title, self.ranked)
        names = dict.fromkeys(row['family'] for row in self.rows)
        self.families = {name: number for number, name in enumerate(names)}
        self.swatches = {name: swatch(number) for name, number in self.families.items()}
        self.statuses = [_status(row) for row in self.rows]
        self.states = Counter(row['status'] for row in self.rows)
        self.plots = [*self._plots()] if results['measured'] else []

    def _metrics(self) -> Iterable[Column]:
        for name in self.results['metrics']:
            title, _, unit = name.partition(' (')  # such as 'mIoU (%)'
            values = [row and _finite(row['metrics'].get(name)) for row in self.finished]
            deviations = [row and row['deviations'].get(name) for row in self.finished]
            less = self.results.get('rule') == 'less' and name == self.results['metrics'][0]
            better = 'min' if less else 'max'
            unit = unit.rstrip(')')
            yield Column(_slug(name), 'Accuracy', title, unit, values, better, deviations)

    def _costs(self) -> Iterable[Column]:
        for kind, group in GROUPS.items():
            figures = [(row['infer'] | dict(train=row['train'])).get(kind) for row in self.rows]
            for key, slug, title, unit, size, better in COSTS:
                values = [_finite((each or {}).get(key), size) for each in figures]
                yield Column(f'{kind}_{slug}', group, title, unit, values, better)
        for key, slug, title, unit, size, better in PARTS:
            parts = [row['parts'].values() for row in self.rows]
            values = [sum(part[key] for part in p) / size if p else None for p in parts]
            yield Column(slug, 'Model', title, unit, values, better)
        minutes = [row and _finite(row['seconds'], 60) for row in self.finished]
        yield Column('training_min', 'Training', 'time', 'min', minutes)

    def _plots(self) -> Iterable[Plot]:
        """Draw the plots of which at least one backbone has both figures."""
        measured, metric, costs = self.results['measured'], self.metric, self.costs
        memory = f'training memory of {_count(measured["train_batch"], "image")} (MB)'
        for cost, name, title, axis in (
            (costs[f'{self.form}_p50_ms'], 'latency', 'latency', 'median latency of 1 image (ms)'),
            (costs['macs_g'], 'macs', 'MACs', 'MACs (G)'),
            (costs['train_memory_mb'], 'memory', 'training memory', memory),
            (costs['parameters_m'], 'parameters', 'parameters', 'parameters (M)'),
        ):
            figures = zip(self.rows, cost.values, metric.values, strict=True)
            items = [
                self._item(
                    i,
                    [(x, y)],
                    f'{row["backbone"]} ({row["family"]}): {metric.full_title} {metric.cell(i)}, '
                    f'{axis} {cost.text(x)}',
                    metric.deviation(i) or 0.0,
                )
                for i, (row, x, y) in enumerate(figures)
                if x is not None and y is not None
            ]
            if items:
                figure = plot_scatter(items, x_title=axis, y_title=metric.full_title)
                title, file = f'{metric.full_title} against {title}', f'pictures/plot_{name}.png'
                yield Plot(title, svg(figure, title, items), items, file)
                (self.folder / file).parent.mkdir(exist_ok=True)
                write_png(figure, self.folder / file, self.families)

    def _item(
        self,
        row: int,
        points: Sequence[tuple[float, float]],
        tooltip: str = '',
        deviation: float = 0.0,
    ) -> Item:
        name, family = self.rows[row]['backbone'], self.rows[row]['family']
        return Item(row, name, self.families[family], points, tooltip or name, deviation)

    @cached_property
    def findings(self) -> list[str]:
        """The main results as sentences; none unless there are two backbones to compare."""
        names = [row['backbone'] for row in self.rows]
        sentences = []
        best = self.metric.best
        untrained = best is not None and best < LEARNED * (100 if self.metric.unit == '%' else 1)
        if untrained:
            figure = f'{self.metric.text(best)} {self.metric.unit}'.rstrip()
            sentences.append(
                f'No backbone has learned the task yet: the best {self.metric.title} is {figure}. '
                'Train longer, or check the data and the learning rate.'
            )
        for title, column in (
            (f'Best {self.metric.title}', self.metric),
            ('Fastest inference', self.costs[f'{self.form}_p50_ms']),
            ('Least memory in training', self.costs['train_memory_mb']),
            ('Fewest MACs', self.costs['macs_g']),
        ):
            if column.best is not None and not (untrained and column is self.metric):
                values = zip(names, column.values, strict=True)
                best = _listed(name for name, value in values if value == column.best)
                figure = f'{column.text(column.best)} {column.unit}'.rstrip()
                sentences.append(f'{title}: {best}, {figure}.')
        return sentences

    @cached_property
    def lists(self) -> dict[str, list[str]]:
        """Sentences by their title: which backbones are better, and the best one of each group."""
        rows = [(i, self.rows[i]) for i in self.ranked if self.metric.values[i] is not None]
        names = {i: row['backbone'] + ' (single run)' * (len(row['seeds']) == 1) for i, row in rows}
        others, groups = defaultdict(list), defaultdict(list)
        for (i, j), (value, low, high) in self.differences.items():
            verdict = 'better than' if low > 0 else 'not distinguishable from'
            text = f'{names[j]} ({value:.4f}; {low:.4f} to {high:.4f})'
            others[f'{names[i]} is {verdict}'].append(text)
        for i, row in rows:
            groups[row['family']].append(i)
        costs = {i: row['parts']['backbone']['macs'] / 1e9 for i, row in rows if row['parts']}
        classes = {i: 2.0 ** math.floor(math.log2(cost)) for i, cost in costs.items()}
        for i, low in sorted(classes.items(), key=lambda item: item[1]):
            groups[f'Backbones of {low:.3g} to {2 * low:.3g} G MACs'].append(i)
        lists = {
            'Differences': [f'{words} {_listed(texts)}.' for words, texts in others.items()],
            'Families and costs': [
                f'{group}: {names[i]}, {self.metric.cell(i)} (the best of {1 + len(others)}).'
                for group, (i, *others) in groups.items()
            ],
        }
        return {title: sentences for title, sentences in lists.items() if sentences}

    @cached_property
    def curves(self) -> list[Plot]:
        """Plots of the loss and of the first metric over the iterations."""
        metric = self.results['metrics'][0]
        losses = [row['losses'] for row in self.rows]
        metrics = [[(v['iter'], v.get(metric)) for v in row['validations']] for row in self.rows]
        plots = []
        for title, axis, series in (
            ('Training loss', 'loss', losses),
            (f'{metric} on the validation data', metric, metrics),
        ):
            items = [
                self._item(i, points)
                for i, values in enumerate(series)
                if (points := _thinned(values))
            ]
            if items:
                plots.append(
                    Plot(title, svg(plot_curves(items, y_title=axis), title, items), items)
                )
        return plots

    @cached_property
    def pictures(self) -> list[tuple[int | None, str, list[str | None]]]:
        """Row, name and pictures (data URLs) of the truth and of each backbone that has some."""
        rows = [(i, self.rows[i]['backbone'], self.rows[i]['pictures']) for i in self.ranked]
        rows = [row for row in rows if row[2]]
        rows = [(None, 'truth', self.results['truth']), *rows] if rows else []
        return [
            (i, name, [_data_url(self.folder / file) for file in files]) for i, name, files in rows
        ]

    @property
    def groups(self) -> list[tuple[str, int]]:
        """The headings over neighbouring columns, and the number of these."""
        groups = itertools.groupby(column.group for column in self.columns)
        return [(group, len([*members])) for group, members in groups]

    @property
    def published(self) -> list[list[str]]:
        """Names and cells of published figures. No column has them, so nothing compares them."""
        return [
            [f'{row["name"]} (published)']
            + [column.text(row['metrics'].get(column.full_title)) for column in self.columns]
            for row in self.results['published']
        ]

    @property
    def markdown_table(self) -> Markup:
        lines = []
        for i in self.ranked:
            name, status = self.rows[i]['backbone'], self.statuses[i]
            cells = (column.cell(i) for column in self.columns)
            lines.append([_plain(f'{name} ({status})' if status else name), *cells])
        lines += [[_plain(name), *cells] for name, *cells in self.published]
        titles = (f'{PREFIXES.get(c.group, "")}{c.full_title}' for c in self.columns)
        align = ('left', *('right' for _ in self.columns))
        headers = ['backbone', *map(_plain, titles)]
        return Markup(tabulate(lines, headers, 'pipe', colalign=align, disable_numparse=True))

    def write_csv(self, file: Path) -> None:
        """Write a line for each backbone; units are in the names of the columns."""
        columns = [*self.all_columns]
        columns += filter(None, [column.spread for column in columns])
        words = ('backbone', 'family', 'status', 'error', 'source')
        with file.open('w', encoding='utf-8', newline='') as output:
            writer = csv.writer(output, lineterminator='\n')
            writer.writerow([*words, *(column.name for column in columns)])
            for i, row in enumerate(self.rows):
                values = (column.values[i] for column in columns)
                figures = ('' if value is None else f'{value:.6g}' for value in values)
                writer.writerow([*(row.get(word) or '' for word in words), *figures])
            for row in self.results['published']:
                figures = (row['metrics'].get(column.full_title, '') for column in columns)
                writer.writerow([row['name'], '', 'published', '', row['source'], *figures])


def _finite(value: float | None, unit: float = 1) -> float | None:
    return value / unit if value is not None and math.isfinite(value) else None


def _slug(text: str) -> str:
    return '_'.join(re.findall(r'[^\W_]+', text.lower().replace('%', 'percent')))


def _count(number: int, noun: str) -> str:
    return f'{number} {noun}' if number == 1 else f'{number} {noun}s'


def _listed(names: Iterable[str]) -> str:
    *names, last = names
    return f'{", ".join(names)} and {last}' if names else last


def _status(row: Mapping[str, Any]) -> str:
    if row['status'] == 'failed':
        return f'failed: {row["error"]}'
    done = f'not trained here: {row["source"]}' if row['source'] else ''
    return row.get('error') or (done if row['status'] == 'done' else row['status'])


def _plain(text: str) -> Markup:
    """Return a text without anything that Markdown takes for markup."""
    text = html.escape(' '.join(text.split()), quote=False)
    return Markup(text.replace('|', '\\|').replace('`', "'"))


def _latex(text: str) -> str:
    """Return a text without anything that LaTeX takes for a command."""
    return re.sub('|'.join(map(re.escape, LATEX)), lambda match: LATEX[match[0]], text)


def _breakable(name: str) -> Markup:
    """Return a name that a narrow column breaks between its words."""
    return Markup(re.sub('([_:./])', r'\1<wbr>', str(escape(name))))


def _thinned(curve: Sequence[Sequence[float]]) -> list[tuple[float, float]]:
    """Return (iteration, value) of finite values, averaged over neighbours where they are many."""
    known = [(x, y) for x, y in curve if _finite(y) is not None]
    size = math.ceil(len(known) / CURVE_POINTS) or 1
    parts = [known[i : i + size] for i in range(0, len(known), size)]
    return [(part[-1][0], sum(y for _, y in part) / len(part)) for part in parts]


def _data_url(file: Path) -> str | None:
    """Return a JPEG picture as a data URL, scaled down if it is large; None if it is missing."""
    image = cv2.imread(str(file))
    if image is None:
        return None
    data, scale = file.read_bytes(), min(1, PICTURE_SIDE / max(image.shape[:2]))
    if scale < 1 or len(data) > PICTURE_BYTES:
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        data = cv2.imencode('.jpg', image, [cv2.IMWRITE_JPEG_QUALITY, 82])[1].tobytes()
    return f'data:image/jpeg;base64,{base64.b64encode(data).decode()}'
