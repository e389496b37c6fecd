"""Layers that several families share."""
# ruff: noqa: F401

from mmdense.models.layers.condense import (
    CondensedGroupConv,
    CondensedReactivation,
    LearnedGroupConv,
    SparseReactivation,
    pruning_stage,
)
from mmdense.models.layers.lean import lean_conv, plain_conv
from mmdense.models.layers.recompute import recompute
