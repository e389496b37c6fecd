"""Times and memory of several models in interleaved rounds, and the costs of complete models.

Interleaving spreads whatever else the machine does over all models. Each timed run follows an
untimed one of the same model.
"""

import copy
import datetime
import os
import platform
import random
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from mmengine.config import Config
from torch import nn

from mmdense.benchmark.memory import (
    build_training,
    drain,
    peak_bytes,
    random_batch,
    tensor_bytes,
    training_step,
)
from mmdense.config.channels import build_part, remove_weights
from mmdense.config.edit import drop_amp
from mmdense.config.image_size import training_size
from mmdense.errors import one_line
from mmdense.flops import model_costs
from mmdense.models.deploy import deploy
from mmdense.models.deploy.fold import fold_batch_norms

Progress = Callable[[str], None]
FORMS = ('deployed', 'trained')  # of backbones in inference
# The type of autocast in inference, and but for 'amp' of the weights as well.
PRECISIONS = dict(fp32=None, amp=torch.float16, bf16=torch.bfloat16, fp16=torch.float16)


@dataclass(frozen=True)
class Conditions:
    """How models are measured; all but device and rounds are about inference."""

    device: str = 'cpu'  # or 'cuda'
    rounds: int = 20  # timed runs of each
    forms: Sequence[str] = FORMS
    batch: int = 8  # images at once for the throughput; latency and memory are those of one
    precision: str = 'fp32'  # a key of PRECISIONS; training steps have that of their config
    compiled: bool = False  # the backbones, by torch.compile
    channels_last: bool | None = None  # weights of the trained form; None as in training
    onnx: bool = False  # exported files too, in the rounds of the deployed form

    def prepare(self, model: nn.Module, form: str) -> None:
        """Convert and compile a model in one of the forms, in place."""
        if self.precision != 'amp':
            model.to(PRECISIONS[self.precision])
        if self.channels_last and form == 'trained':
            model.to(memory_format=torch.channels_last)
        if self.compiled and form != 'onnx':
            model.backbone.compile()

    def record(self, form: str) -> dict[str, Any]:
        """Return what a row records of the conditions."""
        if form == 'onnx':
            return dict(batch=self.batch, precision='fp32', compiled=False, memory=None)
        layout = ('contiguous', 'channels_last')[bool(self.channels_last)]
        return dict(
            batch=self.batch,
            precision=self.precision,
            compiled=self.compiled,
            memory_format=layout if form == 'trained' else 'channels_last',
        )


MM = ('mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmdense')  # whose versions are recorded


@dataclass(frozen=True)
class Run:
    """A run of a model that can be timed."""

    model: nn.Module  # moved to the device for the run, and back to the CPU afterwards
    prepare: Callable[[int], Any]  # returns the input of a round, by its number
    run: Callable[[Any], Any]  # may change its input
    images: int  # in the input

    def __call__(self, number: int) -> Callable[[], Any]:
        """Return a function that runs on the input of a round."""
        return partial(self.run, self.prepare(number))


def inference_run(
    model: nn.Module, prepare: Callable[[int], dict], images: int = 1, precision: str = 'fp32'
) -> Run:
    """Return the inference of a detector or segmentor in evaluation mode, with post-processing.

    ``prepare`` returns a batch of so many images, by the number of the round.
    """
    dtype = PRECISIONS[precision]

    def unlabelled(number: int) -> dict[str, list]:
        batch = prepare(number)
        samples = [type(sample)(metainfo=sample.metainfo) for sample in batch['data_samples']]
        return dict(inputs=list(batch['inputs']), data_samples=samples)

    @torch.no_grad()
    def run(batch: dict[str, list]) -> Any:
        device = next((p.device.type for p in model.parameters()), 'cpu')  # files have none
        with torch.autocast(device, dtype, enabled=dtype is not None):
            return model.test_step(batch)

    return Run(model, unlabelled, run, images)


def deployed_copy(model: nn.Module, size: tuple[int, int]) -> nn.Module:
    """Return a copy of a model for inference, with its backbone in deployed form.

    Backbones without a deployed form, such as timm's, get their batch norms folded for images of
    this size, and channels-last weights.
    """
    model = copy.deepcopy(model).eval()
    net = model.backbone
    if hasattr(net, 'switch_to_deploy'):
        deploy(model)
    else:
        convs = (module for module in net.modules() if isinstance(module, nn.Conv2d))
        channels = next((conv.in_channels for conv in convs), 3)
        fold_batch_norms(net, torch.randn(1, channels, *size))
        net.to(memory_format=torch.channels_last)
    return model


def training_run(cfg: Config, batch: dict[str, list]) -> Run:
    """Return the training step of a config's model with random weights, without the update."""
    if not torch.cuda.is_available():
        cfg = copy.deepcopy(cfg)
        drop_amp(cfg)
    model, wrapper = build_training(cfg, 'cpu')
    step = partial(training_step, model, wrapper)
    return Run(model, lambda number: copy.deepcopy(batch), step, len(batch['inputs']))


def measure(
    runs: Mapping[str, Run],
    *,
    rounds: int,
    device: str,
    progress: Progress = lambda text: None,
) -> dict[str, dict[str, Any]]:
    """Return times and memory of each run, by name, after so many timed rounds.

    These are ``p50`` and ``p95`` (seconds), ``throughput`` (images per second, at the median),
    ``ratio`` (speed relative to the fastest: the median over the rounds), ``memory`` (bytes of
    weights and everything else, at the peak); or ``error``, one line. ``progress`` gets a
    description of each step.
    """
    results: dict[str, dict[str, Any]] = {}
    seconds: dict[str, list[float]] = {}
    one = torch.ones(1, 1, device=device)
    torch.mm(one, one)  # a GPU's library takes its workspace here, not in the first model's run
    for name, run in runs.items():
        progress(f'memory of {name}')
        try:
            before = torch.cuda.memory_allocated() if device != 'cpu' else 0
            run.model.to(device)
            if device == 'cpu':
                weights = tensor_bytes([*run.model.parameters(), *run.model.buffers()])
            else:  # with what the model caches
                run(0)()
                run.model.zero_grad(set_to_none=True)
                weights = torch.cuda.memory_allocated() - before
            results[name] = dict(memory=weights + peak_bytes(run(0), device))
            seconds[name] = []
        except Exception as error:  # from any library; the other models are still measured
            results[name] = dict(error=one_line(error))
        finally:
            _park(run, device)
    for number in range(rounds):
        progress(f'round {number + 1} of {rounds}')
        for name in random.sample(list(seconds), len(seconds)):
            run = runs[name]
            run.model.to(device)
            run(number)()
            seconds[name].append(seconds_of(run(number), device))
            _park(run, device)
    if rounds and seconds:
        fastest = min(seconds.values(), key=statistics.median)
        for name, times in seconds.items():
            median = statistics.median(times)
            results[name] |= dict(
                p50=median,
                p95=statistics.quantiles([*times, *times], n=20, method='inclusive')[-1],
                throughput=runs[name].images / median,
                ratio=statistics.median(a / b for a, b in zip(fastest, times, strict=True)),
            )
    return results


def _park(run: Run, device: str) -> None:
    """Make room on a GPU for the next model."""
    run.model.zero_grad(set_to_none=True)
    if device != 'cpu':
        run.model.to('cpu')


def measure_configs(
    cfgs: Mapping[str, Config],
    *,
    size: tuple[int, int] | None = None,
    batch: int = 2,
    rounds: int = 10,
    deployed: bool = False,
    device: str = 'cpu',
    progress: Progress = lambda text: None,
) -> list[dict[str, Any]]:
    """Return the costs of complete models with random weights on random images.

    For each config these are its ``config`` (name), ``size``, ``parts`` (name -> parameters, macs,
    activations), ``form`` ('deployed' or 'trained'), ``infer`` and ``train`` (as :func:`measure`
    returns them, or None); ``error`` if it failed.

    The configs are not changed. ``size`` is height and width of the images in pixels, by default
    each config's largest, ``batch`` is that of a training step; 0 ``rounds`` leave out times and
    memory; ``deployed`` runs inference with the backbones' deployed form, :func:`deployed_copy`.
    """
    rows: dict[str, dict[str, Any]] = {}
    infers, steps = {}, {}
    for name, cfg in cfgs.items():
        progress(f'building {name}')
        row = rows[name] = dict(config=name, size=size, parts={}, infer=None, train=None)
        row['form'] = 'deployed' if deployed else 'trained'
        try:
            row['size'] = shape = size or training_size(cfg)
            model = build_part(cfg.model, cfg.get('default_scope')).to('meta').eval()
            row['parts'] = {part: asdict(c) for part, c in model_costs(model, shape).items()}
            if not rounds:
                continue
            cfg = copy.deepcopy(cfg)
            remove_weights(cfg.model)
            if 'size' in cfg.model.get('data_preprocessor', {}):  # mmseg's pads images to it
                cfg.model.data_preprocessor.size = shape
            data = random_batch(batch, shape, scope=cfg.get('default_scope'))
            steps[name] = training_run(cfg, data)
            steps[name].model.init_weights()  # heads expect few objects
            model = steps[name].model
            model = deployed_copy(model, shape) if deployed else copy.deepcopy(model).eval()
            one = {key: values[:1] for key, values in data.items()}
            infers[name] = inference_run(model, lambda number, one=one: one)
        except Exception as error:  # from any library; the other models are still measured
            row['error'] = one_line(error)
    for kind, runs in dict(infer=infers, train=steps).items():
        for name, figures in measure(runs, rounds=rounds, device=device, progress=progress).items():
            if 'error' in figures:
                rows[name]['error'] = figures['error']
            else:
                rows[name][kind] = figures
    return list(rows.values())


def seconds_of(run: Callable[[], Any], device: str) -> float:
    """Return the latency of a run in seconds: on a GPU from an empty queue until all is done."""
    drain(device)
    begin = time.perf_counter()
    run()
    drain(device)
    return time.perf_counter() - begin


def machine(device: str = 'cpu') -> dict[str, Any]:
    """Return date, hardware and versions, for the record of a measurement."""
    if device == 'cuda':
        hardware = torch.cuda.get_device_name()
    else:
        info = Path('/proc/cpuinfo')
        model = info.is_file() and re.search(r'^model name\s*: *(.*)', info.read_text(), re.M)
        cpu = model[1].strip() if model else platform.processor() or platform.machine()
        hardware = f'{cpu}, {torch.get_num_threads()} threads'
    return dict(
        date=datetime.date.today().isoformat(),
        device=hardware,
        versions=dict(
            python=platform.python_version(),
            torch=torch.__version__,
            torchvision=torchvision.__version__,
            timm=timm.__version__,
            **{name: sys.modules[name].__version__ for name in MM if name in sys.modules},
        ),
        omp_wait_policy=os.environ.get('OMP_WAIT_POLICY', 'unset'),
    )
