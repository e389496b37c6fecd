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
    if (matrix := _matrix(input, rois, options)) is None:
        output.copy_(torch.ops.torchvision.roi_align(input, rois, *ALIGN(options)))
    else:
        _multiply(output, input, *matrix[:3])
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
    if (matrix := _matrix(grad_input, rois, options)) is None:
        backward = torch.ops.torchvision._roi_align_backward
        grad_input.copy_(backward(grad, rois, *sizes, *grad_input.shape, samples, aligned))
    else:
        pixel, weight, _, row = matrix
        pixel, order = pixel.int().sort()
        count = pixel.bincount(minlength=grad_input[:, 0].numel())
        _multiply(grad_input, grad, row[order], weight[order], count)


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


def _matrix(maps: Tensor, rois: Tensor, options: dict[str, float]) -> list[Tensor] | None:
    """Return RoIAlign as a sparse matrix [R * P * Q, N * H * W], or None if the kernel is faster.

    Row by row: pixels and weights of its entries, their number in each row, and the rows of them.
    """
    scale, *size, _, aligned = ALIGN(options)
    bins, pixels, limits = torch.Size((len(rois), *size)), maps[:, :1].numel(), maps.shape[2:]
    # The maps are copied to channels-last. Samples of RoIs far larger than maps fill the memory.
    kernel = maps.device.type != 'cpu' or not 0 < pixels < 4 * bins.numel()
    if kernel or rois[:, 1:].abs().max() * scale > 8 * max(limits):
        return None
    # A bilinear weight is a product of one of y and one of x, and so is its mean over a bin.
    x, y = ((rois[:, [i, i + 2]] * scale - aligned / 2).T[..., None, None] for i in (1, 2))
    x, x_weight, x_runs = _axis_weights(*x, size[1], limits[1], options)
    y, y_weight, y_runs = _axis_weights(*y, size[0], limits[0], options)
    x_runs = x_runs[:, :, None].expand(2, *bins).flatten(1)
    y_runs = y_runs[..., None].expand(2, *bins).flatten(1)
    row, at = _runs(*y_runs)
    line = rois[:, 0].long().repeat_interleave(bins[1:].numel())[row] * limits[0] + y[at]
    part, x_at = _runs(*x_runs[:, row])
    weight = y_weight[at][part] * x_weight[x_at]
    return [line[part] * limits[1] + x[x_at], weight, y_runs[0] * x_runs[0], row[part]]


def _axis_weights(low: Tensor, high: Tensor, bins: int, limit: int, options: dict) -> list[Tensor]:
    """Return pixels and weights of bins along an axis, and their counts and ends [2, R, bins]."""
    size = (high - low).clamp(min=-torch.inf if options['aligned'] else 1) / bins
    samples = options['sampling_ratio']
    grid = torch.full_like(size, samples) if samples > 0 else size.ceil()
    step = torch.arange(int(grid.max()))  # and coordinates rounded as in the kernel
    at = low + torch.arange(bins)[:, None] * size + (step + 0.5) * size / grid.clamp(min=1)
    share = ((step < grid) & (at >= -1) & (at <= limit)) / grid.clamp(min=1)
    at = at.clamp(0, limit - 1)
    pixel, part = at.long(), share * at.frac()
    weight = at.new_zeros(len(at), bins, limit + 1).scatter_add_(2, pixel, share - part)
    where = weight.scatter_add_(2, pixel + 1, part).nonzero(as_tuple=True)
    count = (weight != 0).sum(2)
    return [where[2], weight[where], torch.stack((count, count.flatten().cumsum(0).view_as(count)))]


def _runs(count: Tensor, end: Tensor) -> tuple[Tensor, Tensor]:
    """Return runs of ``count`` numbers before ``end``: the run of each number, and the numbers."""
    run = torch.repeat_interleave(count)
    return run, torch.arange(len(run)) + (end - count.cumsum(0))[run]


def _multiply(out: Tensor, maps: Tensor, pixel: Tensor, weight: Tensor, count: Tensor) -> None:
    """Write a sparse matrix times the pixels of maps to ``out``, on all threads."""
    pixels, start = maps.permute(0, 2, 3, 1).flatten(0, 2), count.cumsum(0) - count
    rows = torch.embedding_bag(pixels, pixel, start, False, 0, False, weight)[0]
    out.permute(0, 2, 3, 1).copy_(rows.view(len(out), *out.shape[2:], -1))


def _bin_edges(low: Tensor, high: Tensor, bins: int, limit: int) -> tuple[Tensor, Tensor]:
    """Return the first pixel and the number of pixels [R, bins] of each bin along one axis."""
    steps = torch.arange(bins + 1, device=low.device)
    edges = steps * ((high - low) / bins)[:, None] + low[:, None]
    first = edges[:, :-1].floor().clamp(0, limit).long()
    last = edges[:, 1:].ceil().clamp(0, limit).long()
    return first, (last - first).clamp(min=0)
