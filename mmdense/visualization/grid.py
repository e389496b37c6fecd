"""Several images on one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

__all__ = ['save_grid']

SIDE = 4.5  # inches of a cell, of 100 pixels each


def save_grid(
    images: Sequence[np.ndarray], file: str | Path, *, titles: Sequence[str], columns: int
) -> None:
    """Save images as one PNG file, row by row.

    Args:
        images: uint8 [H, W, 3] in RGB, of any sizes.
        file: The file to write.
        titles: Titles of the images, repeated from the first one on.
        columns: Number of images per row.
    """
    rows = -(-len(images) // columns)
    figure = Figure(figsize=(SIDE * columns, SIDE * rows), layout='constrained', dpi=100)
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for i, axis in enumerate(axes):
        axis.axis('off')
        if i < len(images):
            axis.imshow(images[i])
            axis.set_title(titles[i % len(titles)])
    figure.savefig(file)
