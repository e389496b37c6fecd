"""Record the results of mmcv's compiled operators for test_ops_reference.py.

Run with a compiled mmcv (for the recorded file onedl-mmcv 2.3.6, built with torch 2.13.0); nothing
here imports mmdense:

    python tests/ops/make_mmcv_reference.py --out tests/ops/data/mmcv_reference.npz

Only operators that mmcv has for the CPU are here.
"""

import argparse
import itertools
from functools import partial

import mmcv.ops
import numpy as np
import torch


def boxes(rng, count, grid=False, ties=False):
    """Return crowded boxes and scores; on a ``grid`` many IoUs coincide, with ``ties`` scores.

    Among equal scores soft-NMS has an order; that of mmcv's nms and nms_match is left to torch's
    unstable sort, and differs from one torch to another.
    """
    corner, side = rng.rand(count, 2) * 30, rng.rand(count, 2) * 20 + 1
    scores = rng.rand(count)
    if grid:
        corner, side = corner // 4 * 4, side // 4 * 4 + 4
    if ties:
        scores = np.ceil(scores * 5) / 5
    data = np.concatenate((corner, corner + side, scores[:, None]), 1).astype(np.float32)
    return torch.from_numpy(data[:, :4].copy()), torch.from_numpy(data[:, 4].copy())


def normal(rng, *shape):
    return torch.from_numpy(rng.randn(*shape).astype(np.float32))


def with_grads(rng, function, **leaves):
    """Return the output of ``function(**leaves)`` and gradients, for a random output gradient."""
    leaves = {name: leaf.clone().requires_grad_() for name, leaf in leaves.items()}
    out = function(**leaves)
    grads = torch.autograd.grad(out, list(leaves.values()), normal(rng, *out.shape))
    arrays = {f'grad_{name}': grad.numpy() for name, grad in zip(leaves, grads, strict=True)}
    return {'output': out.detach().numpy(), **arrays}


def nms(rng, offset, grid, threshold):
    dets, keep = mmcv.ops.nms(*boxes(rng, 60, grid), threshold, offset=offset)
    return {'dets': dets.numpy(), 'keep': keep.numpy()}


def soft_nms(rng, method, offset, ties):
    options = dict(iou_threshold=0.3, sigma=0.5, min_score=0.05, method=method, offset=offset)
    dets, keep = mmcv.ops.soft_nms(*boxes(rng, 40, ties, ties), **options)
    return {'dets': dets.numpy(), 'keep': keep.numpy()}


def nms_match(rng, grid):
    dets, scores = boxes(rng, 50, grid)
    groups = mmcv.ops.nms_match(torch.cat((dets, scores[:, None]), 1), 0.4)
    return {'members': torch.cat(groups).numpy(), 'sizes': np.array([len(g) for g in groups])}


def roi_align(rng, sampling_ratio, aligned):
    # Some reach over the edges of the 10 x 12 maps (40 x 48 pixels), or far beyond them.
    rois = boxes(rng, 5)[0] * torch.tensor([1.8, 1.5, 1.2, 1.1]) - 5
    rois[:, 2:] = torch.maximum(rois[:, 2:], rois[:, :2] + 0.5)
    rois = torch.cat((torch.from_numpy(rng.randint(0, 2, (5, 1))).float(), rois), 1)
    options = rois, (2, 3), 0.25, sampling_ratio, 'avg', aligned
    maps = normal(rng, 2, 3, 10, 12)
    return with_grads(rng, lambda input: mmcv.ops.roi_align(input, *options), input=maps)


def convolve(rng, stride=1, dilation=1, both_groups=(1, 1), **leaves):
    """Run deformable convolution of ``leaves``, version 2 if there is a mask."""

    def run(input, offset, weight, mask=None, bias=None):
        options = stride, 1, dilation, *both_groups
        if mask is None:
            return mmcv.ops.deform_conv2d(input, offset, weight, *options)
        return mmcv.ops.modulated_deform_conv2d(input, offset, mask, weight, bias, *options)

    return with_grads(rng, run, **leaves)


def deform_conv2d(rng, stride, dilation, both_groups):
    size = [(n + 2 - dilation * 2 - 1) // stride + 1 for n in (4, 5)]
    leaves = dict(
        input=normal(rng, 2, 4, 4, 5),
        offset=normal(rng, 2, 18 * both_groups[1], *size) * 2,
        weight=normal(rng, 6, 4 // both_groups[0], 3, 3),
    )
    return convolve(rng, stride, dilation, both_groups, **leaves)


def modulated_deform_conv2d(rng, stride, both_groups, with_bias):
    size = [(n + 2 - 3) // stride + 1 for n in (4, 5)]
    leaves = dict(
        input=normal(rng, 2, 4, 4, 5),
        offset=normal(rng, 2, 18 * both_groups[1], *size) * 2,
        mask=normal(rng, 2, 9 * both_groups[1], *size),
        weight=normal(rng, 6, 4 // both_groups[0], 3, 3),
    )
    if with_bias:
        leaves['bias'] = normal(rng, 6)
    return convolve(rng, stride, 1, both_groups, **leaves)


def oversized_offsets(rng, deform_groups):
    """Offsets and masks of the next finer level, as mmdet's DyHead passes them."""
    leaves = dict(
        input=normal(rng, 2, 2, 3, 4),
        offset=normal(rng, 2, 18 * deform_groups, 5, 7),
        mask=normal(rng, 2, 9 * deform_groups, 5, 7),
        weight=normal(rng, 3, 2, 3, 3),
    )
    return convolve(rng, both_groups=(1, deform_groups), **leaves)


def samples_at_the_rim(rng, offsets, modulated):
    """Offsets of zero, as training begins, or of whole pixels: samples lie exactly at -1 and H."""
    whole = torch.from_numpy(rng.randint(-2, 3, (2, 18, 4, 5)).astype(np.float32))
    leaves = dict(
        input=normal(rng, 2, 2, 4, 5),
        offset=whole * (offsets == 'whole'),
        weight=normal(rng, 3, 2, 3, 3),
    )
    if modulated:
        leaves['mask'] = normal(rng, 2, 9, 4, 5)
    return convolve(rng, **leaves)


def psa_mask(rng, psa_type, mask_size):
    mask = normal(rng, 2, mask_size[0] * mask_size[1], 3, 4)
    return with_grads(rng, mmcv.ops.PSAMask(psa_type, mask_size), input=mask)


def cases():
    """Yield every case with its name."""
    booleans = False, True
    pairs = (1, 2), (2, 1)  # of groups and deformable groups
    grid = [
        (nms, dict(offset=(0, 1), grid=booleans, threshold=(0.3, 0.6))),
        (soft_nms, dict(method=('naive', 'linear', 'gaussian'), offset=(0, 1), ties=booleans)),
        (nms_match, dict(grid=booleans)),
        (roi_align, dict(sampling_ratio=(0, 2), aligned=booleans)),
        (deform_conv2d, dict(stride=(1, 2), dilation=(1, 2), both_groups=pairs)),
        (
            modulated_deform_conv2d,
            dict(stride=(1, 2), both_groups=pairs, with_bias=booleans),
        ),
        (oversized_offsets, dict(deform_groups=(1, 2))),
        (samples_at_the_rim, dict(offsets=('zero', 'whole'), modulated=booleans)),
        (psa_mask, dict(psa_type=('collect', 'distribute'), mask_size=((5, 7), (3, 1)))),
    ]
    for function, options in grid:
        for values in itertools.product(*options.values()):
            chosen = dict(zip(options, values, strict=True))
            name = ','.join(f'{key}={value}' for key, value in chosen.items())
            yield f'{function.__name__}({name})', partial(function, **chosen)


def run(case, seed):
    # The stream of RandomState is frozen: every numpy makes the same inputs.
    return case(np.random.RandomState(seed))  # noqa: NPY002


def pack(arrays):
    """Return all values in one array: a file of many small arrays is mostly headers."""
    return np.concatenate([array.ravel() for array in arrays.values()]).astype(np.float32)


def unpack(packed, like):
    """Return ``packed`` with the names and shapes of ``like``; they must fit."""
    ends = np.cumsum([array.size for array in like.values()])
    if packed.size != ends[-1]:
        raise ValueError(f'{packed.size} values recorded, {ends[-1]} computed')
    parts = np.split(packed, ends[:-1])
    return {k: part.reshape(a.shape) for (k, a), part in zip(like.items(), parts, strict=True)}


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('--out', required=True, help='file to write')
    args = parser.parse_args()
    np.savez_compressed(args.out, **{f'{name}/0': pack(run(case, 0)) for name, case in cases()})


if __name__ == '__main__':
    main()
