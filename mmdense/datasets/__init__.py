"""The demo dataset: real handwritten digits on real photographs, made without a download."""

from mmdense.datasets.digits import (
    CLASSES,
    FOREGROUND_CLASSES,
    FOREGROUND_PALETTE,
    PALETTE,
    SEG_CLASSES,
    SEG_PALETTE,
    DigitsData,
    make_digits,
)

__all__ = [
    'CLASSES',
    'FOREGROUND_CLASSES',
    'FOREGROUND_PALETTE',
    'PALETTE',
    'SEG_CLASSES',
    'SEG_PALETTE',
    'DigitsData',
    'make_digits',
]
