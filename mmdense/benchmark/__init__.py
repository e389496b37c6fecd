"""Measuring what networks cost."""

from mmdense.benchmark.cost import (
    backbone_macs,
    count_macs,
    count_parameters,
    model_macs,
    not_counted,
)

__all__ = ['backbone_macs', 'count_macs', 'count_parameters', 'model_macs', 'not_counted']
