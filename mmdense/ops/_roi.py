"""Pooling of regions of interest (RoIs).

R: RoIs, rows of (image index, x1, y1, x2, y2); C: channels; H, W: size of the feature maps;
P, Q: size of the outputs [R, C, P, Q]. Pairs are (y, x) unless said otherwise.

A RoI that is not finite, such as a diverging network's, gives NaN and no gradient: torchvision's
kernel would read arbitrary memory. A RoI of an image that is not in the
batch raises an IndexError on a CPU and a device-side assertion on a GPU. Average pooling never
waits for the GPU.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdense.ops._common import widen

MAX = 0  # pool_mode of RoIAlign; 1 is average
OUTSIDE = -3e4  # a coordinate outside every feature map, which float16 can represent
CHUNK = 2**24  # samples of max pooling at once: 64 MiB


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Write ``output`` [R, C, P, Q]; max pooling also writes where each maximum was sampled.

    A bin without samples (``aligned`` and ``sampling_ratio=0`` with an empty RoI) gives zero in
    both modes. mmcv's max pooling gives its smallest number.
    """
    input, rois = widen(input, rois)
    rois, bad = _usable(rois, len(input))
    size = aligned_height, aligned_width
    roi_align = torch.ops.torchvision.roi_align
    if pool_mode != MAX:
        output.copy_(roi_align(input, rois, spatial_scale, *size, sampling_ratio, aligned))
        output.masked_fill_(bad[:, None, None, None], torch.nan)
        return
    corner, side = _frames(rois, spatial_scale, aligned)
    grids = (side / side.new_tensor(size)).ceil().long().clamp(min=0)
    if sampling_ratio > 0:
        grids.fill_(sampling_ratio)
    output.zero_()
    argmax_y.fill_(-1)
    argmax_x.fill_(-1)
    # With one sample a cell, average pooling on a grid g times as fine returns the samples.
    kinds, kind = grids.unique(dim=0, return_inverse=True)
    for k, (grid_y, grid_x) in enumerate(kinds.tolist()):
        fine = aligned_height * grid_y, aligned_width * grid_x
        if not (fine[0] and fine[1]):
            continue
        step = max(1, CHUNK // max(1, input.size(1) * fine[0] * fine[1]))
        for rows in (kind == k).nonzero()[:, 0].split(step):
            samples = roi_align(input, rois[rows], spatial_scale, *fine, 1, aligned)
            bins = samples.unflatten(3, (-1, grid_x)).unflatten(2, (-1, grid_y))
            best = bins.transpose(3, 4).flatten(4).max(-1)
            output[rows] = best.values.to(output)
            for out, axis, index, grid in (
                (argmax_y, 0, best.indices // grid_x, grid_y),
                (argmax_x, 1, best.indices % grid_x, grid_x),
            ):
                place = torch.arange(size[axis], device=index.device) * grid
                place = place[:, None] if axis == 0 else place
                at = (place + index + 0.5).to(side) / fine[axis]
                origin, length = (v[rows, axis, None, None, None] for v in (corner, side))
                out[rows] = (origin + at * length).to(out)
    output.masked_fill_(bad[:, None, None, None], torch.nan)
    argmax_y.masked_fill_(bad[:, None, None, None], -1)


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Write the gradient of the feature maps to ``grad_input`` [N, C, H, W]."""
    grad, rois, y, x = widen(grad_output, rois, argmax_y, argmax_x)
    rois, _ = _usable(rois, len(grad_input))
    if pool_mode != MAX:
        size = aligned_height, aligned_width
        grad_input.copy_(
            torch.ops.torchvision._roi_align_backward(
                grad, rois, spatial_scale, *size, *grad_input.shape, sampling_ratio, aligned
            )
        )
        return
    height, width = grad_input.shape[-2:]
    # -1 marks bins without samples. Samples more than a pixel outside read zero.
    used = (y != -1) & (y >= -1) & (y <= height) & (x >= -1) & (x <= width)
    grad = grad * used
    y, x = y.clamp(0, height - 1), x.clamp(0, width - 1)
    total = grad.new_zeros(grad_input.numel())
    base = _planes(rois, grad_input)
    for row, row_share in _neighbours(y, height):
        for column, column_share in _neighbours(x, width):
            index = base + row * width + column
            total.scatter_add_(0, index.flatten(), (grad * row_share * column_share).flatten())
    grad_input.copy_(total.view_as(grad_input))


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
    total = grad.new_zeros(grad_input.numel())
    index = _planes(rois, grad_input) + argmax.clamp(min=0)
    total.scatter_add_(0, index.flatten(), (grad * (argmax >= 0)).flatten())
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


def _frames(rois: Tensor, spatial_scale: float, aligned: bool) -> tuple[Tensor, Tensor]:
    """Return first corners and sides [R, 2] on the feature map, as (y, x)."""
    boxes = rois[:, 1:] * spatial_scale - (0.5 if aligned else 0.0)
    corner, side = boxes[:, :2].flip(1), (boxes[:, 2:] - boxes[:, :2]).flip(1)
    return corner, side if aligned else side.clamp(min=1)


def _bin_edges(low: Tensor, high: Tensor, bins: int, limit: int) -> tuple[Tensor, Tensor]:
    """Return the first pixel and the number of pixels [R, bins] of each bin along one axis."""
    steps = torch.arange(bins + 1, device=low.device)
    edges = steps * ((high - low) / bins)[:, None] + low[:, None]
    first = edges[:, :-1].floor().clamp(0, limit).long()
    last = edges[:, 1:].ceil().clamp(0, limit).long()
    return first, (last - first).clamp(min=0)


def _planes(rois: Tensor, grad_input: Tensor) -> Tensor:
    """Return the flat index [R, C, 1, 1] of the first pixel that each RoI's channel reads."""
    channels, height, width = grad_input.shape[1:]
    channel = torch.arange(channels, device=rois.device)
    plane = rois[:, 0, None].long() * channels + channel
    return plane[:, :, None, None] * (height * width)


def _neighbours(at: Tensor, size: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the pixels on either side of ``at`` (inside the feature map) with their weights."""
    low = at.long()
    share = at - low
    return (low, 1 - share), ((low + 1).clamp(max=size - 1), share)
