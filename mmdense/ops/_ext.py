"""The replacement for ``mmcv._ext``, executed under that name.

mmcv checks on import that every operator exists. Those that are not provided raise when called.
"""
# ruff: noqa: F401  (mmcv looks the operators up by name)

import torch
import torchvision

if not hasattr(torch.ops.torchvision, 'nms'):
    raise ImportError(
        f'the operators of torchvision {torchvision.__version__} do not load with torch '
        f'{torch.__version__}: install the torchvision that matches this torch'
    )

from mmdense.ops._attention import ms_deform_attn_backward, ms_deform_attn_forward
from mmdense.ops._boxes import bbox_overlaps, nms, nms_match, softnms
from mmdense.ops._deform import (
    deform_conv_backward_input,
    deform_conv_backward_parameters,
    deform_conv_forward,
    modulated_deform_conv_backward,
    modulated_deform_conv_forward,
)
from mmdense.ops._focal import (
    sigmoid_focal_loss_backward,
    sigmoid_focal_loss_forward,
    softmax_focal_loss_backward,
    softmax_focal_loss_forward,
)
from mmdense.ops._norm import (
    sync_bn_backward_data,
    sync_bn_backward_param,
    sync_bn_forward_mean,
    sync_bn_forward_output,
    sync_bn_forward_var,
)
from mmdense.ops._roi import (
    roi_align_backward,
    roi_align_forward,
    roi_pool_backward,
    roi_pool_forward,
)
from mmdense.ops._window import (
    carafe_backward,
    carafe_forward,
    carafe_naive_backward,
    carafe_naive_forward,
    masked_col2im_forward,
    masked_im2col_forward,
    psamask_backward,
    psamask_forward,
)


def get_compiler_version() -> str:
    """Return the entry for mmcv's compiler in mmengine's environment report."""
    return f'none: operators of torchvision {torchvision.__version__} by mmdense'


def get_compiling_cuda_version() -> str:
    """Return the CUDA version of torch, whose kernels are used."""
    return torch.version.cuda or 'not available'


def __getattr__(name: str):
    if name.startswith('__'):
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')

    def missing(*args, **kwargs):
        raise NotImplementedError(
            f'mmdense.ops does not provide the mmcv operator {name!r}. Install mmcv with its '
            'compiled extension, which mmdense then uses: '
            'MMCV_WITH_OPS=1 pip install --no-build-isolation --no-binary onedl-mmcv onedl-mmcv '
            '(with a C++ compiler and torch < 2.14)'
        )

    missing.__name__ = name
    return missing
