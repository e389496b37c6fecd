"""Whole backbones on fake CUDA tensors at full size: mmdense's forms beside other implementations.

``python -m dev.dry_run.networks``, started with the environment of
:func:`dev.dry_run.fake_cuda.environment`, prints a line of JSON for each form.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from dev.benchmark.networks import NETWORKS
from dev.dry_run import fake_cuda
from dev.dry_run.record import Launch, Record

NAMES = ('densenet121', 'rdnet_tiny', 'rexnet_100', 'condensenetv2_c')
TRAINED = NAMES[:3]
SIZE = (800, 1344)
BATCHES = dict(train=2, infer=1)
# An H200: bytes and operations a second, and seconds of a launch and of the shortest kernel.
BANDWIDTH, HALF, SINGLE, LAUNCH, KERNEL = 4.3e12, 790e12, 400e12, 4e-6, 1.5e-6


def forms(name: str, mode: str) -> Iterator[tuple[str, Callable[[], nn.Module]]]:
    """Yield the forms of a network, by name: mmdense's first."""
    network = NETWORKS[name]
    if mode == 'train':
        for form, options in network.options.items():
            yield form or 'plain', lambda options=options: network.create(**options)
    else:
        yield 'plain', network.create

        def deployed() -> nn.Module:
            net = network.create()
            net.switch_to_deploy()
            return net

        yield 'deployed', deployed
    for peer, build in network.peers.items():
        if mode == 'train' or 'memory_efficient' not in peer:  # which only training differs by
            yield peer, lambda build=build: build(network.create())


def modelled(launches: list[Launch]) -> float:
    """Return seconds: each kernel takes its bytes or its products, all at least the launches."""
    seconds = 0.0
    for _, kernels, size, flops, dtype in launches:
        peak = HALF if dtype in (torch.bfloat16, torch.float16) else SINGLE
        seconds += max(size / BANDWIDTH, flops / peak, kernels * KERNEL)
    return max(seconds, LAUNCH * sum(launch.kernels for launch in launches))


def count(build: Callable[[], nn.Module], mode: str, fake: Any) -> dict[str, Any]:
    """Return what a training step under autocast, or inference in bfloat16, would do on a GPU."""
    dtype = torch.float32 if mode == 'train' else torch.bfloat16
    net = build().to(dtype, memory_format=torch.channels_last)
    net = fake_cuda.to_fake(net, fake).train(mode == 'train')
    parameters = {x.untyped_storage()._cdata for x in net.parameters()}
    saved: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if x.is_cuda and storage._cdata not in parameters:
            saved[storage._cdata] = storage.nbytes()
        return x

    record = Record()
    with fake:
        image = torch.empty(BATCHES[mode], 3, *SIZE, device='cuda', dtype=dtype)
        image = image.contiguous(memory_format=torch.channels_last)
        if mode == 'infer':
            with torch.no_grad(), record:
                net(image)
        else:
            hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x)
            with record, hooks, torch.autocast('cuda', torch.bfloat16):
                maps = net(image)
            kept = sum(saved.values())
            with record:
                sum(x.float().square().mean() for x in maps).backward()
    result = dict(kernels=record.kernels, gb=record.bytes / 1e9, ms=1e3 * modelled(record.launches))
    return {**result, 'kept_gb': kept / 1e9} if mode == 'train' else result


def main() -> None:
    fake = fake_cuda.start()
    warnings.simplefilter('ignore')
    for mode, names in (('train', TRAINED), ('infer', NAMES)):
        for name in names:
            for form, build in forms(name, mode):
                row = dict(mode=mode, network=name, form=form, **count(build, mode, fake))
                sys.stdout.write(json.dumps(row) + '\n')
                sys.stdout.flush()


if __name__ == '__main__':
    main()
