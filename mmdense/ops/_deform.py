"""Deformable convolution, versions 1 and 2, by torchvision's kernels.

Both libraries order offsets as (y, x) pairs a kernel position, deformable groups outermost.
``im2col_step`` and the buffers ``columns`` and ``ones`` only matter to the compiled kernels.

Samples follow mmcv's rule: one that lies a pixel or more outside the image, or is not finite, reads
zero and passes no gradient on. torchvision's kernel has a one-sided derivative at exactly -1, where
the first row and column of every zero-initialized layer sample, and crashes on NaN.
"""

from operator import itemgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdense.ops._common import widen

# torchvision's arguments, from those that mmcv passes by name to version 1 and 2.
GEOMETRY1 = itemgetter(
    *('dH', 'dW', 'padH', 'padW', 'dilationH', 'dilationW', 'group', 'deformable_group')
)
GEOMETRY2 = itemgetter(
    *('stride_h', 'stride_w', 'pad_h', 'pad_w', 'dilation_h', 'dilation_w'),
    *('group', 'deformable_group'),
)


def deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    output: Tensor,
    columns: Tensor,
    ones: Tensor,
    **geometry: int,
) -> None:
    """Write ``output``."""
    output.copy_(_forward(input, weight, offset, None, None, GEOMETRY1(geometry)))


def deform_conv_backward_input(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradInput: Tensor,
    gradOffset: Tensor,
    weight: Tensor,
    columns: Tensor,
    **geometry: int,
) -> None:
    """Write the gradients of the input and of the offsets."""
    grads = _backward(gradOutput, input, weight, offset, None, None, GEOMETRY1(geometry))
    gradInput.copy_(grads[0])
    gradOffset.copy_(grads[2])
    # torchvision computes all gradients at once and mmcv asks for the weight's in its next call,
    # with the same buffer: leave it there, with the gradient that it belongs to.
    columns.mmdense_pending = gradOutput, grads[1]


def deform_conv_backward_parameters(
    input: Tensor,
    offset: Tensor,
    gradOutput: Tensor,
    gradWeight: Tensor,
    columns: Tensor,
    ones: Tensor,
    scale: float,
    **geometry: int,
) -> None:
    """Add ``scale`` times the gradient of the weight to ``gradWeight``."""
    owner, grad_weight = vars(columns).pop('mmdense_pending', (None, None))
    if owner is not gradOutput:
        weight = torch.zeros_like(gradWeight)
        grads = _backward(gradOutput, input, weight, offset, None, None, GEOMETRY1(geometry))
        grad_weight = grads[1]
    gradWeight.add_(grad_weight.to(gradWeight), alpha=scale)


def modulated_deform_conv_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    output: Tensor,
    columns: Tensor,
    with_bias: bool,
    **geometry: int,
) -> None:
    """Write ``output``; ``bias`` counts only ``with_bias``."""
    offset, mask = (_reread(field, output) for field in (offset, mask))
    bias = bias if with_bias else None
    output.copy_(_forward(input, weight, offset, mask, bias, GEOMETRY2(geometry)))


def modulated_deform_conv_backward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    ones: Tensor,
    offset: Tensor,
    mask: Tensor,
    columns: Tensor,
    grad_input: Tensor,
    grad_weight: Tensor,
    grad_bias: Tensor,
    grad_offset: Tensor,
    grad_mask: Tensor,
    grad_output: Tensor,
    with_bias: bool,
    **geometry: int,
) -> None:
    """Write all gradients; that of the bias only ``with_bias``."""
    outs = grad_input, grad_weight, grad_offset, grad_mask, grad_bias
    offset, mask = (_reread(field, grad_output) for field in (offset, mask))
    grads = _backward(grad_output, input, weight, offset, mask, None, GEOMETRY2(geometry))
    for out, grad in zip(outs if with_bias else outs[:4], grads, strict=False):
        unread = out.numel() - grad.numel()
        if unread:
            grad = F.pad(grad.flatten(1), (0, unread // len(out))).reshape(out.shape)
        out.copy_(grad)


def _reread(field: Tensor, output: Tensor) -> Tensor:
    """Return offsets or masks in the size of the output, as mmcv's kernels read them.

    mmcv's version 2 doesn't look at their height and width: it takes the values of an image one
    after the other and leaves the rest. DyHead relies on that for its coarsest levels.
    """
    channels, size = field.size(1), output.shape[2:]
    if field.shape[2:] == size or field[0].numel() < channels * size.numel():
        return field
    return field.flatten(1)[:, : channels * size.numel()].unflatten(1, (channels, *size))


def _arguments(
    input: Tensor,
    weight: Tensor,
    offset: Tensor,
    mask: Tensor | None,
    bias: Tensor | None,
    geometry: tuple[int, ...],
) -> tuple:
    """Return the arguments that torchvision's forward and backward share."""
    used = mask is not None
    mask = offset.new_zeros(len(offset), 1) if mask is None else mask
    bias = weight.new_zeros(len(weight)) if bias is None else bias
    tensors = widen(input, weight, _readable(input, weight, offset, geometry), mask, bias)
    return *tensors, *geometry, used


def _forward(*inputs: Any) -> Tensor:
    return torch.ops.torchvision.deform_conv2d(*_arguments(*inputs))


def _backward(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    """Return the gradients of input, weight, offset, mask and bias."""
    arguments = *widen(grad), *_arguments(*inputs)
    return torch.ops.torchvision._deform_conv2d_backward(*arguments)


def _readable(input: Tensor, weight: Tensor, offset: Tensor, geometry: tuple[int, ...]) -> Tensor:
    """Return offsets that move every sample without a value to (-2, -2), clear of the image."""
    (offset,) = widen(offset)
    stride_y, stride_x, pad_y, pad_x, dilation_y, dilation_x, *_ = geometry
    kernel_y, kernel_x = weight.shape[2:]
    rows, columns = (torch.arange(side, device=offset.device) for side in offset.shape[2:])
    taps_y, taps_x = (torch.arange(side, device=offset.device) for side in (kernel_y, kernel_x))
    # Positions that offsets are added to: [kernel_y, 1, rows, 1] and [kernel_x, 1, columns].
    y = (taps_y * dilation_y)[:, None, None, None] + (rows * stride_y - pad_y)[:, None]
    x = (taps_x * dilation_x)[:, None, None] + (columns * stride_x - pad_x)
    pairs = offset.unflatten(1, (-1, kernel_y, kernel_x, 2))
    dy, dx = pairs.unbind(4)
    height, width = input.shape[2:]
    inside = (y + dy > -1) & (y + dy < height) & (x + dx > -1) & (x + dx < width)
    # Integers, since torch.onnx cannot export -2.0 - y of them.
    pairs = torch.stack((dy.where(inside, -2 - y), dx.where(inside, -2 - x)), 4)
    return pairs.flatten(1, 4)
