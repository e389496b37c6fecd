"""The replacement for ``mmcv._ext``, executed under that name.

mmcv checks on import that every operator exists. Those that are not provided raise when called.
"""

import torch
import torchvision

if not hasattr(torch.ops.torchvision, 'nms'):
    raise ImportError(
        f'the operators of torchvision {torchvision.__version__} do not load with torch '
        f'{torch.__version__}: install the torchvision that matches this torch'
    )

from mmdense.ops import _attention, _boxes, _common, _deform, _focal, _norm, _roi, _window

# The operators are the public functions of these modules. They write to given tensors, so none is
# differentiated: mmcv calls the backward ones.
for _module in (_attention, _boxes, _deform, _focal, _norm, _roi, _window):
    for _name, _operator in vars(_module).items():
        if getattr(_operator, '__module__', '') == _module.__name__ and _name[0] != '_':
            globals()[_name] = torch.no_grad()(_operator)


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
        raise _common.not_provided(repr(name))

    missing.__name__ = name
    return missing
