"""The demo dataset: real handwritten digits on real photographs, made without a download."""

from mmdense.datasets.digits import (
    CLASSES,
    PALETTE,
    SEG_CLASSES,
    SEG_PALETTE,
    DigitsData,
    make_digits,
)

__all__ = ['CLASSES', 'PALETTE', 'SEG_CLASSES', 'SEG_PALETTE', 'DigitsData', 'make_digits']
