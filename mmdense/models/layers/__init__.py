"""Pieces that several families use, or that are of use by themselves."""

from mmdense.models.layers.condense import (
    CondensedGroupConv,
    CondensedReactivation,
    LearnedGroupConv,
    SparseReactivation,
    pruning_stage,
)
from mmdense.models.layers.recompute import recompute

__all__ = [
    'CondensedGroupConv',
    'CondensedReactivation',
    'LearnedGroupConv',
    'SparseReactivation',
    'pruning_stage',
    'recompute',
]
