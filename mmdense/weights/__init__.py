"""Weights of other projects: one pure map of keys per foreign format.

A map takes a state dict and returns one with our keys and the same tensors; what it doesn't know
it refuses.
"""

from mmdense.weights.rexunet import from_rexunet_fork

__all__ = ['from_rexunet_fork']
