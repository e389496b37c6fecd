"""CUDA tensors without a GPU: forward and backward passes run on fake ones.

torch's ``FakeTensorMode`` computes shapes, dtypes, strides and devices, but no values. A backward
pass asks the CUDA driver for devices even then, so a stub answers in its place: two functions,
compiled by the machine's C compiler and preloaded into a process of its own. That process starts
with the environment that :func:`environment` returns and calls :func:`start` before anything else.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import torch
from torch import nn
from torch._subclasses import FakeTensorMode

__all__ = ['compiler', 'environment', 'start', 'to_fake']

VARIABLE = 'MMDENSE_CUDA_STUB'
STUB = """
int stub_devices = 0;
signed char _ZN3c104cuda12device_countEv(void) { return stub_devices; }
int cuDevicePrimaryCtxGetState(int device, unsigned *flags, int *active) {
    *flags = 0; *active = 0; return 0;
}
"""
DEVICES = 100  # more than torch's guard for fake tensors names
# What torch.cuda answers where it would ask a driver.
ANSWERS = dict(
    is_available=lambda: True,
    device_count=lambda: 1,
    is_bf16_supported=lambda *args, **kwargs: True,
    is_initialized=lambda: True,
    current_device=lambda: 0,
    synchronize=lambda *args: None,
    is_current_stream_capturing=lambda: False,
    get_rng_state=lambda device=None: torch.get_rng_state(),
    set_rng_state=lambda state, device=None: None,
    manual_seed=lambda seed: None,
    manual_seed_all=lambda seed: None,
    _lazy_init=lambda: None,
)


def _statistics(x: torch.Tensor) -> torch.Tensor:
    return x.new_empty(x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))


# Operators of batch norm that torch has kernels for, but no shapes.
META = torch.library.Library('aten', 'IMPL', 'Meta')
SHAPES = dict(
    batch_norm_update_stats=lambda x, *args: (_statistics(x), _statistics(x)),
    batch_norm_stats=lambda x, eps: (_statistics(x), _statistics(x)),
    batch_norm_gather_stats_with_counts=lambda x, *args: (_statistics(x), _statistics(x)),
    batch_norm_elemt=lambda x, *args: torch.empty_like(x),
    batch_norm_backward_reduce=lambda grad, x, *args: tuple(_statistics(x) for _ in range(4)),
    batch_norm_backward_elemt=lambda grad, x, *args: torch.empty_like(x),
)


def compiler() -> str | None:
    """Return the C compiler of this machine, if it has one."""
    return shutil.which('cc') or shutil.which('gcc')


def environment(folder: Path) -> dict[str, str]:
    """Compile the stub in a folder, and return the environment of a process that preloads it."""
    library = folder / 'libcuda.so.1'
    command = [compiler(), '-x', 'c', '-', '-shared', '-fPIC', f'-Wl,-soname,{library.name}']
    subprocess.run([*command, '-o', library], input=STUB, text=True, check=True)
    return {**os.environ, 'LD_PRELOAD': str(library), VARIABLE: str(library)}


def start() -> FakeTensorMode:
    """Make torch believe in a GPU, and return the mode in which tensors are made."""
    devices = ctypes.c_int.in_dll(ctypes.CDLL(os.environ[VARIABLE]), 'stub_devices')
    mode = FakeTensorMode(allow_non_fake_inputs=False)
    with mode:
        torch.empty(1, device='cuda')  # torch takes a guard that does nothing, for lack of devices
    devices.value = DEVICES
    for name, answer in ANSWERS.items():
        setattr(torch.cuda, name, answer)
    torch._C._select_conv_backend = _conv_backend
    for name, shape_of in SHAPES.items():
        META.impl(name, shape_of)
    return mode


def to_fake(net: nn.Module, mode: FakeTensorMode) -> nn.Module:
    """Move parameters and buffers to fake CUDA memory, in place; shared ones stay shared."""
    moved: dict[int, torch.Tensor] = {}
    for module in net.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in moved:
                    with mode:
                        new = torch.empty_strided(
                            tensor.shape, tensor.stride(), dtype=tensor.dtype, device='cuda'
                        )
                    if isinstance(tensor, nn.Parameter):
                        new = nn.Parameter(new, tensor.requires_grad)
                    moved[id(tensor)] = new
                tensors[name] = moved[id(tensor)]
    return net


def _conv_backend(input, weight, *, transposed, groups, **_):
    """Return what a GPU of compute capability 8 or later takes, with cuDNN 9."""
    last = any(
        x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        for x in (input, weight)
    )
    depthwise = groups == input.shape[1] > 1 and weight.shape[0] % groups == 0
    if depthwise and not transposed and not last:
        return torch._C._ConvBackend.CudaDepthwise2d
    return torch._C._ConvBackend.CudnnTranspose if transposed else torch._C._ConvBackend.Cudnn
