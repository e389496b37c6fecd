"""What the dry run tries: every family, memory mode and inference form on fake CUDA tensors.

``python -m dev.dry_run.rows [WORD...]``, started with the environment of
:func:`dev.dry_run.fake_cuda.environment`, prints a line of JSON for each row that holds all words.
"""

from __future__ import annotations

import json
import sys
import traceback
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dev.dry_run import fake_cuda
from dev.dry_run.record import PROCESSES, Record
from mmdense.models import CondenseNetV2, DenseNet, RDNet, ReXNet, ShuffleNetV2, TimmBackbone

__all__ = ['ROWS', 'run']

RDNET = dict(stem=32, growth=(32, 32, 64, 64), down=(1, 2, 3), blocks=1)
DENSENET = dict(growth_rate=32, layers=(2, 2, 2, 2))
FAMILIES: dict[str, Callable[..., nn.Module]] = {
    'rdnet': partial(RDNet, arch=RDNET),
    'densenet': partial(DenseNet, arch=DENSENET),
    'densenet-activated': partial(DenseNet, arch=DENSENET, tap='activated'),
    'rexnet': partial(ReXNet, arch='1.0'),
    'condensenetv2-learned': partial(CondenseNetV2, arch='a'),
    'condensenetv2-condensed': partial(CondenseNetV2, arch='a', form='condensed'),
    'shufflenetv2': partial(ShuffleNetV2, arch='0.5'),
    'timm': partial(TimmBackbone, model_name='mobilenetv2_050'),
}
NCHW, NHWC = torch.contiguous_format, torch.channels_last
FORMATS = dict(NCHW=NCHW, NHWC=NHWC)
# Precision of weights and of autocast, and the memory format.
TRAINING = (
    ('float32', None, 'NCHW'),
    ('bfloat16', None, 'NHWC'),
    ('float32', 'float16', 'NHWC'),
    ('float32', 'bfloat16', 'NCHW'),
    ('float32', 'bfloat16', 'NHWC'),
)
INFERENCE = (
    ('float32', None, 'NCHW'),
    ('float32', None, 'NHWC'),
    ('bfloat16', None, 'NHWC'),
    ('float16', None, 'NHWC'),
    ('float32', 'bfloat16', 'NHWC'),
)
SIZE = (2, 3, 128, 160)


def _image(dtype: str, layout: str) -> Tensor:
    image = torch.empty(SIZE, device='cuda', dtype=getattr(torch, dtype))
    return image.contiguous(memory_format=FORMATS[layout])


def _autocast(dtype: str | None) -> torch.autocast:
    kind = getattr(torch, dtype or 'bfloat16')
    return torch.autocast('cuda', kind, enabled=dtype is not None)


def train(
    build: Callable[[], nn.Module], dtype: str, amp: str | None, layout: str, mode: Any
) -> Record:
    """Record a training step; every parameter must get a gradient of its own type on the GPU."""
    net = build().to(getattr(torch, dtype), memory_format=FORMATS[layout])
    net = fake_cuda.to_fake(net, mode).train()
    with mode:
        image, record = _image(dtype, layout), Record()
        with record:
            with _autocast(amp):
                maps = net(image)
            sum(x.float().mean() for x in maps).backward()
    assert all(x.is_cuda for x in [*maps, *net.buffers()])
    for name, parameter in net.named_parameters():
        grad = parameter.grad
        if parameter.requires_grad:
            assert grad is not None, f'{name} got no gradient'
            assert grad.is_cuda, name
            assert grad.dtype == parameter.dtype, name
    return record


def infer(
    build: Callable[[], nn.Module], dtype: str, amp: str | None, layout: str, mode: Any
) -> Record:
    """Record inference in the deployed form."""
    net = build().eval()
    if getattr(net, 'form', None) == 'learned':
        net.prune_to(1.0)
    net.switch_to_deploy()
    net = fake_cuda.to_fake(net.to(getattr(torch, dtype)), mode)
    with mode, torch.no_grad():
        image, record = _image(dtype, layout), Record()
        with record, _autocast(amp):
            maps = net(image)
    assert all(x.is_cuda for x in maps)
    return record


def operate(operator: Callable[..., Tensor], shapes: tuple, mode: Any) -> Record:
    """Record an operator of mmcv, forward and backward."""
    with mode:
        inputs = [torch.empty(s, device='cuda', requires_grad=True) for s in shapes]
        record = Record()
        with record:
            operator(*inputs).sum().backward()
    assert all(x.grad is not None and x.grad.is_cuda for x in inputs)
    return record


def _roi_align(maps: Tensor) -> Tensor:
    from mmcv import ops  # after mmdense, which provides its operators

    rois = torch.empty(9, 5, device='cuda')
    return ops.roi_align(maps, rois, 7, 0.25, 0, 'avg', True)


def _focal(logits: Tensor) -> Tensor:
    from mmcv import ops

    target = torch.empty(len(logits), dtype=torch.long, device='cuda')
    return ops.sigmoid_focal_loss(logits, target)


def _deform(x: Tensor, offset: Tensor, mask: Tensor, weight: Tensor) -> Tensor:
    from mmcv import ops

    return ops.modulated_deform_conv2d(x, offset, mask, weight, None, 1, 1)


def _synchronized(build: Callable[[], nn.Module]) -> nn.Module:
    return nn.SyncBatchNorm.convert_sync_batchnorm(build())


def _rows() -> dict[str, Callable[..., Record]]:
    rows: dict[str, Callable[..., Record]] = {}
    for family, make in FAMILIES.items():
        modes = make.func.memory_modes
        for memory in modes:
            build = partial(make, memory=memory)
            for dtype, amp, layout in TRAINING:
                title = f'amp {amp}' if amp else dtype
                rows[f'{family} {memory} {title} {layout}'] = partial(
                    train, build, dtype, amp, layout
                )
            for option in (dict(frozen_stages=2), dict(norm_eval=True)):
                if memory != 'plain':
                    rows[f'{family} {memory} {next(iter(option))}'] = partial(
                        train, partial(build, **option), 'float32', 'bfloat16', 'NHWC'
                    )
            if family not in ('rdnet', 'timm'):  # no batch norm; timm's own conversion
                rows[f'{family} {memory} SyncBN'] = partial(
                    train, partial(_synchronized, build), 'float32', 'bfloat16', 'NHWC'
                )
        if hasattr(make.func, 'switch_to_deploy'):
            for dtype, amp, layout in INFERENCE:
                title = f'amp {amp}' if amp else dtype
                rows[f'{family} deployed {title} {layout}'] = partial(
                    infer, make, dtype, amp, layout
                )
    fixed = partial(DenseNet, arch=DENSENET, memory='lean', norm_cfg=dict(type='BN', affine=False))
    rows['densenet lean affine=False'] = partial(train, fixed, 'float32', 'bfloat16', 'NHWC')
    rows['operator roi_align'] = partial(operate, _roi_align, ((2, 8, 40, 50),))
    rows['operator sigmoid_focal_loss'] = partial(operate, _focal, ((99, 80),))
    rows['operator modulated_deform_conv2d'] = partial(
        operate, _deform, ((1, 4, 5, 5), (1, 18, 5, 5), (1, 9, 5, 5), (2, 4, 3, 3))
    )
    return rows


ROWS = _rows()


def run(name: str, mode: Any) -> dict[str, Any]:
    """Run a row, and return what it would do on a GPU, or its error."""
    torch.manual_seed(0)
    try:
        record = ROWS[name](mode)
    except Exception as error:  # a row that fails is a result
        places = traceback.extract_tb(error.__traceback__)
        place = next((f for f in reversed(places) if '/mmdense/' in f.filename), places[-1])
        return dict(error=f'{type(error).__name__} at {place.filename}:{place.lineno}: {error}')
    return dict(
        error='',
        kernels=record.kernels,
        bytes=record.bytes,
        waits=sorted({f'{name} at {place}' for name, place in record.waits}),
        on_cpu=sorted({f'{name} at {place}' for name, place in record.on_cpu}),
        moves=sorted({f'{name} at {place}' for name, _, place in record.moves}),
    )


def main() -> None:
    mode = fake_cuda.start()
    warnings.simplefilter('ignore')
    import torch.distributed as dist
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group('fake', rank=0, world_size=PROCESSES, store=FakeStore())
    for name in ROWS:
        if all(word in name.split() for word in sys.argv[1:]):
            sys.stdout.write(json.dumps({'row': name, **run(name, mode)}) + '\n')
            sys.stdout.flush()


if __name__ == '__main__':
    main()
