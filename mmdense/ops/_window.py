"""Operators on a window around each pixel: CARAFE, masked convolution, PSANet's masks."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdense.ops._common import widen

# CARAFE: each output pixel is the sum of the window around its input pixel, weighted by the output
# pixel's mask [N, G * K * K, S * H, S * W]. G: channel groups with a mask each; S: scale factor.


def carafe_forward(
    features: Tensor,
    masks: Tensor,
    rfeatures: Tensor,
    routput: Tensor,
    rmasks: Tensor,
    output: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Write ``output`` [N, C, S * H, S * W], and for the backward the features to ``rfeatures``."""
    rfeatures.copy_(features)
    wide, masks = widen(features, masks)
    total = wide.new_zeros(_split(output, group_size, scale_factor).shape)
    for window, mask in _taps(wide, masks, kernel_size, group_size, scale_factor):
        total.addcmul_(window, mask)
    output.copy_(total.reshape(output.shape))


def carafe_backward(
    top_grad: Tensor,
    rfeatures: Tensor,
    masks: Tensor,
    rtop_grad: Tensor,
    rbottom_grad_hs: Tensor,
    rbottom_grad: Tensor,
    rmask_grad: Tensor,
    bottom_grad: Tensor,
    mask_grad: Tensor,
    kernel_size: int,
    group_size: int,
    scale_factor: int,
) -> None:
    """Write the gradients of features and masks."""
    grad, wide, wide_masks = widen(top_grad, rfeatures, masks)
    grad = _split(grad, group_size, scale_factor)
    pad = kernel_size // 2
    padded = F.pad(torch.zeros_like(wide), [pad] * 4)
    height, width = rfeatures.shape[2:]
    mask_parts = []
    taps = _taps(wide, wide_masks, kernel_size, group_size, scale_factor)
    for tap, (window, mask) in enumerate(taps):
        y, x = divmod(tap, kernel_size)
        part = (grad * mask).sum((4, 6)).flatten(1, 2)
        padded[:, :, y : y + height, x : x + width] += part
        mask_parts.append((grad * window).sum(2))
    bottom_grad.copy_(padded[:, :, pad : pad + height, pad : pad + width])
    mask_grad.copy_(torch.stack(mask_parts, 2).reshape(masks.shape))


def _split(map_: Tensor, groups: int, scale: int) -> Tensor:
    """Return [N, G * c, S * H, S * W] as [N, G, c, H, S, W, S]."""
    parts = map_.unflatten(3, (-1, scale)).unflatten(2, (-1, scale))
    return parts.unflatten(1, (groups, -1))


def _taps(
    features: Tensor, masks: Tensor, kernel_size: int, groups: int, scale: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield features [N, G, c, H, 1, W, 1] and their masks for each position in the window.

    All positions together would take K * K copies of the features.
    """
    height, width = features.shape[2:]
    padded = F.pad(features, [kernel_size // 2] * 4)
    masks = _split(masks, groups, scale)
    for tap in range(kernel_size**2):
        y, x = divmod(tap, kernel_size)
        window = padded[:, :, y : y + height, x : x + width].unflatten(1, (groups, -1))
        yield window[:, :, :, :, None, :, None], masks[:, :, tap, None]


def masked_im2col_forward(
    im: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    col: Tensor,
    kernel_h: int,
    kernel_w: int,
    pad_h: int,
    pad_w: int,
) -> None:
    """Write to ``col`` [C * kernel_h * kernel_w, I] the windows of ``im`` [1, C, H, W] at I pixels.

    mmcv counts the pixels in the output of a convolution with stride 1.
    """
    # With padding other than kernel // 2, a window may exceed it; it reads zero there too.
    padded = F.pad(im[0], (pad_w, kernel_w, pad_h, kernel_h))
    rows = mask_h_idx + torch.arange(kernel_h, device=im.device)[:, None]
    columns = mask_w_idx + torch.arange(kernel_w, device=im.device)[:, None]
    col.copy_(padded[:, rows[:, None], columns[None]].reshape(col.shape))


def masked_col2im_forward(
    col: Tensor,
    mask_h_idx: Tensor,
    mask_w_idx: Tensor,
    im: Tensor,
    height: int,
    width: int,
    channels: int,
) -> None:
    """Write the columns of ``col`` [C, I] to I pixels of ``im`` [1, C, H, W]."""
    im[0][:, mask_h_idx, mask_w_idx] = col.to(im)


# PSANet: channel (i, j) of a mask [N, h_mask * w_mask, H, W] belongs, at pixel (y, x), to the pixel
# (y + i - half_h, x + j - half_w). COLLECT lists these pixels in the channels, [N, H * W, H, W];
# DISTRIBUTE has them in the plane and the pixel (y, x) in the channels.
COLLECT = 0


def psamask_forward(input: Tensor, output: Tensor, psa_type: int, **sizes: int) -> None:
    """Write ``output`` [N, H * W, H, W], which is zero outside the mask."""
    index, inside = _places(input.device, **sizes)
    full = (input.gather(1, index) * inside).flatten(2)
    output.copy_((full if psa_type == COLLECT else full.transpose(1, 2)).reshape(output.shape))


def psamask_backward(grad_output: Tensor, grad_input: Tensor, psa_type: int, **sizes: int) -> None:
    """Write the gradient [N, h_mask * w_mask, H, W]; each value has at most one output."""
    index, inside = _places(grad_output.device, **sizes)
    grad = grad_output.flatten(2)
    grad = (grad if psa_type == COLLECT else grad.transpose(1, 2)).reshape(grad_output.shape)
    grad_input.zero_().scatter_add_(1, index, grad.where(inside, 0))


def _places(
    device: torch.device,
    num_: int,
    h_feature: int,
    w_feature: int,
    h_mask: int,
    w_mask: int,
    half_h_mask: int,
    half_w_mask: int,
) -> tuple[Tensor, Tensor]:
    """Return the channel of the mask for each target pixel, [N, H * W, H, W], and its validity."""
    limits, axes, valid = (h_mask, w_mask), [], []
    for size, limit, half in zip(
        (h_feature, w_feature), limits, (half_h_mask, half_w_mask), strict=True
    ):
        pixels = torch.arange(size, device=device)
        place = pixels[:, None] - pixels + half  # of the target, in the mask
        axes.append(place.clamp(0, limit - 1))
        valid.append((place >= 0) & (place < limit))
    (y, x), (y_in, x_in) = axes, valid
    index = y[:, None, :, None] * w_mask + x[:, None]
    inside = y_in[:, None, :, None] & x_in[:, None]
    return index.flatten(0, 1).expand(num_, -1, -1, -1), inside.flatten(0, 1)
