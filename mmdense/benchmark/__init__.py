"""Measuring what networks cost."""

from mmdense.benchmark.cost import (
    Cost,
    backbone_macs,
    count_cost,
    count_parameters,
    model_costs,
    model_macs,
    not_counted,
)

__all__ = [
    'Cost',
    'backbone_macs',
    'count_cost',
    'count_parameters',
    'model_costs',
    'model_macs',
    'not_counted',
]
