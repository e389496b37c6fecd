"""Memory of a training step in each memory mode of a config's backbone, and the batch that fits.

A step is run with two batch sizes, which give a fixed part and a part per image. Small images are
also run in larger batches, until activations determine the peak. GB are 2 ** 30 bytes, as on a
GPU's label.
"""

import copy
import gc
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from math import inf
from typing import Any

import numpy as np
import torch
from mmengine.config import Config
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import OptimWrapper, build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from mmengine.structures import InstanceData, PixelData
from torch import nn
from torch.profiler import ProfilerActivity, profile

from mmdense.config.edit import use_amp
from mmdense.errors import UserError

GB = 2**30
NO_MODES = 'as it is'  # the mode of a backbone without memory modes
FRAGMENTATION, CONTEXT = 0.1, 0.6 * GB  # a share of the GPU's memory, and the CUDA context
OBJECTS = 16  # per image

NOISE = 1.1  # of the times of single steps
TOLERANCE, MAX_BATCH = 0.05, 16  # of the bytes per image; the largest batch that is run
WARM_UP = dict(cpu=0, cuda=2)  # steps in which a GPU's libraries load kernels and take workspaces


@dataclass(frozen=True)
class ModeCost:
    """Memory and time of a training step in one memory mode."""

    mode: str  # the backbone's ``memory``, or NO_MODES
    smallest: int  # batch that can be trained: some norms need two images
    ran: int  # the largest batch that was run; 0 if this GPU had too little memory for any
    fixed: int | None  # bytes of weights, gradients and optimizer states; None if one batch fitted
    per_image: int | None  # bytes, or None
    seconds: float  # per image, without the update; infinite if none was run

    def largest(self, gpu_bytes: float) -> int:
        """Return the largest batch that fits a GPU with this memory; 0 if none does."""
        if self.per_image is None:
            return self.ran
        largest = int((usable(gpu_bytes) - self.fixed) // self.per_image)
        return largest if largest >= self.smallest else 0


def plan(
    cfg: Config,
    *,
    size: tuple[int, int],
    modes: Sequence[str] | None = None,
    device: str = 'cpu',
    progress: Callable[[str], None] = lambda text: None,
) -> list[ModeCost]:
    """Return the costs of training in each memory mode of the config's backbone.

    Weights, images and labels are random. On a GPU the bytes are those of torch's allocator. On a
    CPU they are an estimate from the sizes of tensors, without the workspaces of a GPU's libraries.
    Neither includes moving averages of weights or the buckets of distributed training.

    The config is not changed. Height and width are in pixels; ``modes`` are some of the backbone's
    ``memory_modes``. UserError if the model has no backbone or no such mode, or the config no
    optimizer.
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
    return [
        _measure(_with_mode(cfg, mode, size, device), mode, size, progress)
        for mode in modes or known or (NO_MODES,)
    ]


def usable(gpu_bytes: float) -> float:
    """Return the bytes of a GPU's memory that training can use."""
    return max(0.0, gpu_bytes * (1 - FRAGMENTATION) - CONTEXT)


def best_mode(costs: Sequence[ModeCost], gpu_bytes: float, batch: int) -> ModeCost | None:
    """Return the fastest mode that fits a batch, or else the one that fits the largest batch.

    Of modes that are about as fast it is the first, which recomputes least. None if nothing fits.
    """
    fitting = [cost for cost in costs if cost.largest(gpu_bytes) >= batch]
    if fitting:
        least = min(cost.seconds for cost in fitting)
        return next(cost for cost in fitting if cost.seconds <= NOISE * least)
    largest = max(costs, key=lambda cost: cost.largest(gpu_bytes))
    return largest if largest.largest(gpu_bytes) else None


def config_changes(cfg: Config, mode: str, batch: int) -> list[str]:
    """Return the settings, as KEY=VALUE, that make a config train in a mode with a batch."""
    backbone, changes = cfg.model.backbone, []
    current = 'recompute' if backbone.get('with_cp') else backbone.get('memory', 'plain')
    if mode not in (current, NO_MODES):
        changes.append(f'model.backbone.memory={mode}')
        if backbone.get('with_cp'):
            changes.append('model.backbone.with_cp=False')
    if batch != (cfg.get('train_dataloader') or {}).get('batch_size', 1):
        changes.append(f'train_dataloader.batch_size={batch}')
    return changes


def _with_mode(cfg: Config, mode: str, size: tuple[int, int], device: str) -> Config:
    """Return a copy of the config with the mode, and with settings that run on the device."""
    cfg = copy.deepcopy(cfg)
    cfg.device = device
    if mode != NO_MODES:
        cfg.model.backbone.pop('with_cp', None)
        cfg.model.backbone.memory = mode
    preprocessor = cfg.model.get('data_preprocessor', {})
    if 'size' in preprocessor:  # mmseg's pads images to it
        preprocessor.size = size
    if device == 'cpu' and cfg.optim_wrapper.get('type') == 'AmpOptimWrapper':
        use_amp(cfg, 'bfloat16')  # mmengine's wrapper needs a GPU; float16 takes the same bytes
    return cfg


def _measure(
    cfg: Config, mode: str, size: tuple[int, int], progress: Callable[[str], None]
) -> ModeCost:
    progress(f'{mode}: building the model')
    model, wrapper = build_training(cfg, cfg.device)
    _zero_gradients(model)
    wrapper.optimizer.step()  # creates the optimizer's states
    wrapper.zero_grad()
    states = wrapper.optimizer.state.values()
    resident = tensor_bytes((*model.parameters(), *model.buffers()))
    resident += tensor_bytes(value for state in states for value in state.values())
    gradients = tensor_bytes(p for p in model.parameters() if p.requires_grad)

    def train(batch: int, times: list[float]) -> None:
        """Run a step without its update and append its seconds."""
        data = random_batch(batch, size, scope=cfg.get('default_scope'))
        # A backward pass creates gradients while it frees activations. With all gradients there
        # from the beginning, the peak is linear in the batch.
        _zero_gradients(model)
        drain(cfg.device)
        begin = time.perf_counter()
        training_step(model, wrapper, data)
        wrapper.zero_grad()
        drain(cfg.device)
        times.append(time.perf_counter() - begin)

    batches, peaks, seconds = [1, 2], {}, inf
    smallest, fixed, per_image = 1, None, None
    while batches:
        batch = batches.pop(0)
        progress(f'{mode}: a step with a batch of {batch}, {size[0]} x {size[1]}')
        times: list[float] = []
        try:
            for _ in range(WARM_UP[cfg.device]):
                train(batch, [])
            peaks[batch] = resident + peak_bytes(partial(train, batch, times), cfg.device)
        except torch.cuda.OutOfMemoryError:
            break
        except ValueError as error:
            if 'needs at least' in str(error):  # too small an image
                raise UserError(str(error)) from error
            if batch > 1 or 'more than 1 value per channel' not in str(error):
                raise
            smallest, batches = 2, [2, 3]  # a batch norm of one value per image, as in UPerNet
            continue
        if len(peaks) <= 2:
            seconds = min(seconds, times[-1] / batch)
        if len(peaks) >= 2:
            first, last = sorted(peaks)[-2:]
            per_image = max(1, (peaks[last] - peaks[first]) // (last - first))
            fixed = peaks[last] - last * per_image
            # Besides activations a step needs gradients, and under AMP copies of the weights of
            # half their size. If the fixed part is larger, activations don't determine the peak
            # yet (a copy of a gradient may): a larger batch shows their bytes.
            excess = fixed - resident - 1.5 * gradients
            if excess > TOLERANCE * batch * per_image and batch < MAX_BATCH:
                batches.append(2 * batch)
    return ModeCost(mode, smallest, max(peaks, default=0), fixed, per_image, seconds)


def build_training(cfg: Config, device: str) -> tuple[nn.Module, OptimWrapper]:
    """Return a config's model in training mode, with random weights, and its optimizer wrapper."""
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


def _zero_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)


def training_step(model: nn.Module, wrapper: OptimWrapper, data: dict[str, list]) -> None:
    """Run forward and backward, without the update."""
    with wrapper.optim_context(model):
        losses = model(**model.data_preprocessor(data, training=True), mode='loss')
    wrapper.backward(model.parse_losses(losses)[0])


def random_batch(batch: int, size: tuple[int, int], *, scope: str | None) -> dict[str, list]:
    """Return random images with what models of mmseg, of mmpretrain or, by default, mmdet learn."""
    from mmdet.structures import DetDataSample
    from mmdet.structures.mask import BitmapMasks
    from mmseg.structures import SegDataSample

    meta = dict(img_shape=size, ori_shape=size, pad_shape=size, scale_factor=(1.0, 1.0))
    samples = []
    for _ in range(batch):
        labels = torch.randint(2, (1, *size), dtype=torch.uint8)
        if scope == 'mmpretrain':
            from mmpretrain.structures import DataSample

            sample = DataSample(metainfo=meta).set_gt_label(0)
        elif scope == 'mmseg':
            sample = SegDataSample(metainfo=meta)
            sample.gt_sem_seg = PixelData(data=labels.long())
            sample.gt_depth_map = PixelData(data=10 * torch.rand(1, *size))
        else:
            sample = DetDataSample(metainfo=meta)
            sides = torch.tensor(size[::-1]) * (1 + 7 * torch.rand(OBJECTS, 2)) / 16
            corners = (torch.tensor(size[::-1]) - sides) * torch.rand(OBJECTS, 2)
            sample.gt_instances = InstanceData(
                bboxes=torch.cat((corners, corners + sides), 1),
                labels=torch.zeros(OBJECTS).long(),
                masks=BitmapMasks(np.ones((OBJECTS, *size), np.uint8), *size),
            )
            sample.gt_sem_seg = PixelData(sem_seg=labels)
            sample.ignored_instances = sample.gt_instances[:0]
        samples.append(sample)
    images = [torch.randint(256, (3, *size), dtype=torch.uint8) for _ in range(batch)]
    return dict(inputs=images, data_samples=samples)


def drain(device: str) -> None:
    """Wait until a GPU has done all that was queued, for measuring; a CPU queues nothing."""
    if device != 'cpu':
        torch.cuda.synchronize()


def peak_bytes(run: Callable[[], object], device: str = 'cpu') -> int:
    """Return the bytes of tensors at the peak of ``run()``, above those that exist before.

    On a GPU they are the counters of torch's allocator, for a run that follows another one: in the
    first, libraries allocate workspaces, which they keep. On a CPU they are the profiler's record
    of what the allocator gives out and takes back.
    """
    gc.collect()  # remains of an earlier run could be freed while this one is measured
    if device != 'cpu':
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    events = record.profiler.kineto_results.events()  # in the order of time
    changes = (event.nbytes() for event in events if event.name() == '[memory]')
    return max(accumulate(changes, initial=0))
