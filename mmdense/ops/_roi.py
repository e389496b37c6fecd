"""Pooling of regions of interest (RoIs).

R: RoIs, rows of (image index, x1, y1, x2, y2); C: channels; H, W: size of the feature maps;
P, Q: size of the outputs [R, C, P, Q].

A RoI that is not finite, such as a diverging network's, gives NaN and no gradient: torchvision's
kernel would read arbitrary memory. A RoI of an image that is not in the batch raises an IndexError
on a CPU and a device-side assertion on a GPU. RoIAlign never waits for the GPU.
"""

from operator import itemgetter

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdense.ops._common import not_provided, widen

# torchvision's arguments, from those that mmcv passes by name to RoIAlign.
ALIGN = itemgetter('spatial_scale', 'aligned_height', 'aligned_width', 'sampling_ratio', 'aligned')
AVERAGE = 1  # pool_mode of RoIAlign; 0 is max
OUTSIDE = -3e4  # a coordinate outside every feature map, which float16 can represent


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    **options: float,
) -> None:
    """Write ``output`` [R, C, P, Q]."""
    if options['pool_mode'] != AVERAGE:
        raise not_provided("roi_align with pool_mode='max'")
    input, rois = widen(input, rois)
    rois, bad = _usable(rois, len(input))
    output.copy_(torch.ops.torchvision.roi_align(input, rois, *ALIGN(options)))
    output.masked_fill_(bad[:, None, None, None], torch.nan)


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    **options: float,
) -> None:
    """Write the gradient of the feature maps to ``grad_input`` [N, C, H, W]."""
    grad, rois = widen(grad_output, rois)
    rois, _ = _usable(rois, len(grad_input))
    *sizes, samples, aligned = ALIGN(options)
    sizes += grad_input.shape
    grad_input.copy_(
        torch.ops.torchvision._roi_align_backward(grad, rois, *sizes, samples, aligned)
    )


def roi_pool_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Write the maxima to ``output`` [R, C, P, Q] and their y * W + x, or -1, to ``argmax``.

    mmcv's RoI ends a pixel after (x2, y2), scales without rounding and rounds its bins outwards;
    torchvision's rounds the RoI first, so its kernel doesn't serve.
    """
    channels, height, width = input.shape[1:]
    (rois,) = widen(rois)
    rois, bad = _usable(rois, len(input))
    low, high = rois[:, 1:3] * spatial_scale, (rois[:, 3:] + 1) * spatial_scale
    x, x_count = _bin_edges(low[:, 0], high[:, 0], pooled_width, width)
    y, y_count = _bin_edges(low[:, 1], high[:, 1], pooled_height, height)
    valid = (high > low).all(1)[:, None]
    y_count = y_count * valid
    first = rois[:, 0, None].long() * height + y
    first = (first[:, :, None] * width + x[:, None]).flatten()
    place = (y[:, :, None] * width + x[:, None]).flatten()
    counts = torch.broadcast_tensors(y_count[:, :, None], x_count[:, None])
    rows, columns = (c.flatten() for c in counts)

    pixels = input.permute(0, 2, 3, 1).flatten(0, 2)
    best = pixels.new_full((first.numel(), channels), -torch.inf)
    where = argmax.new_full(best.shape, -1)
    # Bins differ in size: each round takes one pixel from all bins that have it.
    reach = [int(c.max()) if c.numel() else 0 for c in (rows, columns)]
    for dy in range(reach[0]):
        for dx in range(reach[1]):
            bins = ((rows > dy) & (columns > dx)).nonzero()[:, 0]
            shift = dy * width + dx
            values = pixels[first[bins] + shift]
            better = values > best[bins]
            best[bins] = torch.where(better, values, best[bins])
            there = (place[bins, None] + shift).to(where)
            where[bins] = torch.where(better, there, where[bins])
    best = best.masked_fill(where < 0, 0)
    shape = rois.size(0), pooled_height, pooled_width, channels
    output.copy_(best.view(shape).permute(0, 3, 1, 2))
    argmax.copy_(where.view(shape).permute(0, 3, 1, 2))
    output.masked_fill_(bad[:, None, None, None], torch.nan)
    argmax.masked_fill_(bad[:, None, None, None], -1)


def roi_pool_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax: Tensor,
    grad_input: Tensor,
    pooled_height: int,
    pooled_width: int,
    spatial_scale: float,
) -> None:
    """Write the gradient of the feature maps to ``grad_input`` [N, C, H, W]."""
    (grad,) = widen(grad_output)
    rois, _ = _usable(rois, len(grad_input))
    image = rois[:, 0].long()[:, None, None, None]
    channel = torch.arange(grad_input.size(1), device=rois.device)[:, None, None]
    place = image, channel, argmax.clamp(min=0).long()
    total = torch.zeros_like(grad_input, dtype=grad.dtype).flatten(2)
    total.index_put_(place, grad * (argmax >= 0), accumulate=True)
    grad_input.copy_(total.view_as(grad_input))


def _usable(rois: Tensor, images: int) -> tuple[Tensor, Tensor]:
    """Return RoIs that the kernels can take, and a mask [R] of those that were not finite.

    The latter are moved off every feature map, where they read and send back nothing.
    """
    bad = ~rois.isfinite().all(1)
    inside = bad | ((rois[:, 0] >= 0) & (rois[:, 0] < images))
    if rois.is_cuda:
        torch._assert_async(inside.all(), 'a RoI belongs to an image that is not in the batch')
    elif not inside.all():
        index = rois[~inside, 0][0].item()
        raise IndexError(f'a RoI of image {index:g}, where there are {images} images')
    outside = F.pad(rois.new_full((1, 4), OUTSIDE), (1, 0))
    return rois.where(~bad[:, None], outside), bad


def _bin_edges(low: Tensor, high: Tensor, bins: int, limit: int) -> tuple[Tensor, Tensor]:
    """Return the first pixel and the number of pixels [R, bins] of each bin along one axis."""
    steps = torch.arange(bins + 1, device=low.device)
    edges = steps * ((high - low) / bins)[:, None] + low[:, None]
    first = edges[:, :-1].floor().clamp(0, limit).long()
    last = edges[:, 1:].ceil().clamp(0, limit).long()
    return first, (last - first).clamp(min=0)
