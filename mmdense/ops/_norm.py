"""The steps of mmcv's synchronised batch norm (``MMSyncBN``), which reduces between them.

Inputs are [N, C, S] of any floating dtype, statistics [C] float32.
"""

from torch import Tensor

from mmdense.ops._common import widen


def sync_bn_forward_mean(input: Tensor, mean: Tensor) -> None:
    """Write this process's mean."""
    (wide,) = widen(input)
    mean.copy_(wide.mean((0, 2)))


def sync_bn_forward_var(input: Tensor, mean: Tensor, var: Tensor) -> None:
    """Write this process's mean squared difference from the global ``mean``."""
    (wide,) = widen(input)
    var.copy_((wide - mean[:, None]).square().mean((0, 2)))


def sync_bn_forward_output(
    input: Tensor,
    mean: Tensor,
    var: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    norm: Tensor,
    std: Tensor,
    output: Tensor,
    eps: float,
    momentum: float | Tensor,
    group_size: int,
) -> None:
    """Write ``norm``, ``std`` and ``output``, and update the running statistics."""
    (wide,) = widen(input)
    std.copy_((var + eps).sqrt())
    norm.copy_((wide - mean[:, None]) / std[:, None])
    output.copy_(norm if weight is None else norm * weight[:, None] + bias[:, None])
    if running_mean is not None:
        count = input.size(0) * input.size(2) * group_size
        unbiased = var * count / (count - 1) if count > 1 else var
        running_mean.copy_(momentum * mean + (1 - momentum) * running_mean)
        running_var.copy_(momentum * unbiased + (1 - momentum) * running_var)


def sync_bn_backward_param(
    grad_output: Tensor, norm: Tensor, grad_weight: Tensor, grad_bias: Tensor
) -> None:
    """Write this process's gradients of weight and bias."""
    (grad,) = widen(grad_output)
    grad_weight.copy_((grad * norm).sum((0, 2)))
    grad_bias.copy_(grad.sum((0, 2)))


def sync_bn_backward_data(
    grad_output: Tensor,
    weight: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    norm: Tensor,
    std: Tensor,
    grad_input: Tensor,
) -> None:
    """Write the gradient of the input, from the global gradients of weight and bias."""
    (grad,) = widen(grad_output)
    count = grad.size(0) * grad.size(2)
    through = (norm * grad_weight[:, None] + grad_bias[:, None]) / count
    grad_input.copy_((grad - through) * (weight / std)[:, None])
