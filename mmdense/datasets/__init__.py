"""The demo dataset: real handwritten digits on real photographs, made without a download."""

from mmdense.datasets.digits import DigitsData, make_digits

__all__ = ['DigitsData', 'make_digits']
