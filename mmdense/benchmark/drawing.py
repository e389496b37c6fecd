"""Drawings as lists of marks in pixels, written as SVG for a page, and as PNG.

In SVG colours follow the reader's light or dark; the style sheet of the page holds ``style``.
"""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Polygon
from matplotlib.patheffects import withStroke
from matplotlib.textpath import text_to_path

__all__ = [
    'Box',
    'Dot',
    'Drawing',
    'Line',
    'Point',
    'Scale',
    'Text',
    'add_axes',
    'add_labels',
    'add_legend',
    'place_labels',
    'spread',
    'style',
    'svg',
    'text_width',
    'write_png',
]

LOG_FROM = 8  # a wider span than this factor gets a logarithmic axis
LEADER_FROM = 14  # pixels from a point to its label

# Light and dark. Families have colours that stay apart for the colour-blind, and shapes.
COLOURS = dict(
    paper=('#ffffff', '#14171b'),
    ink=('#1b2026', '#e7eaee'),
    soft=('#5a6370', '#9ca6b3'),
    rule=('#e3e6ea', '#2c333b'),
    tint=('#f0f4f9', '#1c242d'),
    bad=('#b3261e', '#ff9a90'),
    link=('#8a929c', '#76808c'),
)
FAMILIES = (
    ('#0a5cc0', '#4c8df0'),
    ('#d0640c', '#ee6a45'),
    ('#0a9478', '#3be09a'),
    ('#9a3486', '#c765a8'),
    ('#664808', '#f0c93a'),
    ('#50545a', '#ccd2d7'),
)
SHAPES = ((20, 0, 1.0), (4, 45, 1.25), (3, -90, 1.3), (4, 0, 1.3), (3, 90, 1.3), (6, 0, 1.1))
LINES = dict(  # colour, width in pixels
    grid=('rule', 1), axis=('link', 1), frontier=('soft', 1.4), leader=('link', 0.8)
)
TEXTS = dict(  # colour, size in pixels, weight
    tick=('soft', 11, 'normal'),
    title=('ink', 12, 'normal'),
    label=('ink', 11, 'normal'),
    front=('ink', 11, 'bold'),
)


class Point(NamedTuple):
    x: float
    y: float


class Box(NamedTuple):
    left: float
    top: float
    right: float
    bottom: float

    def hits(self, other: Box) -> bool:
        return (
            self.left < other.right
            and other.left < self.right
            and self.top < other.bottom
            and other.top < self.bottom
        )

    def within(self, other: Box) -> bool:
        return (
            other.left <= self.left
            and self.right <= other.right
            and other.top <= self.top
            and self.bottom <= other.bottom
        )

    def nearest(self, at: Point) -> Point:
        """Return the point of the box that is nearest to another."""
        return Point(min(max(at.x, self.left), self.right), min(max(at.y, self.top), self.bottom))

    def crossed(self, a: Point, b: Point) -> bool:
        """Return whether the line from a to b passes through (Liang and Barsky's clipping)."""
        first, last = 0.0, 1.0
        for start, way, low, high in (
            (a.x, b.x - a.x, self.left, self.right),
            (a.y, b.y - a.y, self.top, self.bottom),
        ):
            way = way or 1e-9  # straight across, or straight up
            near, far = sorted(((low - start) / way, (high - start) / way))
            first, last = max(first, near), min(last, far)
        return first < last


@dataclass(frozen=True)
class Line:
    """A line: a kind of ``LINES``, or in a family's look. ``closed`` fills it with a tint."""

    points: tuple[Point, ...]
    kind: str = ''
    look: int = 0
    dash: tuple[int, ...] = ()
    closed: bool = False
    row: int | None = None
    title: str = ''


@dataclass(frozen=True)
class Dot:
    """A marker of a family; ``full`` is filled and larger."""

    at: Point
    look: int
    full: bool = True
    row: int | None = None
    title: str = ''

    @property
    def radius(self) -> float:
        return 5.5 if self.full else 4.2

    @property
    def box(self) -> Box:
        reach = 1.3 * self.radius + 1
        x, y = self.at
        return Box(x - reach, y - reach, x + reach, y + reach)

    def corners(self) -> list[Point]:
        count, turn, size = SHAPES[(self.look + self.look // len(FAMILIES)) % len(SHAPES)]
        angles = [math.radians(turn + 360 * i / count) for i in range(count)]
        reach = size * self.radius
        return [
            Point(self.at.x + reach * math.cos(a), self.at.y + reach * math.sin(a)) for a in angles
        ]


@dataclass(frozen=True)
class Text:
    """A text of a kind of ``TEXTS``; ``at`` is on its base line."""

    at: Point
    text: str
    kind: str = 'label'
    anchor: str = 'start'
    row: int | None = None


@dataclass
class Drawing:
    """Marks in pixels from the upper left corner, later ones over earlier ones."""

    width: float
    height: float
    title: str
    marks: list[Line | Dot | Text] = field(default_factory=list)


@dataclass(frozen=True)
class Scale:
    """From values to pixels, linear or logarithmic."""

    low: float
    high: float
    log: bool
    start: float
    end: float

    @classmethod
    def over(cls, values: Iterable[float], start: float, end: float) -> Scale:
        """Return the scale over values from 0 on, with some room at both ends."""
        values = list(values)
        low, high = min(values), max(values)
        if low > 0 and high / low > LOG_FROM:
            room = (high / low) ** 0.07
            return cls(low / room, high * room, True, start, end)
        room = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
        return cls(max(low - room, 0.0), high + room, False, start, end)

    def __call__(self, value: float) -> float:
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return self.start + share * (self.end - self.start)

    def ticks(self) -> dict[float, str]:
        """Return round values, and how they are written."""
        digits = None
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            values = [step * 10.0**decade for decade in decades for step in (1, 2, 5)]
        else:
            rough = (self.high - self.low) / 5
            unit = 10.0 ** math.floor(math.log10(rough))
            step = next(unit * m for m in (1, 2, 5, 10) if unit * m >= 0.7 * rough)
            first = math.ceil(self.low / step)
            values = [step * i for i in range(first, math.floor(self.high / step) + 1)]
            digits = max(0, -math.floor(math.log10(step)))
        return {
            value: f'{value:.6g}' if digits is None else f'{value:.{digits}f}'
            for value in values
            if self.low <= value <= self.high
        }


@cache
def text_width(text: str, kind: str) -> float:
    """Return a text's width in pixels, in a typeface that is wider than most that browsers take."""
    font = FontProperties(family='DejaVu Sans', size=TEXTS[kind][1], weight=TEXTS[kind][2])
    return text_to_path.get_text_width_height_descent(text, font, False)[0]


def place_labels(
    points: Sequence[Point],
    sizes: Sequence[tuple[float, float]],
    *,
    room: Box,
    taken: Sequence[Box],
    lines: Sequence[tuple[Point, Point]] = (),
) -> list[Box | None]:
    """Place labels near their points, none over another or over what is taken.

    Greedy, in the order of the points: each label takes the place of least cost among many around
    its point. Being far costs, and so does covering a line or a leader, or a leader that does.

    Args:
        points: What the labels belong to, in pixels.
        sizes: Widths and heights of the labels.
        room: Where they must be.
        taken: What they must not cover: the points' markers.
        lines: What they should rather not cover.

    Returns:
        The labels' boxes; None of one that finds no place.
    """
    found: list[Box | None] = []
    placed: list[Box] = []
    leaders: list[tuple[Point, Point]] = []
    for at, size in zip(points, sizes, strict=True):
        least, best = math.inf, None
        for far, box in _places(at, size, room):
            if far >= least:
                break  # they come by rising distance, and distance is the least that they cost
            if not box.within(room) or any(box.hits(other) for other in (*taken, *placed)):
                continue
            end = box.nearest(at)
            cost = far + 30 * sum(box.crossed(*line) for line in lines)
            cost += 60 * sum(box.crossed(*leader) for leader in leaders)
            if far > LEADER_FROM:
                cost += 60 * sum(other.crossed(at, end) for other in placed)
                cost += 25 * (sum(other.crossed(at, end) for other in taken) - 1)
            if cost < least:
                least, best = cost, box
        found.append(best)
        if best is not None:
            placed.append(best)
            if math.dist(at, best.nearest(at)) > LEADER_FROM:
                leaders.append((at, best.nearest(at)))
    return found


def _places(at: Point, size: tuple[float, float], room: Box) -> Iterator[tuple[float, Box]]:
    """Yield distances in pixels with boxes, nearest first: around the point, then anywhere."""
    wide, high = size
    around, anywhere = [], []
    for ring in (8, 12, 18, 26, 36, 48, 62, 80, 100, 125):
        for i in range(16):
            way = Point(math.cos(i * math.pi / 8), -math.sin(i * math.pi / 8))
            x, y = at.x + way.x * (ring + wide / 2), at.y + way.y * (ring + high / 2)
            # Left of a point there are fewer others: what is good and cheap is rare.
            far = ring + 3 - 2 * abs(way.x) + way.x / 2 + way.y / 4
            around.append((far, Box(x - wide / 2, y - high / 2, x + wide / 2, y + high / 2)))
    yield from sorted(around)
    for row in range(int((room.bottom - room.top) / (high / 2))):
        for step in range(int((room.right - room.left) / 12)):
            left, top = room.left + 12 * step, room.top + row * high / 2
            box = Box(left, top, left + wide, top + high)
            anywhere.append((150 + math.dist(at, box.nearest(at)), box))
    yield from sorted(anywhere)


def add_labels(
    drawing: Drawing, dots: Sequence[Dot], names: Sequence[str], *, room: Box, path: Sequence[Point]
) -> None:
    """Write names beside dots, off a path if possible: bold beside the full ones.

    Args:
        drawing: Gets the names and leaders to those that are far; not the dots.
        dots: The first ones get the best places.
        names: Of the dots.
        room: Where the names must be.
        path: A line through points.
    """
    kinds = ['front' if dot.full else 'label' for dot in dots]
    boxes = place_labels(
        [dot.at for dot in dots],
        [(text_width(name, kind) + 4, 14) for name, kind in zip(names, kinds, strict=True)],
        room=room,
        taken=[dot.box for dot in dots],
        lines=list(zip(path, path[1:], strict=False)),
    )
    for dot, name, kind, box in zip(dots, names, kinds, boxes, strict=True):
        if box is None:
            continue
        end = box.nearest(dot.at)
        if math.dist(dot.at, end) > LEADER_FROM:
            drawing.marks.append(Line((dot.at, end), 'leader', row=dot.row))
        drawing.marks.append(Text(Point(box.left + 2, box.bottom - 3), name, kind, row=dot.row))


def add_axes(drawing: Drawing, across: Scale, up: Scale, *, x_title: str, y_title: str) -> None:
    """Draw axes with grids and titles, below what is drawn later."""
    left, right, bottom, top = across.start, across.end, up.start, up.end
    edge = -math.inf
    for value, text in across.ticks().items():
        x = across(value)
        drawing.marks.append(Line((Point(x, top), Point(x, bottom)), 'grid'))
        reach = text_width(text, 'tick') / 2
        if x - reach > edge + 6:
            drawing.marks.append(Text(Point(x, bottom + 15), text, 'tick', 'middle'))
            edge = x + reach
    for value, text in up.ticks().items():
        y = up(value)
        drawing.marks.append(Line((Point(left, y), Point(right, y)), 'grid'))
        drawing.marks.append(Text(Point(left - 6, y + 4), text, 'tick', 'end'))
    drawing.marks += [
        Line((Point(left, bottom), Point(right, bottom)), 'axis'),
        Text(Point(4, 14), y_title, 'title'),
        Text(Point(right, bottom + 33), x_title, 'title', 'end'),
    ]


def add_legend(drawing: Drawing, looks: Mapping[str, int]) -> None:
    """Name looks below a drawing, which grows by that."""
    x, y = 14.0, drawing.height + 10
    for family, look in looks.items():
        wide = text_width(family, 'label') + 30
        if x + wide > drawing.width and x > 14:
            x, y = 14.0, y + 18
        drawing.marks += [Dot(Point(x, y), look), Text(Point(x + 10, y + 4), family)]
        x += wide
    drawing.height = y + 14


def spread(wanted: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Return rising positions near those wanted, which rise, at least a gap apart."""
    groups: list[list[float]] = []  # of labels side by side: the middle of those wanted, how many
    for i, y in enumerate(wanted):
        groups.append([y - i * gap, 1])
        while len(groups) > 1 and groups[-2][0] >= groups[-1][0]:
            (a, m), (b, n) = groups[-2:]
            groups[-2:] = [[(m * a + n * b) / (m + n), m + n]]
    last = high - (len(wanted) - 1) * gap
    places = [min(max(place, low), last) for place, count in groups for _ in range(count)]
    return [place + i * gap for i, place in enumerate(places)]


def style() -> str:
    """Return the rules that follow from the tables of colours, lines and texts."""
    names = ';'.join(f'--{name}:light-dark({a},{b})' for name, (a, b) in COLOURS.items())
    rules = [f':root{{{names}}}']
    rules += [f'.f{i}{{--f:light-dark({a},{b})}}' for i, (a, b) in enumerate(FAMILIES)]
    rules += [
        f'svg .{kind}{{fill:none;stroke:var(--{colour});stroke-width:{width}}}'
        for kind, (colour, width) in LINES.items()
    ]
    rules += [
        f'svg .{kind}{{fill:var(--{colour});font-size:{size}px;font-weight:{weight}}}'
        for kind, (colour, size, weight) in TEXTS.items()
    ]
    return '\n'.join(rules)


def svg(drawing: Drawing, name: str) -> str:
    """Return a drawing as an SVG element of a class."""

    def element(tag: str, mark: Line | Dot | Text, attributes: str, text: str = '') -> str:
        row = '' if mark.row is None else f' data-row="{mark.row}"'
        title = getattr(mark, 'title', '')
        inside = f'<title>{html.escape(title)}</title>' if title else html.escape(text)
        return f'<{tag}{row} {attributes}>{inside}</{tag}>'

    def path(points: Iterable[Point]) -> str:
        return ' '.join(f'{p.x:.1f},{p.y:.1f}' for p in points)

    parts = []
    for mark in drawing.marks:
        if isinstance(mark, Text):
            at = f'x="{mark.at.x:.1f}" y="{mark.at.y:.1f}" text-anchor="{mark.anchor}"'
            parts.append(element('text', mark, f'class="{mark.kind}" {at}', mark.text))
        elif isinstance(mark, Dot):
            style = f'dot {"full" if mark.full else "hollow"} f{mark.look % len(FAMILIES)}'
            points = path(mark.corners())
            parts.append(element('polygon', mark, f'class="{style}" points="{points}"'))
        else:
            style = 'area' if mark.closed else mark.kind or f'curve f{mark.look % len(FAMILIES)}'
            dash = f' stroke-dasharray="{" ".join(map(str, mark.dash))}"' if mark.dash else ''
            points = f'class="{style}"{dash} points="{path(mark.points)}"'
            parts.append(element('polyline', mark, points))
    size = f'viewBox="0 0 {drawing.width:.0f} {drawing.height:.0f}"'
    label = html.escape(drawing.title)
    return f'<svg class="{name}" {size} role="img" aria-label="{label}">{"".join(parts)}</svg>'


def write_png(drawing: Drawing, file: Path) -> None:
    """Write a drawing as a PNG file, in the light colours."""
    figure = Figure(figsize=(drawing.width / 100, drawing.height / 100), dpi=160)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, drawing.width), ylim=(drawing.height, 0))
    axes.axis('off')
    points_per_pixel = 0.72
    paper = COLOURS['paper'][0]
    for order, mark in enumerate(drawing.marks):
        if isinstance(mark, Text):
            colour, size, weight = TEXTS[mark.kind]
            axes.text(
                *mark.at,
                mark.text,
                color=COLOURS[colour][0],
                fontfamily='DejaVu Sans',
                fontsize=size * points_per_pixel,
                fontweight=weight,
                ha=dict(start='left', middle='center', end='right')[mark.anchor],
                parse_math=False,
                path_effects=[withStroke(linewidth=2, foreground=paper)],
                zorder=order,
            )
        elif isinstance(mark, Dot):
            colour = FAMILIES[mark.look % len(FAMILIES)][0]
            fill = colour if mark.full else paper
            axes.add_patch(Polygon(mark.corners(), fc=fill, ec=colour, lw=1.2, zorder=order))
        elif mark.closed:
            axes.add_patch(Polygon(mark.points, fc=COLOURS['tint'][0], zorder=order))
        else:
            colour, wide = LINES[mark.kind]
            wide *= points_per_pixel
            axes.plot(*zip(*mark.points, strict=True), c=COLOURS[colour][0], lw=wide, zorder=order)
    figure.savefig(file)
