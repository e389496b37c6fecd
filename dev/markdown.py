"""Markdown tables."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from tabulate import tabulate

__all__ = ['table']

NUMBER = re.compile(r'[\d.]+(e-\d+)?( \(.*\))?|\[[\d.]+\]\(.*\)')


def table(rows: Sequence[Mapping[str, str]]) -> str:
    """Return a table of rows by column title, without empty columns; numbers are right-aligned."""
    titles = [title for title in rows[0] if any(row[title] for row in rows)]
    columns = [[row[title] for row in rows] for title in titles]
    aligned = [
        'right' if all(NUMBER.fullmatch(cell) for cell in column if cell) else 'left'
        for column in columns
    ]
    cells = [[row[title] for title in titles] for row in rows]
    return tabulate(cells, titles, tablefmt='pipe', colalign=aligned, disable_numparse=True) + '\n'
