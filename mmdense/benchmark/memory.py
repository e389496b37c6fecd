"""How much memory training takes in each memory mode of a config's backbone, and what fits a GPU.

A training step is run at two batch sizes; memory is taken as a fixed part and a part for each
image. Of small images it is run at larger ones, until activations make the peak. N images, H x W
pixels; GB are 2 ** 30 bytes, as on a card's label.
"""

from __future__ import annotations

import copy
import gc
import json
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import BaseDataElement, InstanceData, PixelData
from torch import nn
from torch.profiler import ProfilerActivity, profile

from mmdense.config.edit import use_amp
from mmdense.errors import UserError

__all__ = [
    'AS_IT_IS',
    'GB',
    'ModeCost',
    'batch_size',
    'best',
    'build_training',
    'peak_bytes',
    'plan',
    'random_batch',
    'settings',
    'tensor_bytes',
    'training_step',
    'usable',
]

GB = 2**30
AS_IT_IS = 'as it is'
FRAGMENTS, CONTEXT = 0.1, 0.6 * GB  # what a card cannot give: a share of it, and the CUDA context
OBJECTS = 16  # to an image

NOISE = 1.1  # of the times of single steps
SLACK, MOST = 0.05, 16  # how far bytes for an image may be off; how many images show it
STEPS = dict(cpu=1, cuda=3)  # on a GPU the first one prepares the libraries; the last one is timed


@dataclass(frozen=True)
class ModeCost:
    """What a training step takes in one memory mode.

    Attributes:
        mode: The backbone's ``memory``, or ``AS_IT_IS`` of a backbone that has no modes.
        smallest: The smallest batch that can be trained: some norms need two images.
        ran: The largest batch that was run; 0 if this machine's GPU had too little memory for any.
        fixed: Bytes whatever the batch: weights, gradients, the optimizer's states. None if there
            was too little memory for a second batch.
        per_image: Bytes for each image, or None.
        update: Bytes while the optimizer updates the weights.
        seconds: A step's, for each image, without the update; infinite if none was run.
    """

    mode: str
    smallest: int
    ran: int
    fixed: int | None
    per_image: int | None
    update: int
    seconds: float

    def largest(self, gpu_bytes: float) -> int:
        """Return the largest batch that fits a GPU of so much memory; 0 if none does."""
        if self.per_image is None:
            return self.ran
        largest = int((usable(gpu_bytes) - self.fixed) // self.per_image)
        fits = largest >= self.smallest and self.update <= usable(gpu_bytes)
        return largest if fits else 0


def plan(
    cfg: Config,
    *,
    size: tuple[int, int],
    modes: Sequence[str] | None = None,
    device: str = 'cpu',
    progress: Callable[[str], None] = lambda text: None,
) -> list[ModeCost]:
    """Return what training takes in each memory mode of the config's backbone.

    On a GPU the bytes are those of torch's allocator. On a CPU they are those of the tensors, which
    leaves out what a GPU's libraries work in. Weights are random and so are images and labels;
    moving averages of the weights, and the buckets of distributed training, are not in it.

    Args:
        cfg: Of a detector or segmentor; left alone.
        size: Height and width of the images in pixels.
        modes: Of the backbone's ``memory_modes``; all by default.
        device: 'cpu' or 'cuda'.
        progress: Is told what goes on.

    Raises:
        UserError: No backbone, or one without such a mode.
    """
    if 'backbone' not in cfg.model:
        raise UserError(f'{cfg.model.type} has no backbone in its config to plan for')
    if not cfg.get('optim_wrapper'):
        raise UserError(f'{cfg.filename} has no optim_wrapper to train with')
    name = cfg.model.backbone.type
    with MODELS.switch_scope_and_registry(cfg.get('default_scope')) as registry:
        known = getattr(registry.get(name), 'memory_modes', ())
    for mode in modes or ():
        if mode not in known:
            raise UserError(f'{name} has no memory mode {mode!r} (it has: {[*known]})')
    costs = []
    for mode in modes or known or (AS_IT_IS,):
        own = _prepared(cfg, mode if known else None, size, device)
        costs.append(_cost(own, mode, size, device, progress))
    return costs


def usable(gpu_bytes: float) -> float:
    """Return what training can have of a GPU's memory, in bytes."""
    return max(0.0, gpu_bytes * (1 - FRAGMENTS) - CONTEXT)


def best(costs: Sequence[ModeCost], gpu_bytes: float, batch: int) -> ModeCost | None:
    """Return the fastest mode that fits a batch, else the one of the largest; None if none fits.

    Of those that are about as fast it is the first: that which recomputes least.
    """
    fitting = [cost for cost in costs if cost.largest(gpu_bytes) >= batch]
    if fitting:
        least = min(cost.seconds for cost in fitting)
        return next(cost for cost in fitting if cost.seconds <= NOISE * least)
    most = max(costs, key=lambda cost: cost.largest(gpu_bytes))
    return most if most.largest(gpu_bytes) else None


def batch_size(cfg: Config) -> int:
    """Return the config's own number of training images per GPU."""
    return (cfg.get('train_dataloader') or {}).get('batch_size', 1)


def settings(cfg: Config, mode: str, batch: int) -> list[str]:
    """Return what to change in a config, as KEY=VALUE, to train in a mode with a batch."""
    backbone, changes = cfg.model.backbone, []
    own = 'recompute' if backbone.get('with_cp') else backbone.get('memory', 'plain')
    if mode not in (own, AS_IT_IS):
        changes.append(f'model.backbone.memory={mode}')
        if backbone.get('with_cp'):
            changes.append('model.backbone.with_cp=False')
    if batch != batch_size(cfg):
        changes.append(f'train_dataloader.batch_size={batch}')
    return changes


def _prepared(cfg: Config, mode: str | None, size: tuple[int, int], device: str) -> Config:
    """Return the config of a mode, with settings that run on the device."""
    cfg = copy.deepcopy(cfg)
    if mode:
        cfg.model.backbone.pop('with_cp', None)
        cfg.model.backbone.memory = mode
    preprocessor = cfg.model.get('data_preprocessor', {})
    if 'size' in preprocessor:  # mmseg's pads images to it
        preprocessor.size = size
    if device == 'cpu' and cfg.optim_wrapper.get('type') == 'AmpOptimWrapper':
        use_amp(cfg, 'bfloat16')  # mmengine's wants a GPU; its float16 takes the same bytes
    return cfg


def _cost(
    cfg: Config,
    mode: str,
    size: tuple[int, int],
    device: str,
    progress: Callable[[str], None],
) -> ModeCost:
    progress(f'{mode}: building the model')
    model, wrapper = build_training(cfg, device)
    held = tensor_bytes(chain(model.parameters(), model.buffers()))
    update = held + peak_bytes(lambda: _make_states(model, wrapper), device)
    held += tensor_bytes(x for state in wrapper.optimizer.state.values() for x in state.values())
    gradients = tensor_bytes(p for p in model.parameters() if p.requires_grad)
    smallest, batches, peaks, seconds = 1, [1, 2], {}, inf
    while batches:
        batch = batches.pop(0)
        progress(f'{mode}: a step with a batch of {batch}, {size[0]} x {size[1]}')
        times: list[float] = []
        step = partial(_train, cfg, model, wrapper, batch, size, times)
        try:
            peaks[batch] = held + peak_bytes(step, device)
        except torch.cuda.OutOfMemoryError:
            break
        except AttributeError as error:
            if not isinstance(error.obj, BaseDataElement):
                raise
            raise UserError(
                f'{type(model).__name__} learns from {error.name.strip("_")}, which random images '
                'come without here: the log of a training on a GPU tells its memory'
            ) from error
        except ValueError as error:
            if 'needs at least' in str(error):  # too small an image
                raise UserError(str(error)) from error
            if batch > 1 or 'more than 1 value per channel' not in str(error):
                raise
            smallest, batches = 2, [2, 3]  # a batch norm of one value for each image, as in UperNet
            continue
        if len(peaks) <= 2:
            seconds = min(seconds, times[-1] / batch)
        if len(peaks) >= 2:
            fixed, per_image = _line(peaks)
            # Activations aside a step holds gradients, and copies of weights of half the size under
            # AMP. Where more is fixed, the copy of a gradient, say, makes the peak, until a larger
            # batch leaves it behind.
            excess = fixed - held - 1.5 * gradients
            if excess > SLACK * batch * per_image and batch < MOST:
                batches.append(2 * batch)
    if len(peaks) < 2:
        return ModeCost(mode, smallest, max(peaks, default=0), None, None, update, seconds)
    return ModeCost(mode, smallest, max(peaks), *_line(peaks), update, seconds)


def _line(peaks: dict[int, int]) -> tuple[int, int]:
    """Return the fixed bytes, and those for each image, by the two largest batches."""
    first, last = sorted(peaks)[-2:]
    per_image = max(1, (peaks[last] - peaks[first]) // (last - first))
    return peaks[last] - last * per_image, per_image


def build_training(cfg: Config, device: str) -> tuple[nn.Module, OptimWrapper]:
    """Return a config's model with random weights, ready to be trained, and what updates it."""
    torch.manual_seed(0)
    with DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
        model = MODELS.build(cfg.model)
        if device == 'cpu':
            model = revert_sync_batchnorm(model)
        model = model.to(device).train()
        return model, build_optim_wrapper(model, cfg.optim_wrapper)


def tensor_bytes(values: Iterable[Any]) -> int:
    """Return the bytes of all tensors among some values."""
    return sum(x.numel() * x.element_size() for x in values if torch.is_tensor(x))


def _make_states(model: nn.Module, wrapper: OptimWrapper) -> None:
    """Update once: the optimizer makes its states in its first step."""
    _make_gradients(model)
    wrapper.optimizer.step()
    wrapper.zero_grad()


def _make_gradients(model: nn.Module) -> None:
    """Give each parameter a gradient of zero."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)


def _train(
    cfg: Config,
    model: nn.Module,
    wrapper: OptimWrapper,
    batch: int,
    size: tuple[int, int],
    times: list[float],
) -> None:
    """Run steps without their update, as :func:`_make_states` makes one, and append seconds."""
    device = next(model.parameters()).device.type
    for _ in range(STEPS[device]):
        data = random_batch(model, batch, size, segments=cfg.get('default_scope') == 'mmseg')
        # They come while activations go: only if all are there is a peak linear in the batch.
        _make_gradients(model)
        begin = time.perf_counter()
        training_step(model, wrapper, data)
        wrapper.zero_grad()
        if device == 'cuda':
            torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)


def training_step(model: nn.Module, wrapper: OptimWrapper, data: dict[str, list]) -> None:
    """Run forward and backward, without the update."""
    with wrapper.optim_context(model):
        losses = model(**model.data_preprocessor(data, training=True), mode='loss')
    wrapper.backward(model.parse_losses(losses)[0])


def random_batch(
    model: nn.Module, batch: int, size: tuple[int, int], segments: bool
) -> dict[str, list]:
    """Return random images with boxes, masks and label maps of objects, or label and depth maps."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmseg.structures import SegDataSample

    metas = dict(img_shape=size, ori_shape=size, pad_shape=size, scale_factor=(1.0, 1.0))
    samples = []
    for _ in range(batch):
        if segments:
            sample = SegDataSample(metainfo=metas)
            sample.gt_sem_seg = PixelData(data=torch.randint(2, (1, *size)))
            sample.gt_depth_map = PixelData(data=10 * torch.rand(1, *size))
        else:
            sample = DetDataSample(metainfo=metas)
            extents = torch.tensor(size[::-1]) * (1 + 7 * torch.rand(OBJECTS, 2)) / 16
            corners = (torch.tensor(size[::-1]) - extents) * torch.rand(OBJECTS, 2)
            boxes, labels = torch.cat((corners, corners + extents), 1), torch.zeros(OBJECTS).long()
            sample.gt_instances = InstanceData(bboxes=boxes, labels=labels)
            # What its preprocessor pads, a model reads.
            pads = model.data_preprocessor
            if getattr(model, 'with_mask', False) or getattr(pads, 'pad_mask', False):
                masks = BitmapMasks(np.ones((OBJECTS, *size), np.uint8), *size)
                sample.gt_instances.masks = masks
            if getattr(pads, 'pad_seg', False):
                labels = torch.randint(2, (1, *size), dtype=torch.uint8)
                sample.gt_sem_seg = PixelData(sem_seg=labels)
            sample.ignored_instances = sample.gt_instances[:0]
        samples.append(sample)
    images = [torch.randint(256, (3, *size), dtype=torch.uint8) for _ in range(batch)]
    return dict(inputs=images, data_samples=samples)


def peak_bytes(run: Callable[[], object], device: str = 'cpu') -> int:
    """Return how many bytes of tensors more than before there are at the peak of ``run()``.

    On a GPU by the counters of torch's allocator; on a CPU by the profiler's record of what the
    allocator hands out and gets back.
    """
    gc.collect()  # else what is left of an earlier run may go while this one is measured
    if device == 'cuda':
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, 'trace.json')
        record.export_chrome_trace(str(file))
        events = json.loads(file.read_bytes())['traceEvents']
    memory = [event for event in events if event['name'] == '[memory]']  # of CPU tensors alone
    memory = [event['args'] for event in sorted(memory, key=lambda event: event['ts'])]
    totals = [args['Total Allocated'] for args in memory]
    if not totals:
        return 0
    # The total goes on from one profile to the next, by what is still there of it.
    before = totals[0] - memory[0]['Bytes']
    return max(before, *totals) - before
