"""What the operators share."""

import torch
from torch import Tensor


def widen(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors, those in float16 and bfloat16 as float32.

    torchvision's kernels know no bfloat16, on a CPU some know no float16, and sums, areas and
    coordinates want more digits than either has. Nothing is left for autocast to change.
    """
    narrow = (torch.float16, torch.bfloat16)
    return tuple(t.float() if t.dtype in narrow else t for t in tensors)
