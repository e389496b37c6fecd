"""What inductor schedules for a GPU in a compiled training step, counted without one.

``python -m dev.dry_run.inductor [NAME...]``, started with the environment of
:func:`dev.dry_run.fake_cuda.environment`, prints a line of JSON for each network, or for those with
these names: kernels, GB that they read and write, and GB that forward keeps for backward. Names end
in mmdense's memory mode or 'timm'. The first stages are counted: they move most of the bytes.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import timm
import torch
from torch import Tensor, nn

from dev.dry_run import fake_cuda
from mmdense.models import DenseNet, RDNet, ReXNet

__all__ = ['count', 'start']

BATCH, SIZE = 2, (800, 1344)
BLOCKS = (6, 8)
FULL = dict(densenet121=DenseNet, rdnet_tiny=partial(RDNet, arch='tiny'), rexnet_100=ReXNet)
SHORT = dict(
    densenet=(
        partial(DenseNet, arch=dict(growth_rate=32, layers=BLOCKS)),
        dict(model_name='densenet121', block_config=BLOCKS, out_indices=(1, 2)),
    ),
    rdnet=(partial(RDNet, out_indices=(0, 1)), dict(model_name='rdnet_tiny', out_indices=(0, 1))),
    rexnet=(partial(ReXNet, out_indices=(1, 2)), dict(model_name='rexnet_100', out_indices=(1, 2))),
)
MODES = ('plain', 'lean')
GPU = SimpleNamespace(
    **dict(type='cuda', index=0, cc=90, major=9, minor=0, name='', gcnArchName='', warp_size=32),
    **dict(multi_processor_count=132, total_memory=2**37, L2_cache_size=50 * 2**20),
    **dict(regs_per_multiprocessor=65536, max_threads_per_multi_processor=2048),
    **dict(max_threads_per_block=1024, shared_memory_per_block=48 * 2**10),
    shared_memory_per_block_optin=227 * 2**10,
)


class Scheduled(BaseException):
    """Both graphs are counted: nothing is left to run."""


def start() -> Any:
    """Make torch and inductor believe in a GPU, and return the mode in which tensors are made."""
    mode = fake_cuda.start()
    import torch._functorch.config as functorch
    import torch._inductor.config as inductor

    torch.cuda.get_device_properties = torch.cuda._get_device_properties = lambda *_: GPU
    torch.cuda.device = nullcontext
    torch.cuda.get_device_capability = lambda *_: (GPU.major, GPU.minor)
    torch.cuda.get_device_name = lambda *_: GPU.name
    torch.cuda.graphs.is_current_stream_capturing = lambda: False
    for name in ('getDevice', 'exchangeDevice', 'maybeExchangeDevice', 'setDevice'):
        setattr(torch._C, f'_cuda_{name}', lambda *_: 0)
    torch._C._cuda_isCurrentStreamCapturing = lambda: False
    torch.tensor = _constant
    functorch.enable_autograd_cache = functorch.bundled_autograd_cache = False
    functorch.force_non_lazy_backward_lowering = True
    inductor.fx_graph_cache = inductor.joint_graph_constant_folding = False
    inductor.compile_threads = 1
    return mode


def _constant(
    data: Any, *, dtype: Any = None, device: Any = None, new: Any = torch.tensor
) -> Tensor:
    """Return a tensor without asking the driver, as ``torch.tensor`` does for one on a GPU."""
    if device is None or torch.device(device).type == 'cpu':
        return new(data, dtype=dtype)
    return torch.empty(new(data).shape, dtype=dtype or torch.float32).to(device)


def _size(node: Any) -> int:
    size = node.get_layout().dtype.itemsize
    for side in node.get_layout().size:
        size *= int(side)
    return size


def _cost(node: Any) -> tuple[int, int]:
    """Return kernels and bytes of a node that inductor's scheduler has."""
    kind, inner = type(node).__name__, getattr(node, 'node', None)
    if kind == 'NopKernelSchedulerNode' or type(inner).__name__ == 'MultiOutput':
        return 0, 0
    if 'convolution_backward' in str(getattr(inner, 'op_overload', '')):
        # Two kernels, each of which reads or writes all three.
        return 2, 2 * sum(map(_size, inner.inputs[:3]))
    return 1, node.get_read_write_buffers_sizes()


def count(net: nn.Module, image: Tensor) -> dict[str, Any]:
    """Return ``kernels``, ``gb`` and ``kept_gb`` of a training step under bf16 autocast."""
    from torch._inductor import compile_fx, scheduler

    total, kept = [0, 0], [0]

    def schedule(self: Any) -> None:
        for node in self.nodes:
            for i, value in enumerate(_cost(node)):
                total[i] += value
        raise InterruptedError

    def compile(graph: Any, inputs: Sequence[Any], **options: Any) -> Callable[..., Any]:
        before = list(total)
        try:
            compile_fx.compile_fx_inner(graph, inputs, **options)
        except Exception:
            if total == before:
                raise
        if options.get('is_backward'):
            nodes = [node for node in graph.graph.nodes if node.op == 'placeholder']
            saved = [n.meta['val'] for n in nodes if not n.name.startswith(('primals', 'tangents'))]
            kept[0] = sum(x.nbytes for x in saved if isinstance(x, Tensor))
            raise Scheduled
        return lambda *_: None  # never called

    scheduler.Scheduler.codegen = schedule
    with mock.patch.object(
        compile_fx, 'compile_fx', partial(compile_fx.compile_fx, inner_compile=compile)
    ):
        net.compile()
        with suppress(Scheduled), torch.autocast('cuda', torch.bfloat16):
            net(image)
    return dict(kernels=total[0], gb=total[1] / 1e9, kept_gb=kept[0] / 1e9)


def main() -> None:
    mode = start()
    warnings.simplefilter('ignore')
    networks: dict[str, Callable[[], nn.Module]] = {}
    for name, (ours, options) in SHORT.items():
        networks |= {f'{name} {mode}': partial(ours, memory=mode) for mode in MODES}
        networks[f'{name} timm'] = partial(timm.create_model, features_only=True, **options)
    for name, ours in FULL.items():
        if name in sys.argv:
            networks |= {f'{name} {mode}': partial(ours, memory=mode) for mode in MODES}
            networks[f'{name} timm'] = partial(timm.create_model, name, features_only=True)
    for name, build in networks.items():
        if sys.argv[1:] and name.split()[0] not in sys.argv:
            continue
        net = fake_cuda.to_fake(build().to(memory_format=torch.channels_last), mode).train()
        with mode:
            image = torch.empty(BATCH, 3, *SIZE, device='cuda')
            image = image.contiguous(memory_format=torch.channels_last)
        sys.stdout.write(json.dumps({'row': name, **count(net, image)}) + '\n')
        sys.stdout.flush()


if __name__ == '__main__':
    main()
