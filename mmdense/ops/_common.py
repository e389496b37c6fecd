"""What the operators share."""

import torch
from torch import Tensor


def widen(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Return the tensors, with float16 and bfloat16 converted to float32.

    torchvision's kernels don't support bfloat16, and some not float16 on a CPU. Sums, areas and
    coordinates need more digits than either has. Autocast then changes nothing.
    """
    narrow = (torch.float16, torch.bfloat16)
    return tuple(t.float() if t.dtype in narrow else t for t in tensors)


def not_provided(operator: str) -> NotImplementedError:
    """Return the error of an operator, or a mode of one, that mmdense doesn't have."""
    return NotImplementedError(
        f'mmdense.ops does not provide the mmcv operator {operator}. Install mmcv with its '
        'compiled extension, which mmdense then uses: '
        'MMCV_WITH_OPS=1 pip install --no-build-isolation --no-binary onedl-mmcv onedl-mmcv '
        '(with a C++ compiler and torch < 2.14)'
    )
