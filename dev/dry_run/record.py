"""Counting what operators would do on a GPU: kernels, bytes, waits, copies between layouts.

Counts model eager PyTorch with cuDNN: each operator reads its arguments and writes its results
once, unless ``_cost`` knows better. They compare forms of a network with each other; they are not
measurements.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

__all__ = ['Launch', 'Record', 'Refused']

# Operators that launch nothing, besides views.
FREE = (
    *('empty', 'empty_like', 'empty_strided', 'new_empty', 'new_empty_strided', 'set_', 'resize_'),
    *('_unsafe_view', 'device', 'is_same_size', 'lift_fresh', 'promote_types'),
)
WRITES = ('copy_', 'fill_', 'zero_')  # operators that don't read what they write to
WAITS = ('_local_scalar_dense', 'nonzero', 'masked_select', 'equal', 'is_nonzero', 'unique_dim')
MASKED = ('index', 'index_put', 'index_put_')
SYNC_BN = 'torch/nn/modules/_functions.py'  # waits itself, for the counts of all processes
PROCESSES = 8  # values that a mask of SyncBN picks
TENSORS = {1: 110, 2: 64, 3: 48, 4: 36}  # of a foreach kernel, by its lists of tensors
SMALL = 2**14  # elements whose copy nobody minds


class Refused(RuntimeError):
    """Arguments that torch's CUDA kernel refuses, by its source."""


class Launch(NamedTuple):
    """An operator as it runs on a GPU."""

    name: str
    kernels: int
    bytes: int
    flops: int
    dtype: torch.dtype | None


@dataclass
class Record(TorchDispatchMode):
    """Records every operator on CUDA tensors while it is active.

    Attributes:
        launches: Operators in order.
        waits: Where the process would wait for the GPU: (operator, place).
        moves: Copies between NCHW and NHWC, or of strided feature maps: (operator, bytes, place).
        on_cpu: Operators that would run on the CPU: (operator, place).
    """

    launches: list[Launch] = field(default_factory=list)
    waits: list[tuple[str, str]] = field(default_factory=list)
    moves: list[tuple[str, int, str]] = field(default_factory=list)
    on_cpu: list[tuple[str, str]] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()

    @property
    def kernels(self) -> int:
        """Kernels that were launched."""
        return sum(launch.kernels for launch in self.launches)

    @property
    def bytes(self) -> int:
        """Bytes that they read and wrote."""
        return sum(launch.bytes for launch in self.launches)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split('::')[1]
        inputs = list(_tensors((args, kwargs)))
        on_gpu = any(x.is_cuda for x in inputs)
        if on_gpu:
            _check_kernel(name, func._overloadname, args, kwargs)
            if name in WAITS:
                self.waits.append((name, _place()))
            if name in MASKED and any(i is not None and i.dtype == torch.bool for i in args[1]):
                if _place() != SYNC_BN:
                    self.waits.append((f'{name} by a mask', _place()))
                picked = args[0].new_empty(PROCESSES, dtype=torch.long)
                args = (args[0], [picked for _ in args[1]], *args[2:])
        outputs = func(*args, **kwargs)
        results = list(_tensors(outputs))
        if not on_gpu and not any(x.is_cuda for x in results):
            if results and name not in FREE:
                self.on_cpu.append((name, _place()))
            return outputs
        if name in FREE or _is_view(func):
            return outputs
        if name in ('_to_copy', 'copy_') and len({x.device.type for x in [*inputs, *results]}) > 1:
            self.waits.append((f'{name} between devices', _place()))
        kernels, size, flops = _cost(name, func, args, kwargs, outputs)
        dtype = results[0].dtype if results else None
        self.launches.append(Launch(name, kernels, size, flops, dtype))
        if name in ('clone', '_to_copy', 'copy_', 'native_layer_norm') and _moves(
            name, inputs, results
        ):
            self.moves.append((name, size, _place()))
        return outputs


def _tensors(tree: Any) -> Iterator[Tensor]:
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, list | tuple):
        for child in tree:
            yield from _tensors(child)
    elif isinstance(tree, dict):
        yield from _tensors(list(tree.values()))


def _is_view(func: Any) -> bool:
    aliases = [result.alias_info for result in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def _place() -> str:
    """Return the innermost line of mmdense, or of SyncBatchNorm, that runs."""
    frame = sys._getframe(2)
    while frame:
        file = frame.f_code.co_filename
        if file.endswith(SYNC_BN):
            return SYNC_BN
        head, package, tail = file.rpartition('/mmdense/')
        if package and 'site-packages' not in tail:
            return f'{tail}:{frame.f_lineno}'
        frame = frame.f_back
    return 'autograd'


def _layout(x: Tensor) -> str:
    if x.is_contiguous():
        return 'NCHW'
    return 'NHWC' if x.is_contiguous(memory_format=torch.channels_last) else 'strided'


def _moves(name: str, inputs: list[Tensor], results: list[Tensor]) -> bool:
    """Return whether an operator copies a feature map for the sake of its layout."""
    maps = [x for x in [*inputs, *results] if x.ndim == 4]
    if not maps or max(x.numel() for x in maps) <= SMALL:
        return False
    if name == 'native_layer_norm':
        return not inputs[0].is_contiguous()
    source = inputs[1] if name == 'copy_' and len(inputs) > 1 else inputs[0]
    target = inputs[0] if name == 'copy_' else results[0]
    if source.dtype != target.dtype:
        return False
    layouts = {_layout(source), _layout(target)}
    return layouts == {'NCHW', 'NHWC'} or (name == 'clone' and 'strided' in layouts)


def _size(x: Tensor) -> int:
    """Return the bytes of a tensor; of an expanded one those that are stored."""
    sides = [side if stride else 1 for side, stride in zip(x.shape, x.stride(), strict=True)]
    return math.prod(sides) * x.element_size()


def _cost(name: str, func: Any, args: tuple, kwargs: dict, outputs: Any) -> tuple[int, int, int]:
    """Return kernels, bytes and FLOPs of an operator."""
    inputs, results = list(_tensors((args, kwargs))), list(_tensors(outputs))
    if name == 'convolution_backward':
        grad, x, weight = args[:3]
        wanted = args[10] if len(args) > 10 else kwargs['output_mask']
        products = wanted[0] + wanted[1]
        # torch's own counter takes a depthwise convolution for a dense one.
        flops = 2 * products * grad.numel() * math.prod(weight.shape[1:])
        size = products * (_size(grad) + _size(weight) + _size(x))
        return sum(wanted), size + wanted[2] * _size(grad), flops
    flops = 0
    if func._overloadpacket in flop_registry:
        flops = flop_registry[func._overloadpacket](*args, **kwargs, out_val=outputs)
    written = {
        id(x)
        for i, argument in enumerate(func._schema.arguments)
        if argument.alias_info is not None and argument.alias_info.is_write
        for x in _tensors(kwargs.get(argument.name, args[i] if i < len(args) else None))
    }
    only = name in WRITES or 'out' in func._overloadname
    read = {id(x): x for x in inputs if not (only and id(x) in written)}
    size = sum(map(_size, read.values())) + sum(map(_size, {id(x): x for x in results}.values()))
    kernels = 1
    if name == 'convolution' and args[2] is not None:  # cuDNN adds a bias in a kernel of its own
        kernels, size = 2, size + 2 * _size(results[0])
    elif name in ('native_batch_norm', 'cudnn_batch_norm', '_native_batch_norm_legit'):
        kernels, size = 3, _size(args[0]) * (3 if args[5] else 2)
    elif name in ('native_batch_norm_backward', 'cudnn_batch_norm_backward'):
        train = name.startswith('cudnn') or args[7]
        kernels, size = 2, _size(args[1]) * (5 if train else 4)
        if name.startswith('native') and not args[9][0]:  # only those of weight and bias
            kernels, size = 1, _size(args[1]) * 2
    elif name == 'batch_norm_update_stats':
        kernels, size = 1 + (args[1] is not None), _size(args[0])
    elif name.startswith('_foreach'):  # kernels of at most so many tensors
        lists = [x for x in args if isinstance(x, list | tuple)]
        kernels = math.ceil(len(lists[0]) / TENSORS[len(lists) + (name[-1] != '_')])
    elif name == 'native_layer_norm':
        move = not args[0].is_contiguous()
        kernels, size = 1 + move, _size(args[0]) * (4 if move else 2)
    elif name == 'native_layer_norm_backward':
        kernels, size = 2, _size(args[1]) * 5
    return kernels, size, flops


def _check_kernel(name: str, overload: str, args: tuple, kwargs: dict) -> None:
    """Refuse the arguments that torch's Normalization.cu refuses (read in torch 2.15)."""
    if name == 'native_batch_norm_backward':
        x, weight, save_mean, mask = args[1], args[2], args[5], args[9]
        if weight is None and any(mask[1:]):
            raise Refused('native_batch_norm_backward computes no gradients of a missing weight')
        if (_layout(x) == 'NHWC' or not mask[0]) and save_mean is None:
            raise Refused('native_batch_norm_backward of a channels-last map needs save_mean')
    if name == 'native_batch_norm' and overload == 'out' and not args[5]:
        x, save_mean = args[0], kwargs['save_mean']
        wide = torch.promote_types(x.dtype, torch.float32)
        if _layout(x) != 'strided' and save_mean.dtype != wide:
            raise Refused(f'native_batch_norm.out needs save_mean in {wide}')
