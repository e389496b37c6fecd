"""Weights of other projects: one pure map of keys per foreign format.

A map takes a state dict and returns one with our keys and the same tensors; what it doesn't know
it refuses.
"""

from mmdense.weights.condensenetv2 import from_condensenetv2
from mmdense.weights.rexunet import from_rexunet_fork

__all__ = ['from_condensenetv2', 'from_rexunet_fork']
