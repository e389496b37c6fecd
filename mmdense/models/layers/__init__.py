"""Pieces that several families use."""

from mmdense.models.layers.recompute import recompute

__all__ = ['recompute']
