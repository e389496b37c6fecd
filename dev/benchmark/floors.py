"""The least time that a device could need for a network.

Each convolution or matrix product takes the time of its operations at the device's peak, or that of
reading its operands and writing its results once at its bandwidth, whichever is longer. Norms,
activations, concatenations and copies are taken to cost nothing, as if all were fused.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from dev.benchmark.networks import NETWORKS
from mmdense.benchmark.timing import seconds_of

__all__ = ['Floor', 'device_peaks']

DTYPES = dict(float32=torch.float32, bfloat16=torch.bfloat16, float16=torch.float16)
SIDE, COPIED = 8192, 2**30  # of a large product; bytes of a large copy


def _backward_flops(grad: Tensor, image: Tensor, weight: Tensor, *others: Any, out_val: Any) -> int:
    """Count a convolution's backward pass; torch's formula is wrong for grouped ones."""
    return 2 * grad.numel() * math.prod(weight.shape[1:]) * sum(y is not None for y in out_val[:2])


FLOPS = {**flop_registry, torch.ops.aten.convolution_backward: _backward_flops}


def device_peaks(device: str = 'cuda', dtypes: Iterable[str] = DTYPES) -> dict[str, float]:
    """Measure what a device reaches: FLOP/s of a large product by dtype, bytes/s as ``bandwidth``.

    On a GPU products of float32 are in TF32, as convolutions are by default.
    """
    side = SIDE // 4 if device == 'cpu' else SIDE

    def best(run: Any) -> float:
        run()
        return min(seconds_of(run, device) for _ in range(10))

    before = torch.get_float32_matmul_precision()
    if device != 'cpu':
        torch.set_float32_matmul_precision('high')
    try:
        peaks = {}
        for name in dtypes:
            x = torch.ones(side, side, dtype=DTYPES[name], device=device)
            peaks[name] = 2 * side**3 / best(lambda x=x: torch.mm(x, x))
    finally:
        torch.set_float32_matmul_precision(before)
    x = torch.ones(COPIED, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    return {**peaks, 'bandwidth': 2 * COPIED / best(lambda: y.copy_(x))}


@dataclass(frozen=True)
class Floor:
    """What a network cannot do without: operations, bytes, and the seconds that they take."""

    flops: int
    bytes: int
    seconds: float

    @classmethod
    def of(cls, setting: Any, peaks: Mapping[str, float]) -> Floor:
        """Return the floor in a setting (:class:`.compare.Setting`).

        In 'train' it includes the backward pass.
        """
        net = NETWORKS[setting.network].create().to('meta').train(setting.mode == 'train')
        image = torch.empty(setting.batch, 3, *setting.size, device='meta')
        products = _Products(DTYPES[setting.dtype].itemsize)
        with products, torch.set_grad_enabled(setting.mode == 'train'):
            features = net(image)
            if setting.mode == 'train':
                torch.autograd.backward(features, [torch.empty_like(x) for x in features])
        peak, bandwidth = peaks[setting.dtype], peaks['bandwidth']
        return cls(
            sum(flops for flops, _ in products.costs),
            sum(size for _, size in products.costs),
            sum(max(flops / peak, size / bandwidth) for flops, size in products.costs),
        )


class _Products(TorchDispatchMode):
    """Record operations and bytes of each product."""

    def __init__(self, itemsize: int) -> None:
        super().__init__()
        self.itemsize = itemsize
        self.costs: list[tuple[int, int]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        y = func(*args, **(kwargs or {}))
        if formula := FLOPS.get(func.overloadpacket):
            tensors = [x for x in tree_leaves((args, kwargs, y)) if isinstance(x, Tensor)]
            size = self.itemsize * sum(x.numel() for x in tensors)
            self.costs.append((formula(*args, **(kwargs or {}), out_val=y), size))
        return y
