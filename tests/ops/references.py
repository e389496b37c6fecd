"""Differentiable float64 reference implementations, written from the operators' definitions.

They share nothing with mmdense.ops. Where rounding decides a result (an overlap at the threshold, a
bin that ends at the edge of a pixel), they raise :class:`Ambiguous`.

Shapes as in mmdense.ops; pairs are (y, x).
"""

import math

import torch
import torch.nn.functional as F

CLOSE = 1e-4  # distance to a jump: float32's 1e-7 times sizes and sums of some tens
TINY = torch.finfo(torch.float32).tiny


class Ambiguous(Exception):
    """Rounding decides the result."""


def compare(value, bound, exact, strict=True):
    """Return ``value > bound``, or ``>=`` unless ``strict``. Only inputs on a grid are exact."""
    if not exact and abs(value - bound) < CLOSE:
        raise Ambiguous
    return value > bound if strict else value >= bound


# Boxes: lists of (x1, y1, x2, y2).


def overlap(a, b, offset=0):
    """Intersection over union. Two boxes without area don't overlap."""
    width = max(min(a[2], b[2]) - max(a[0], b[0]) + offset, 0)
    height = max(min(a[3], b[3]) - max(a[1], b[1]) + offset, 0)
    inter = width * height
    base = sum((c[2] - c[0] + offset) * (c[3] - c[1] + offset) for c in (a, b)) - inter
    if base:
        return inter / base
    return math.inf if inter else math.nan


def by_score(scores):
    return sorted(range(len(scores)), key=lambda i: -scores[i])  # sorted() keeps ties in order


def nms(boxes, scores, threshold, offset=0, *, exact=True):
    """Greedy suppression box by box: the indices of the kept boxes."""
    keep = []
    for i in by_score(scores):
        hits = [compare(overlap(boxes[j], boxes[i], offset), threshold, exact) for j in keep]
        if not any(hits):
            keep.append(i)
    return keep


def nms_match(boxes, scores, threshold, *, exact=True):
    """Groups of a kept box and the boxes it suppresses, including those at the threshold."""
    order, groups = by_score(scores), []
    while order:
        first, *rest = order
        hits = [
            compare(overlap(boxes[first], boxes[i]), threshold, exact, strict=False) for i in rest
        ]
        groups.append([first, *(i for i, hit in zip(rest, hits, strict=True) if hit)])
        order = [i for i, hit in zip(rest, hits, strict=True) if not hit]
    return groups


def soft_nms(boxes, scores, threshold, sigma, min_score, method, offset, *, exact=True):
    """Pairs of index and decayed score, as picked. The last box takes a dropped one's place."""
    left, picked = [[i, score] for i, score in enumerate(scores)], []
    while left:
        best = max(range(len(left)), key=lambda k: left[k][1])
        top = left[best][1]
        for k, (i, score) in enumerate(left):
            decayed = score != scores[i] or top != scores[left[best][0]]
            if k != best and decayed and top - score < CLOSE * top:
                raise Ambiguous
        left[0], left[best] = left[best], left[0]
        first = left.pop(0)
        picked.append(tuple(first))
        k = 0
        while k < len(left):
            iou = overlap(boxes[first[0]], boxes[left[k][0]], offset)
            iou = 0 if math.isnan(iou) else iou
            if method == 'gaussian':
                left[k][1] *= math.exp(-(iou**2) / sigma)
            elif compare(iou, threshold, exact, strict=False):
                left[k][1] *= 1 - iou if method == 'linear' else 0
            if abs(left[k][1] - min_score) < CLOSE * min_score:
                raise Ambiguous
            if left[k][1] < min_score:
                left[k] = left[-1]
                left.pop()
            else:
                k += 1
    return picked


# Regions.


def roi_align(maps, rois, size, scale, ratio, aligned):
    """Average [R, C, P, Q] of the samples in each bin, 0 without samples."""
    out = maps.new_zeros(len(rois), maps.size(1), *size)
    shift = 0.5 if aligned else 0.0
    rows = []
    for image, x1, y1, x2, y2 in rois.tolist():
        axes = []
        for low, high, bins in ((y1, y2, size[0]), (x1, x2, size[1])):
            start = low * scale - shift
            side = high * scale - shift - start
            side = side if aligned else max(side, 1.0)
            grid = ratio if ratio > 0 else max(math.ceil(side / bins), 0)
            places = torch.arange(bins, dtype=maps.dtype)[:, None]
            places = places + (torch.arange(grid, dtype=maps.dtype) + 0.5) / max(grid, 1)
            axes.append(start + side / bins * places)  # [bins, grid]
        y, x = axes
        samples = interpolate(maps[int(image)], y.flatten(), x.flatten())
        samples = samples.view(maps.size(1), *y.shape, *x.shape).transpose(2, 3).flatten(3)
        rows.append(samples.sum(3) / max(samples.size(3), 1))
    return torch.stack(rows) if rows else out


def interpolate(plane, y, x):
    """Values [C, Y, X] of a plane [C, H, W]: zero more than a pixel off, else as at its edge."""
    ends = []
    for at, size in ((y, plane.size(1)), (x, plane.size(2))):
        if ((at + 1).abs() < CLOSE).any() or ((at - size).abs() < CLOSE).any():
            raise Ambiguous
        outside = (at < -1) | (at > size)
        at = at.clamp(0, size - 1)
        low = at.long()
        ends.append((low, (low + 1).clamp(max=size - 1), at - low, outside))
    (top, bottom, dy, y_outside), (left, right, dx, x_outside) = ends
    upper, lower = plane[:, top], plane[:, bottom]
    rows = upper + (lower - upper) * dy[:, None]
    here, there = rows[:, :, left], rows[:, :, right]
    return (here + (there - here) * dx).masked_fill(y_outside[:, None] | x_outside, 0)


def roi_pool(maps, rois, size, scale):
    """mmcv's RoIPool, bin by bin: a RoI ends a pixel after (x2, y2), bins are rounded outwards."""
    out = []
    for image, x1, y1, x2, y2 in rois.tolist():
        edges = []
        for low, high, bins, limit in (
            (y1 * scale, (y2 + 1) * scale, size[0], maps.size(2)),
            (x1 * scale, (x2 + 1) * scale, size[1], maps.size(3)),
        ):
            marks = [low + (high - low) / bins * b for b in range(bins + 1)]
            if bins & (bins - 1) and any(0 < abs(m - round(m)) < CLOSE for m in marks):
                raise Ambiguous
            if bins & (bins - 1) and any(m == round(m) for m in marks[1:]):
                raise Ambiguous  # a third of a side, thrice
            pairs = zip(map(math.floor, marks[:-1]), map(math.ceil, marks[1:]), strict=True)
            edges.append([(max(a, 0), min(b, limit)) if high > low else (0, 0) for a, b in pairs])
        for top, bottom in edges[0]:
            for left, right in edges[1]:
                cut = maps[int(image), :, max(top, 0) : max(bottom, 0), left : max(right, left)]
                cut = cut.flatten(1)
                if cut.size(1):
                    # Of equal values the first counts.
                    first = (cut == cut.amax(1, keepdim=True)).double().argmax(1)
                    out.append(cut.gather(1, first[:, None])[:, 0])
                else:
                    out.append(maps.new_zeros(maps.size(1)))
    channels = maps.size(1)
    bins = torch.stack(out) if out else maps.new_zeros(0, channels)
    return bins.view(len(rois), *size, channels).permute(0, 3, 1, 2)


# Sampling between pixels.


def sample(maps, y, x, exact):
    """Values [B, C, *S] of maps [B, C, H, W] at points [B, *S], interpolated with zeros around.

    mmcv's rule: a point a pixel or more outside, or not finite, is zero and has no slope. Slopes
    change at pixels, where only ``exact`` points are on one side for sure.
    """
    height, width = maps.shape[2:]
    for at, size in ((y, height), (x, width)):
        gap = (at - at.round()).abs()
        near = (gap < CLOSE) & (at > -2) & (at < size + 1)
        if (near & (gap > 0) if exact else near).any():
            raise Ambiguous
    on_map = (y > -1) & (y < height) & (x > -1) & (x < width)  # false for NaN
    y, x = y.where(on_map, 0), x.where(on_map, 0)
    flat = maps.flatten(2)
    top, left = y.detach().floor(), x.detach().floor()
    total = 0
    for row, row_share in ((top, 1 - (y - top)), (top + 1, y - top)):
        for column, column_share in ((left, 1 - (x - left)), (left + 1, x - left)):
            inside = (row >= 0) & (row < height) & (column >= 0) & (column < width) & on_map
            index = torch.where(inside, row * width + column, 0).long()
            index = index.flatten(1)[:, None].expand(-1, maps.size(1), -1)
            share = torch.where(inside, row_share * column_share, 0)
            total = total + flat.gather(2, index).unflatten(2, y.shape[1:]) * share[:, None]
    return total


def deform_conv2d(x, offset, mask, weight, bias, stride, padding, dilation, groups, deform_groups):
    """Deformable convolution: gather what each kernel position reads, then one product."""
    images, channels = x.shape[:2]
    kernel, size = weight.shape[2:], offset.shape[2:]
    taps = kernel[0] * kernel[1]
    offset = offset.reshape(images * deform_groups, taps, 2, *size)
    # Kernel position + output position, on the input.
    grids = [
        torch.arange(k, dtype=x.dtype).view(-1, 1) * d
        + torch.arange(n, dtype=x.dtype).view(1, -1) * s
        - p
        for k, n, s, p, d in zip(kernel, size, stride, padding, dilation, strict=True)
    ]
    y = grids[0][:, None, :, None].expand(*kernel, *size).flatten(0, 1) + offset[:, :, 0]
    x_at = grids[1][None, :, None, :].expand(*kernel, *size).flatten(0, 1) + offset[:, :, 1]
    planes = x.reshape(images * deform_groups, channels // deform_groups, *x.shape[2:])
    read = sample(planes, y, x_at, exact=True)  # [N DG, C / DG, taps, P, Q]
    if mask is not None:
        read = read * mask.reshape(images * deform_groups, 1, taps, *size)
    read = read.reshape(images, groups, channels // groups, taps, *size)
    kernels = weight.reshape(groups, -1, channels // groups, taps)
    out = torch.einsum('ngcthw,goct->ngohw', read, kernels).flatten(1, 2)
    return out if bias is None else out + bias[:, None, None]


def ms_deform_attn(value, shapes, locations, weights):
    """Weighted samples [B, Q, M * D] of all levels; a location of 0 is a map's edge, as is 1."""
    images, _, heads, width = value.shape
    queries = locations.size(1)
    total = value.new_zeros(images, queries, heads * width)
    start = 0
    for level, (h, w) in enumerate(shapes):
        maps = value[:, start : start + h * w].permute(0, 2, 3, 1).reshape(-1, width, h, w)
        start += h * w
        at = locations[:, :, :, level].transpose(1, 2).flatten(0, 1)  # [B M, Q, P, 2]
        y, x = at[..., 1] * h - 0.5, at[..., 0] * w - 0.5
        read = sample(maps, y, x, exact=False)  # [B M, D, Q, P]
        share = weights[:, :, :, level].transpose(1, 2).flatten(0, 1)[:, None]
        summed = (read * share).sum(-1).view(images, heads, width, queries)
        total = total + summed.permute(0, 3, 1, 2).flatten(2)
    return total


# Losses.


def focal_term(log_prob, rest, alpha, gamma):
    """-alpha (1 - p)^gamma log p; the logarithm stops at float32's smallest number."""
    stopped = log_prob + (log_prob.clamp(min=math.log(TINY)) - log_prob).detach()
    return -alpha * rest.clamp(min=1e-300) ** gamma * stopped


def sigmoid_focal_loss(logits, target, gamma, alpha, weight=None):
    """Losses [N, C]; a target without a column is the background."""
    hot = target[:, None] == torch.arange(logits.size(1))
    hit = focal_term(F.logsigmoid(logits), (-logits).sigmoid(), alpha, gamma)
    miss = focal_term(F.logsigmoid(-logits), logits.sigmoid(), 1 - alpha, gamma)
    return torch.where(hot, hit, miss) * class_weight(target, weight)[:, None]


def class_weight(target, weight):
    if weight is None:
        return torch.ones(len(target), dtype=torch.float64)
    known = [weight[t].item() if 0 <= t < len(weight) else 1.0 for t in target.tolist()]
    return torch.tensor(known, dtype=torch.float64)


# Windows.


def carafe(features, masks, kernel, groups, scale):
    """Each output pixel is the window around its input pixel, weighted by its mask."""
    height, width = features.shape[2:]
    padded = F.pad(features, [kernel // 2] * 4)
    masks = masks.unflatten(1, (groups, kernel**2))
    out = 0
    for tap in range(kernel**2):
        y, x = divmod(tap, kernel)
        window = padded[:, :, y : y + height, x : x + width]
        window = window.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
        mask = masks[:, :, tap].repeat_interleave(max(features.size(1) // groups, 1), 1)
        out = out + window * mask[:, : features.size(1)]
    return out


def psa_mask(mask, collect, size):
    """PSANet's masks, value by value."""
    images, _, height, width = mask.shape
    moves = []
    for i in range(size[0]):
        for j in range(size[1]):
            for h in range(height):
                for w in range(width):
                    y, x = h + i - (size[0] - 1) // 2, w + j - (size[1] - 1) // 2
                    if 0 <= y < height and 0 <= x < width:
                        here, there = (h, w), (y, x)
                        channel, place = (there, here) if collect else (here, there)
                        moves.append(
                            (i * size[1] + j, h, w, channel[0] * width + channel[1], *place)
                        )
    out = mask.new_zeros(images, height * width, height, width)
    if moves:
        i, h, w, *there = torch.tensor(moves).T
        out = out.index_put((torch.arange(images)[:, None], *there), mask[:, i, h, w])
    return out


def masked_conv2d(x, mask, weight, bias, padding):
    """A convolution where the mask is, else zero."""
    return F.conv2d(x, weight, bias, padding=padding) * mask[:, None]


def batch_norm(x, weight, bias, eps):
    """Normed [N, C, S], with the mean and the biased variance of each channel."""
    mean = x.mean((0, 2))
    var = (x - mean[:, None]).square().mean((0, 2))
    norm = (x - mean[:, None]) / (var + eps).sqrt()[:, None]
    return norm * weight[:, None] + bias[:, None], mean, var
