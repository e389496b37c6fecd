"""Focal losses.

test_ops_fuzz.py compares random cases with references.
"""

import pytest
import torch
from mmcv.ops import sigmoid_focal_loss


def test_sigmoid_of_sure_mistakes_is_the_logit(device):
    """1 - p would be 0 in float32, and its logarithm whatever it is clamped to."""
    logits = torch.tensor([[17.0, 30, 80]], device=device)
    loss = sigmoid_focal_loss(logits, torch.tensor([3], device=device), 2.0, 0.25, None, 'none')
    torch.testing.assert_close(loss, 0.75 * logits)


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('gamma', [2.0, 0.0])
def test_extreme_logits_stay_finite(device, dtype, gamma):
    logits = torch.tensor([[90.0, -90], [-90, 90]], dtype=dtype, device=device).requires_grad_()
    target = torch.tensor([1, 1], device=device)
    loss = sigmoid_focal_loss(logits, target, gamma, 0.25, None, 'sum')
    loss.backward()
    assert loss.dtype == dtype
    assert loss.isfinite()
    assert loss > 20  # alpha times the clamped logarithm, 87, at least
    assert logits.grad.isfinite().all()
