import pytest
import torch
import torch.nn.functional as F
from mmcv.ops import SigmoidFocalLoss, sigmoid_focal_loss, softmax_focal_loss
from torch.autograd import gradcheck

TARGET = [0, 2, 3, 1, 2]  # of three classes: 3 is the background


@pytest.fixture
def logits(rng, device):
    return torch.randn(5, 3, generator=rng, device=device, dtype=torch.float64) * 2


@pytest.fixture
def target(device):
    return torch.tensor(TARGET, device=device)


def by_definition(prob, alpha, gamma):
    return -alpha * (1 - prob) ** gamma * prob.log()


def test_sigmoid_by_hand(device):
    # At logit 0 all probabilities are 1/2: log 2 / 4, times alpha or 1 - alpha.
    loss = sigmoid_focal_loss(
        torch.zeros(2, 2, device=device), torch.tensor([1, 2], device=device), 2, 0.25, None, 'none'
    )
    quarter = torch.log(torch.tensor(2.0, device=device)) / 4
    expected = quarter * torch.tensor([[0.75, 0.25], [0.75, 0.75]], device=device)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize(('gamma', 'alpha'), [(2.0, 0.25), (1.5, 0.6), (0.0, 0.5)])
def test_sigmoid_equals_its_definition(logits, target, gamma, alpha):
    logits.requires_grad_()
    hot = F.one_hot(target, 4)[:, :3].double()
    prob = logits.sigmoid()
    expected = hot * by_definition(prob, alpha, gamma)
    expected = expected + (1 - hot) * by_definition(1 - prob, 1 - alpha, gamma)
    loss = sigmoid_focal_loss(logits, target, gamma, alpha, None, 'none')
    torch.testing.assert_close(loss, expected)
    grads = [torch.autograd.grad(value.sum(), logits)[0] for value in (loss, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(('gamma', 'alpha'), [(2.0, 0.25), (1.5, 0.6), (0.0, 0.5)])
def test_softmax_equals_its_definition(logits, target, gamma, alpha):
    target = target % 3
    logits.requires_grad_()
    prob = logits.softmax(1).gather(1, target[:, None])[:, 0]
    expected = by_definition(prob, alpha, gamma)
    loss = softmax_focal_loss(logits, target, gamma, alpha, None, 'none')
    torch.testing.assert_close(loss, expected)
    # mmcv's own backward can't broadcast the gradient of single losses.
    loss = softmax_focal_loss(logits, target, gamma, alpha, None, 'sum')
    grads = [torch.autograd.grad(value.sum(), logits)[0] for value in (loss, expected)]
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize('function', [sigmoid_focal_loss, softmax_focal_loss])
@pytest.mark.parametrize('reduction', ['mean', 'sum'])
@pytest.mark.parametrize('weighted', [False, True])
def test_gradient(logits, target, function, reduction, weighted):
    weight = logits.new_tensor([0.5, 1, 3]) if weighted else None
    target = target % 3
    assert gradcheck(
        lambda x: function(x, target, 2.0, 0.25, weight, reduction), logits.requires_grad_()
    )


def test_weights_go_by_the_target(logits, target):
    weight = logits.new_tensor([0.5, 1, 3])
    rows = logits.new_tensor([0.5, 3, 1, 1, 3])  # the background, which has no weight, counts once
    plain = sigmoid_focal_loss(logits, target, 2.0, 0.25, None, 'none')
    loss = sigmoid_focal_loss(logits, target, 2.0, 0.25, weight, 'none')
    torch.testing.assert_close(loss, plain * rows[:, None])
    target = target % 3
    rows[2] = 0.5
    plain = softmax_focal_loss(logits, target, 2.0, 0.25, None, 'none')
    loss = softmax_focal_loss(logits, target, 2.0, 0.25, weight, 'none')
    torch.testing.assert_close(loss, plain * rows)


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


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_halves_are_near_float64(logits, target, dtype):
    low = logits.to(dtype).requires_grad_()
    high = low.detach().double().requires_grad_()
    results = []
    for x in (low, high):
        loss = sigmoid_focal_loss(x, target, 2.0, 0.25, None, 'none')
        results.append((loss.double(), torch.autograd.grad(loss.sum(), x)[0].double()))
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=0.02, atol=0.01)


def test_no_rows_and_the_module(device, logits, target):
    empty = logits[:0].clone().requires_grad_()
    loss = SigmoidFocalLoss(2.0, 0.25, reduction='sum')(empty, target[:0])
    loss.backward()
    assert loss == 0
    assert empty.grad.shape == (0, 3)
