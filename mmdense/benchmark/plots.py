"""Plots of a sweep: accuracy against cost with the Pareto front, and training curves.

Figures are drawn in the light colours. Their SVG refers to the colours as CSS variables, so that a
page shows it in the reader's light or dark scheme. A pixel is a point of matplotlib's.
"""

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from io import StringIO
from pathlib import Path

import matplotlib
import numpy as np
import yaml
from adjustText import adjust_text
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.markers import MarkerStyle
from matplotlib.patches import PathPatch
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator

WIDTH, HEIGHT = 560, 340
LEFT, BOTTOM, TOP = 48, 44, 30  # room for tick labels and titles
LOG_FROM = 8  # costs that span more than this factor get a logarithmic axis
LOOK = yaml.safe_load(Path(__file__).with_name('plots.yml').read_text(encoding='utf-8'))
COLOURS, FAMILIES, STYLE = LOOK['colours'], LOOK['families'], LOOK['style']
PALETTE = COLOURS | {f'family{i}': pair for i, pair in enumerate(FAMILIES)}
PAPER, SOFT, TINT, LINK = (COLOURS[name][0] for name in ('paper', 'soft', 'tint', 'link'))
MARKERS = 'os^Dvh'
DASHES = ('-', (0, (5, 2)), (0, (1.5, 1.5)), (0, (7, 2, 2, 2)), (0, (3, 3)))


@dataclass(frozen=True)
class Item:
    """A backbone in a plot."""

    row: int  # in the results; the page highlights everything with the same number
    name: str
    family: int  # its number, which selects colour and marker
    points: Sequence[tuple[float, float]]  # (x, y) of a curve, or of a single marker
    tooltip: str
    deviation: float = 0.0  # of y, drawn as whiskers


def pareto_front(points: Sequence[Sequence[float]]) -> list[int]:
    """Return the indices of the points (cost, quality) that no other point dominates.

    They come by rising cost. Of equal points the first one is returned.
    """
    front: list[int] = []
    for i in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if not front or points[i][1] > points[front[-1]][1]:
            front.append(i)
    return front


@matplotlib.rc_context(STYLE)
def plot_scatter(items: Sequence[Item], *, x_title: str, y_title: str) -> Figure:
    """Plot accuracy against cost: markers filled and names bold on the Pareto front."""
    axes = _axes(f'← {x_title}, lower is better', f'↑ {y_title}, higher is better')
    points = np.array([item.points[0] for item in items])
    front = pareto_front(points)
    labels = []
    for i, item in enumerate(items):
        best, (x, y), gid = i in front, points[i], f'row-{item.row}'
        look = _look(item.family, filled=best) | dict(ls='', ms=10 if best else 8, gid=gid)
        axes.plot(x, y, **look, zorder=5 if best else 4)
        if reach := items[i].deviation:
            axes.vlines(x, y - reach, y + reach, color=look['color'], lw=1.4, gid=gid, zorder=3)
        weight = 'bold' if best else 'normal'
        labels.append(axes.text(x, y, _short(item.name), weight=weight, zorder=3, gid=gid))
    _scale(axes, points)
    right, bottom = axes.get_xlim()[1], axes.get_ylim()[0]
    xs, ys = [*points[front, 0], right], [*points[front, 1], points[front[-1], 1]]
    axes.fill_between(xs, ys, bottom, step='post', color=TINT, lw=0, zorder=0.4)
    path = np.stack(([xs[0], *np.repeat(xs, 2)[1:]], [bottom, *np.repeat(ys, 2)[:-1]]), 1)
    axes.plot(*path.T, color=SOFT, lw=1.4)
    _place(axes, labels, points, path)
    return axes.figure


@matplotlib.rc_context(STYLE)
def plot_curves(items: Iterable[Item], *, y_title: str) -> Figure:
    """Plot curves over iterations; the legend lists them by their last values."""
    items = sorted(items, key=lambda item: -item.points[-1][1])
    height = max(HEIGHT, 18 * len(items) + BOTTOM + TOP)
    legend_width = 7 * max(len(_short(item.name)) for item in items) + 50
    axes = _axes('iteration', y_title, height=height, right=legend_width)
    members: dict[int, int] = {}
    handles = []
    for item in items:
        number = members[item.family] = members.get(item.family, -1) + 1
        look = _look(item.family) | dict(lw=1.6, ls=DASHES[number % len(DASHES)], ms=6)
        gid = f'row-{item.row}'
        axes.plot(*np.transpose(item.points), **look, markevery=[-1], gid=gid, zorder=3)
        handles.append(Line2D([], [], **look, label=_short(item.name)))
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(5))
    place = dict(loc='center left', bbox_to_anchor=(1, 0.5))
    legend = axes.legend(handles=handles, **place, handlelength=2.6)
    for item, *parts in zip(items, legend.get_lines(), legend.get_texts(), strict=True):
        for part in parts:
            part.set_gid(f'row-{item.row}')
    return axes.figure


def _axes(x_title: str, y_title: str, *, height: float = HEIGHT, right: float = 12) -> Axes:
    """Return the axes of a new figure, with some room to their right."""
    figure = Figure(figsize=(WIDTH / 72, height / 72), dpi=72)
    FigureCanvasAgg(figure)  # adjustText measures texts with it
    size = ((WIDTH - LEFT - right) / WIDTH, (height - TOP - BOTTOM) / height)
    axes = figure.add_axes((LEFT / WIDTH, BOTTOM / height, *size))
    axes.set_xlabel(x_title, loc='right')
    axes.spines[['left', 'top', 'right']].set_visible(False)
    axes.tick_params(length=0, colors=SOFT)
    axes.yaxis.set_major_locator(MaxNLocator(6))
    figure.text(4 / WIDTH, 1 - 14 / height, y_title, size=12)
    return axes


def _scale(axes: Axes, points: np.ndarray) -> None:
    """Choose the limits, with room around the points but none below zero, and a log scale."""
    low, high = points[:, 0].min(), points[:, 0].max()
    axes.margins(0.08)
    if low > 0 and high / low > LOG_FROM:
        axes.set_xscale('log')
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter('{x:g}')
        axes.xaxis.set_minor_locator(NullLocator())
    else:
        axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.set_xlim(max(axes.get_xlim()[0], 0), axes.get_xlim()[1])
    axes.set_ylim(max(axes.get_ylim()[0], 0), axes.get_ylim()[1])


def _look(family: int, *, filled: bool = False) -> dict[str, str]:
    colour = FAMILIES[family % len(FAMILIES)][0]
    marker = MARKERS[(family + family // len(FAMILIES)) % len(MARKERS)]
    return dict(color=colour, marker=marker, mec=colour, mfc=colour if filled else PAPER)


def _short(name: str) -> str:
    return name if len(name) <= 26 else f'{name[:15]}…{name[-10:]}'


def _place(axes: Axes, labels: list[Text], points: np.ndarray, path: np.ndarray) -> None:
    """Put labels beside their markers, then move them off each other, the markers and the path."""
    to_pixels, renderer = axes.transData, axes.figure.canvas.get_renderer()
    markers, corners = to_pixels.transform(points), to_pixels.transform(path)
    for label, (x, y) in zip(labels, markers, strict=True):
        shift = 10 + label.get_window_extent(renderer).width / 2
        x += shift if x + 2 * shift < axes.bbox.x1 else -shift
        label.set(position=to_pixels.inverted().transform((x, y)), ha='center', va='center')
    around = [(x, y) for x in (-8, 0, 8) for y in (-8, 0, 8)]
    obstacles = [
        np.linspace(a, b, 2 + int(np.abs(b - a).max() / 16)) for a, b in itertools.pairwise(corners)
    ]
    obstacles.append((markers[:, None] + around).reshape(-1, 2))
    adjust_text(
        labels,
        *to_pixels.inverted().transform(np.concatenate(obstacles)).T,
        target_x=points[:, 0],
        target_y=points[:, 1],
        ax=axes,
        avoid_self=False,
        prevent_crossings=False,  # takes most of the time
        expand=(1.05, 1.1),
        force_text=(0.3, 0.5),
        force_static=(0.2, 0.4),
        force_explode=(0, 0),
        iter_lim=100,
        min_arrow_len=12,
        arrowprops=dict(arrowstyle='-', color=LINK, lw=0.8),
    )


def svg(figure: Figure, label: str = '', items: Iterable[Item] = ()) -> Markup:
    """Return a figure as an inline SVG element.

    Args:
        figure: Artists with the gid ``row-N`` get the attribute ``data-row="N"``.
        label: The accessible name. Without one it is a swatch, hidden from screen readers.
        items: Have the tooltips.
    """
    text = StringIO()
    empty = dict.fromkeys(('Creator', 'Date', 'Format', 'Type'))
    # The salt makes ids reproducible, and different in the figures of a page.
    with matplotlib.rc_context(STYLE | {'svg.hashsalt': f'mmdense {label}'}):
        figure.savefig(text, format='svg', transparent=True, metadata=empty)
    head = (
        f'role="img" aria-label="{escape(label)}"' if label else 'aria-hidden="true" class="swatch"'
    )
    titles = {f'{item.row}': f'<title>{escape(item.tooltip)}</title>' for item in items}
    names = {light: f'var(--{name})' for name, (light, _) in PALETTE.items()}
    content = text.getvalue()
    for pattern, new in (
        # matplotlib's first defs hold a style for all elements of the page.
        (r'^.*?<svg [^>]*?(viewBox="[^"]*").*?</defs>', lambda m: f'<svg {head} {m[1]}>'),
        (r'<g id="row-(\d+)">', lambda m: f'<g data-row="{m[1]}">{titles.get(m[1], "")}'),
        (r' id="[\w.]+_\d+"', ''),  # not unique in a page
        ('#[0-9a-f]{6}', lambda m: names.get(m[0], m[0])),
        (r'\s*\n\s*', ' '),
    ):
        content = re.sub(pattern, new, content, flags=re.DOTALL)
    return Markup(content)


def swatch(family: int) -> Markup:
    """Return a family's marker as an SVG element of 16 x 16 pixels."""
    look = _look(family, filled=True)
    figure = Figure(figsize=(16 / 72, 16 / 72), dpi=72)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(-8, 8), ylim=(-8, 8))
    axes.axis('off')
    marker = MarkerStyle(look['marker'])
    path = marker.get_path().transformed(marker.get_transform().scale(11))
    axes.add_patch(PathPatch(path, color=look['color'], clip_on=False))
    return svg(figure)


@matplotlib.rc_context(STYLE)
def write_png(figure: Figure, file: Path, families: Mapping[str, int]) -> None:
    """Write a scatter plot as a PNG file, with a legend of the families below it."""
    for text in figure.axes[0].texts:
        text.set_path_effects([withStroke(linewidth=2, foreground=PAPER)])
    handles = [
        Line2D([], [], ls='', ms=9, label=name, **_look(family, filled=True))
        for name, family in families.items()
    ]
    spacing = dict(handletextpad=0.1, columnspacing=1)
    place = dict(loc='upper left', bbox_to_anchor=(0, 0.01))
    figure.legend(handles=handles, ncols=6, **place, **spacing)
    figure.savefig(file, dpi=115, bbox_inches='tight')
