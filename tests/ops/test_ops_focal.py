"""Focal losses.

test_ops_fuzz.py compares random cases with references.
"""

import pytest
import torch
from mmcv.ops import SigmoidFocalLoss, sigmoid_focal_loss, softmax_focal_loss

TARGET = [0, 2, 3, 1, 2]  # of three classes: 3 is the background


@pytest.fixture
def logits(rng, device):
    return torch.randn(5, 3, generator=rng, device=device, dtype=torch.float64) * 2


@pytest.fixture
def target(device):
    return torch.tensor(TARGET, device=device)


def test_sigmoid_by_hand(device):
    # At logit 0 all probabilities are 1/2: log 2 / 4, times alpha or 1 - alpha.
    loss = sigmoid_focal_loss(
        torch.zeros(2, 2, device=device), torch.tensor([1, 2], device=device), 2, 0.25, None, 'none'
    )
    quarter = torch.log(torch.tensor(2.0, device=device)) / 4
    expected = quarter * torch.tensor([[0.75, 0.25], [0.75, 0.75]], device=device)
    torch.testing.assert_close(loss, expected)


def test_sigmoid_of_sure_mistakes_is_the_logit(device):
    """1 - p would be 0 in float32, and its logarithm whatever it is clamped to."""
    logits = torch.tensor([[17.0, 30, 80]], device=device)
    loss = sigmoid_focal_loss(logits, torch.tensor([3], device=device), 2.0, 0.25, None, 'none')
    torch.testing.assert_close(loss, 0.75 * logits)


@pytest.mark.parametrize('gamma', [0.0, 0.5, 1.0])
def test_softmax_of_certainty_has_a_gradient(device, gamma):
    logits = torch.tensor([[200.0, 0]], device=device, requires_grad=True)
    target = torch.tensor([0], device=device)
    softmax_focal_loss(logits, target, gamma, 0.25, None, 'sum').backward()
    assert not logits.grad.any()


def test_softmax_skips_negative_targets(logits, target):
    logits.requires_grad_()
    target = (target % 3).index_fill(0, target.new_tensor([1]), -1)
    loss = softmax_focal_loss(logits, target, 2.0, 0.25, None, 'none')
    softmax_focal_loss(logits, target, 2.0, 0.25, None, 'sum').backward()
    assert (loss == 0).tolist() == [False, True, False, False, False]
    assert logits.grad.any(1).tolist() == [True, False, True, True, True]


@pytest.mark.parametrize('function', [sigmoid_focal_loss, softmax_focal_loss])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('gamma', [2.0, 0.0])
def test_extreme_logits_stay_finite(device, function, dtype, gamma):
    logits = torch.tensor([[90.0, -90], [-90, 90]], dtype=dtype, device=device).requires_grad_()
    loss = function(logits, torch.tensor([1, 1], device=device), gamma, 0.25, None, 'sum')
    loss.backward()
    assert loss.dtype == dtype
    assert loss.isfinite()
    assert loss > 20  # alpha times the clamped logarithm, 87, at least
    assert logits.grad.isfinite().all()


def test_no_rows_and_the_module(device, logits, target):
    empty = logits[:0].clone().requires_grad_()
    loss = SigmoidFocalLoss(2.0, 0.25, reduction='sum')(empty, target[:0])
    loss.backward()
    assert loss == 0
    assert empty.grad.shape == (0, 3)
