"""The table of a sweep in LaTeX, for the package booktabs."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmdense.benchmark.report import Column

SPECIAL = {
    '\\': r'\textbackslash{}',
    '~': r'\textasciitilde{}',
    '^': r'\textasciicircum{}',
    **{character: f'\\{character}' for character in '&%$#_{}'},
}
SYMBOLS = {'±': r'$\pm$', '–': '--', '→': r'$\to$'}


def escape(text: str) -> str:
    """Return a text without anything that LaTeX takes for a command."""
    table = SPECIAL | SYMBOLS
    return re.sub('|'.join(map(re.escape, table)), lambda match: table[match[0]], text)


def latex_table(
    names: Sequence[str],
    columns: Sequence[Column],
    rows: Sequence[int],
    published: Sequence[Sequence[str]] = (),
) -> str:
    """Return a tabular: a line for each row in this order, the best value of a column bold.

    ``rows`` are their numbers, ``names`` those of all; groups are headings over several columns.
    ``published`` are names and cells of lines below a rule.
    """
    heads, rules, place = [''], [], 2
    for group, members in itertools.groupby(columns, lambda column: column.group):
        count = len([*members])
        heads.append(rf'\multicolumn{{{count}}}{{c}}{{{escape(group)}}}')
        rules.append(rf'\cmidrule(lr){{{place}-{place + count - 1}}}')
        place += count
    titles = ['Backbone', *(escape(column.full_title) for column in columns)]
    lines = []
    for i in rows:
        cells = [escape(names[i])]
        for column in columns:
            text = escape(column.cell(i))
            best = column.best is not None and column.values[i] == column.best
            cells.append(rf'\textbf{{{text}}}' if best else text)
        lines.append(cells)
    lines += [[escape(cell) for cell in cells] for cells in published]
    body = [' & '.join(cells) + r' \\' for cells in (heads, titles, *lines)]
    if published:
        body.insert(-len(published), r'\midrule')
    head = [r'% \usepackage{booktabs}', rf'\begin{{tabular}}{{l{"r" * len(columns)}}}', r'\toprule']
    head += [body[0], ' '.join(rules), body[1], r'\midrule']
    return '\n'.join([*head, *body[2:], r'\bottomrule', r'\end{tabular}', ''])
