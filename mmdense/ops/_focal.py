"""Focal loss, by element.

``target`` [N] holds class indices. For the sigmoid form the background is any index without a
column, by convention the number of classes; the softmax form skips negative ones. ``weight`` [C],
empty for none, is indexed by the target: there the background, which has no entry, weighs 1
(mmcv's kernels read past the end).


The sigmoid form takes log(1 - p) from the logit: 1 - p rounds to 0 in float32 from logits of 17 on,
where mmcv's kernels jump to their clamp, a loss of 87 in place of 17.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdense.ops._common import widen

TINY = torch.finfo(torch.float32).tiny  # what mmcv clamps to before a logarithm, in every dtype


@torch.no_grad()
def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Write the loss [N, C] of the logits ``input`` [N, C]."""
    prob, rest, log_prob, log_rest, positive, scale = _sigmoid_terms(input, target, weight)
    hit = alpha * rest**gamma * log_prob
    miss = (1 - alpha) * prob**gamma * log_rest
    output.copy_(-torch.where(positive, hit, miss) * scale)


@torch.no_grad()
def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Write the derivative [N, C] of each loss by its logit."""
    prob, rest, log_prob, log_rest, positive, scale = _sigmoid_terms(input, target, weight)
    hit = alpha * rest**gamma * (rest - gamma * prob * log_prob)
    miss = (1 - alpha) * prob**gamma * (gamma * rest * log_rest - prob)
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
    # It vanishes towards certainty, where a power below 0 would give infinity times zero.
    slope = torch.where(rest > 0, gamma * rest ** (gamma - 1) * prob * _log(prob), 0)
    shared = alpha * (slope - rest**gamma) * scale
    buff.copy_(shared)
    classes = torch.arange(input.size(1), device=input.device)
    (input,) = widen(input)
    grad_input.copy_(shared[:, None] * ((classes == target[:, None]).to(input) - input))


def _sigmoid_terms(input: Tensor, target: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
    input, weight = widen(input, weight)
    classes = torch.arange(input.size(1), device=input.device)
    logs = (F.logsigmoid(x).clamp(min=math.log(TINY)) for x in (input, -input))
    scale = _weigh(weight, target, input)[:, None]
    return input.sigmoid(), (-input).sigmoid(), *logs, classes == target[:, None], scale


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
