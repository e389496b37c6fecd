"""Precision of the operators."""

import torch
from torch import Tensor


def widen(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors, with float16 and bfloat16 converted to float32.

    torchvision's kernels don't support bfloat16, and some not float16 on a CPU. Sums, areas and
    coordinates need more digits than either has. Autocast then changes nothing.
    """
    narrow = (torch.float16, torch.bfloat16)
    return tuple(t.float() if t.dtype in narrow else t for t in tensors)
