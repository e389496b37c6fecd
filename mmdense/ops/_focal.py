"""Focal loss, by element.

``target`` [N] holds class indices. For the sigmoid form the background is any index without a
column, by convention the number of classes; the softmax form skips negative ones. ``weight`` [C],
empty for none, is indexed by the target: there the background, which has no entry, weighs 1
(mmcv's kernels read past the end).
"""

import torch
from torch import Tensor

from mmdense.ops._common import widen

TINY = torch.finfo(torch.float32).tiny  # what mmcv clamps to before a logarithm, in every dtype


@torch.no_grad()
def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Write the loss [N, C] of the logits ``input`` [N, C]."""
    prob, positive, scale = _sigmoid_terms(input, target, weight)
    hit = alpha * (1 - prob) ** gamma * _log(prob)
    miss = (1 - alpha) * prob**gamma * _log(1 - prob)
    output.copy_(-torch.where(positive, hit, miss) * scale)


@torch.no_grad()
def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Write the derivative [N, C] of each loss by its logit."""
    prob, positive, scale = _sigmoid_terms(input, target, weight)
    rest = 1 - prob
    hit = alpha * rest**gamma * (rest - gamma * prob * _log(prob))
    miss = (1 - alpha) * prob**gamma * (gamma * rest * _log(rest) - prob)
    grad_input.copy_(-torch.where(positive, hit, miss) * scale)


@torch.no_grad()
def softmax_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Write the loss [N] of the probabilities ``input`` [N, C]."""
    prob, scale = _softmax_terms(input, target, weight)
    output.copy_(-alpha * (1 - prob) ** gamma * _log(prob) * scale)


@torch.no_grad()
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

    ``buff`` [N] takes p dL/dp for the target's probability p: the softmax makes the derivative by
    logit c that times (1 if c is the target else 0) - input[c].
    """
    prob, scale = _softmax_terms(input, target, weight)
    rest = 1 - prob
    slope = gamma * rest ** (gamma - 1) * prob * _log(prob) if gamma else 0
    shared = alpha * (slope - rest**gamma) * scale
    buff.copy_(shared)
    classes = torch.arange(input.size(1), device=input.device)
    (input,) = widen(input)
    grad_input.copy_(shared[:, None] * ((classes == target[:, None]).to(input) - input))


def _sigmoid_terms(input: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    input, weight = widen(input, weight)
    classes = torch.arange(input.size(1), device=input.device)
    return input.sigmoid(), classes == target[:, None], _weigh(weight, target, input)[:, None]


def _softmax_terms(input: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    input, weight = widen(input, weight)
    prob = input.gather(1, target.clamp(min=0)[:, None])[:, 0]
    return prob, _weigh(weight, target, input) * (target >= 0)


def _weigh(weight: Tensor, target: Tensor, like: Tensor) -> Tensor:
    if not weight.numel():
        return like.new_ones(target.shape)
    known = (target >= 0) & (target < len(weight))
    return torch.where(known, weight[target.where(known, 0)], 1)


def _log(prob: Tensor) -> Tensor:
    return prob.clamp(min=TINY).log()
