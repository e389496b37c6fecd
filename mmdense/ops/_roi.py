"""RoIAlign: average pooling of regions of interest (RoIs).

R: RoIs, rows of (image index, x1, y1, x2, y2); C: channels; H, W: size of the feature maps;
P, Q: size of the outputs [R, C, P, Q].

A RoI that is not finite, such as a diverging network's, gives NaN and no gradient: torchvision's
kernel would read arbitrary memory. A RoI of an image that is not in the batch raises an IndexError
on a CPU and a device-side assertion on a GPU. Nothing waits for the GPU.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mmdense.ops._common import not_provided, widen

AVERAGE = 1  # pool_mode of RoIAlign; 0 is max
OUTSIDE = -3e4  # a coordinate outside every feature map, which float16 can represent


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
    """Write ``output`` [R, C, P, Q]."""
    if pool_mode != AVERAGE:
        raise not_provided("roi_align with pool_mode='max'")
    input, rois = widen(input, rois)
    rois, bad = _usable(rois, len(input))
    size = aligned_height, aligned_width
    roi_align = torch.ops.torchvision.roi_align
    output.copy_(roi_align(input, rois, spatial_scale, *size, sampling_ratio, aligned))
    output.masked_fill_(bad[:, None, None, None], torch.nan)


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
    grad, rois = widen(grad_output, rois)
    rois, _ = _usable(rois, len(grad_input))
    size = aligned_height, aligned_width
    grad_input.copy_(
        torch.ops.torchvision._roi_align_backward(
            grad, rois, spatial_scale, *size, *grad_input.shape, sampling_ratio, aligned
        )
    )


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
