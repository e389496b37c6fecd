"""Elementwise focal losses.

``target`` [N] are class indices. In the sigmoid form, any index without a column is background, by
convention the number of classes. The softmax form skips negative indices. ``weight`` [C], or empty,
is indexed by the target; background has weight 1 (mmcv's kernels read past the end).

The sigmoid form computes log(1 - p) from the logit. In float32, 1 - p rounds to 0 for logits above
17, where mmcv's kernels jump to their clamp: a loss of 87 instead of 17.
"""

import math

import torch
from torch import Tensor

from mmdense.ops._common import widen

TINY = torch.finfo(torch.float32).tiny  # mmcv's lower bound of logarithms, in every dtype


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Write the loss [N, C] of the logits ``input`` [N, C]."""
    wrong, index, positive = _signed(input, target)
    miss = wrong.sigmoid()  # 1 - p of the target
    loss = miss.pow_(gamma).mul_(_softplus_(wrong))
    _scale(loss, index, positive, (alpha, 1 - alpha), _weigh(*widen(weight), target))
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
    _scale(slope, index, positive, (-alpha, 1 - alpha), _weigh(*widen(weight), target))
    grad_input.copy_(slope)


def softmax_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Write the loss [N] of the probabilities ``input`` [N, C]."""
    prob, scale = _softmax_terms(input, target, weight)
    output.copy_(-alpha * (1 - prob) ** gamma * _log(prob) * scale)


def softmax_focal_loss_backward(
    input: Tensor,
    target: Tensor,
    weight: Tensor,
    buff: Tensor,
    grad_input: Tensor,
    gamma: float,
    alpha: float,
) -> None:
    """Write the derivative [N, C] of each loss by the logits behind ``input``.

    ``buff`` [N] receives p dL/dp for the target's probability p. By the softmax, the derivative by
    logit c is that times (1 if c is the target else 0) - input[c].
    """
    prob, scale = _softmax_terms(input, target, weight)
    rest = 1 - prob
    # The limit at p = 1 is 0, where a negative power would give infinity times zero.
    slope = torch.where(rest > 0, gamma * rest ** (gamma - 1) * prob * _log(prob), 0)
    shared = alpha * (slope - rest**gamma) * scale
    buff.copy_(shared)
    classes = torch.arange(input.size(1), device=input.device)
    (input,) = widen(input)
    grad_input.copy_(shared[:, None] * ((classes == target[:, None]).to(input) - input))


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
    """Return -log(1 - sigmoid(logit)) in place, at most -log(TINY)."""
    return torch._C._nn.softplus(logit, 1, 40, out=logit).clamp_(max=-math.log(TINY))


def _scale(
    values: Tensor,
    index: Tensor,
    positive: Tensor,
    factors: tuple[float, float],
    weight: Tensor | None,
) -> None:
    """Multiply values [N, C] in place: targets by the first factor, the rest by the second."""
    if values.size(1):
        hit = values.gather(1, index)
        values.mul_(factors[1])
        values.scatter_(1, index, torch.where(positive, factors[0] * hit, factors[1] * hit))
    if weight is not None:
        values.mul_(weight[:, None])


def _softmax_terms(input: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    input, weight = widen(input, weight)
    prob = input.gather(1, target.clamp(min=0)[:, None])[:, 0]
    scale, known = _weigh(weight, target), target >= 0
    return prob, known.to(prob) if scale is None else scale * known


def _weigh(weight: Tensor, target: Tensor) -> Tensor | None:
    """Return the weight [N] of each row's target, or None without weights."""
    if not weight.numel():
        return None
    known = (target >= 0) & (target < len(weight))
    return torch.where(known, weight[target.where(known, 0)], 1)


def _log(prob: Tensor) -> Tensor:
    return prob.clamp(min=TINY).log()
