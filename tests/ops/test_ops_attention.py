"""Multi-scale deformable attention against mmcv's version in plain torch.

test_ops_fuzz.py compares random cases with references.
"""

import pytest
import torch
from mmcv.ops.multi_scale_deform_attn import (
    MultiScaleDeformableAttnFunction,
    multi_scale_deformable_attn_pytorch,
)

SHAPES = (4, 5), (2, 3)


def attend(value, shapes, locations, weights):
    starts = torch.cat((shapes.new_zeros(1), shapes.prod(1).cumsum(0)[:-1]))
    apply = MultiScaleDeformableAttnFunction.apply
    return apply(value, shapes, starts, locations, weights, 64)


@pytest.fixture
def inputs(rng, device):
    """Two images, two heads of three channels, five queries, two levels, four points."""
    shapes = torch.tensor(SHAPES, device=device)
    options = dict(generator=rng, device=device, dtype=torch.float64)
    value = torch.randn(2, 26, 2, 3, **options)
    locations = torch.rand(2, 5, 2, 2, 4, 2, **options) * 1.4 - 0.2  # some off the maps
    weights = torch.rand(2, 5, 2, 2, 4, **options)
    return value, shapes, locations, weights


def test_equals_mmcv_in_plain_torch(inputs):
    value, shapes, locations, weights = inputs
    leaves = [t.requires_grad_() for t in (value, locations, weights)]
    out = attend(value, shapes, locations, weights)
    expected = multi_scale_deformable_attn_pytorch(value, shapes.tolist(), locations, weights)
    torch.testing.assert_close(out, expected)
    grad = torch.randn_like(out)
    grads = [torch.autograd.grad(o, leaves, grad) for o in (out, expected)]
    for one, other in zip(*grads, strict=True):
        assert one.any()
        torch.testing.assert_close(one, other)
