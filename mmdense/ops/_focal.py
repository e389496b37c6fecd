"""Sigmoid focal loss, element by element.

``target`` [N] are class indices; any index without a column is background, by convention the number
of classes. ``weight`` [C], or empty, is indexed by the target; background has weight 1 (mmcv's
kernels read past the end).

log(1 - p) is computed from the logit. In float32, 1 - p rounds to 0 for logits above 17, where
mmcv's kernels jump to their clamp: a loss of 87 instead of 17.
"""

import math

import torch
from torch import Tensor

from mmdense.ops._common import widen

# mmcv's bound: the logarithm of float32's smallest number, in every dtype.
LARGEST = -math.log(torch.finfo(torch.float32).tiny)


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Write the loss [N, C] of the logits ``input`` [N, C]."""
    wrong, index, positive = _signed(input, target)
    miss = wrong.sigmoid()  # 1 - p of the target
    loss = miss.pow_(gamma).mul_(_softplus_(wrong))
    _scale(loss, index, positive, (alpha, 1 - alpha), weight)
    output.copy_(loss)


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Write the derivative [N, C] of each loss by its logit.

    With m the logit of the wrong answer, q its probability and s its softplus, the loss is q^g s,
    and its derivative by m is q^g (q + g (1 - q) s).
    """
    wrong, index, positive = _signed(input, target)
    miss = wrong.sigmoid()
    slope = torch.addcmul(miss, 1 - miss, _softplus_(wrong), value=gamma)
    slope.mul_(miss.pow_(gamma))
    _scale(slope, index, positive, (-alpha, 1 - alpha), weight)
    grad_input.copy_(slope)


def _signed(input: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return logits [N, C] of the wrong answer, each row's target column, and whether it has one.

    These are the logits with the sign of the target's flipped. Only [N] values are touched: masks
    of [N, C] would cost more than everything else.
    """
    (wrong,) = widen(input)
    wrong = wrong.clone() if wrong is input else wrong
    positive = ((target >= 0) & (target < input.size(1)))[:, None]
    index = target[:, None].where(positive, 0)
    if input.size(1):
        logit = wrong.gather(1, index)
        wrong.scatter_(1, index, torch.where(positive, -logit, logit))
    return wrong, index, positive


def _softplus_(logit: Tensor) -> Tensor:
    """Return -log(1 - sigmoid(logit)) in place, at most LARGEST."""
    return torch._C._nn.softplus(logit, 1, 40, out=logit).clamp_(max=LARGEST)


def _scale(
    values: Tensor,
    index: Tensor,
    positive: Tensor,
    factors: tuple[float, float],
    weight: Tensor,
) -> None:
    """Multiply values [N, C] in place: targets by the first factor, the rest by the second."""
    if values.size(1):
        hit = values.gather(1, index)
        values.mul_(factors[1])
        values.scatter_(1, index, torch.where(positive, factors[0] * hit, factors[1] * hit))
    if weight.numel():
        values.mul_(*widen(weight[index].where(positive, 1)))
