"""Layers that several families share."""

from mmdense.models.layers.condense import (
    CondensedGroupConv,
    CondensedReactivation,
    LearnedGroupConv,
    SparseReactivation,
    pruning_stage,
)
from mmdense.models.layers.lean import lean_conv, plain_conv
from mmdense.models.layers.recompute import recompute

__all__ = [
    'CondensedGroupConv',
    'CondensedReactivation',
    'LearnedGroupConv',
    'SparseReactivation',
    'lean_conv',
    'plain_conv',
    'pruning_stage',
    'recompute',
]
