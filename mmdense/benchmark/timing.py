"""Costs of whole models; times and memory of several models' runs, in interleaved rounds.

What the machine does meanwhile falls on all of them, and each run follows one of the same kind that
is not timed.
"""

from __future__ import annotations

import copy
import datetime
import os
import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping
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
    peak_bytes,
    random_batch,
    tensor_bytes,
    training_step,
)
from mmdense.config.channels import build_part, without_weights
from mmdense.config.edit import drop_amp
from mmdense.config.image_size import training_size
from mmdense.errors import one_line
from mmdense.flops import model_costs
from mmdense.models.deploy import deploy

__all__ = ['Run', 'inference', 'machine', 'measure', 'measure_configs', 'timed', 'training']


@dataclass(frozen=True)
class Run:
    """What is timed.

    Attributes:
        model: What has to be on the device; elsewhere it stays on the CPU.
        prepare: Gets the number of the round; returns what a run takes, which the run may change.
        run: A run of it.
        images: Number of images in one.
    """

    model: nn.Module
    prepare: Callable[[int], Any]
    run: Callable[[Any], Any]
    images: int


def measure(
    runs: Mapping[str, Run],
    *,
    rounds: int,
    device: str,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, dict[str, Any]]:
    """Return for each run what it takes.

    Args:
        runs: By their names.
        rounds: Timed runs of each.
        device: 'cpu' or 'cuda'.
        progress: Is told what goes on.

    Returns:
        For each its ``p50`` and ``p95`` (seconds), ``throughput`` (images per second, at the
        median), ``ratio`` (the median over the rounds of the fastest one's time over its own),
        ``memory`` (bytes of weights and all else, at the peak); or ``error``, one line.
    """
    found: dict[str, dict[str, Any]] = {}
    seconds: dict[str, list[float]] = {}
    for name, run in runs.items():
        progress(f'memory of {name}')
        try:
            run.model.to(device)
            if device != 'cpu':  # what libraries allocate once and keep is nobody's
                run.run(run.prepare(0))
                run.model.zero_grad(set_to_none=True)
            data = run.prepare(0)
            held = tensor_bytes([*run.model.parameters(), *run.model.buffers()])
            memory = held + peak_bytes(lambda run=run, data=data: run.run(data), device)
        except Exception as error:  # of whatever library: it costs the others nothing
            found[name] = dict(error=one_line(error))
            continue
        finally:
            _park(run, device)
        found[name] = dict(memory=memory)
        seconds[name] = []
    for number in range(rounds):
        progress(f'round {number + 1} of {rounds}')
        for name in random.sample(list(seconds), len(seconds)):
            run = runs[name]
            run.model.to(device)
            run.run(run.prepare(number))
            data = run.prepare(number)
            seconds[name].append(timed(lambda run=run, data=data: run.run(data), device))
            _park(run, device)
    if rounds and seconds:
        fastest = min(seconds, key=lambda name: statistics.median(seconds[name]))
        for name, times in seconds.items():
            median = statistics.median(times)
            ratios = [a / b for a, b in zip(seconds[fastest], times, strict=True)]
            found[name] |= dict(
                p50=median,
                p95=statistics.quantiles([*times, *times], n=20, method='inclusive')[-1],
                throughput=runs[name].images / median,
                ratio=statistics.median(ratios),
            )
    return found


def _park(run: Run, device: str) -> None:
    """Make room on a GPU for the next model."""
    run.model.zero_grad(set_to_none=True)
    if device != 'cpu':
        run.model.to('cpu')


def inference(model: nn.Module, data: Callable[[int], dict]) -> Run:
    """Return the run that predicts on one image, post-processing included.

    Args:
        model: A detector or segmentor in evaluation mode.
        data: Gets the number of the round; returns a batch of one image.
    """
    return Run(model, lambda i: _unlabelled(data(i)), torch.no_grad()(model.test_step), 1)


def training(cfg: Config, data: Callable[[nn.Module], dict], images: int) -> Run:
    """Return the run of a training step without its update: forward and backward.

    Args:
        cfg: A whole config, whose model is built with random weights.
        data: Gets the model; returns a batch, which is the same in all rounds.
        images: Number of images in it.
    """
    if not torch.cuda.is_available():
        cfg = copy.deepcopy(cfg)
        drop_amp(cfg)
    model, wrapper = build_training(cfg, 'cpu')
    batch = data(model)
    return Run(
        model, lambda i: copy.deepcopy(batch), partial(training_step, model, wrapper), images
    )


def _unlabelled(batch: Mapping[str, list]) -> dict[str, list]:
    """Return a batch whose samples know no truth."""
    samples = [type(sample)(metainfo=sample.metainfo) for sample in batch['data_samples']]
    return dict(inputs=list(batch['inputs']), data_samples=samples)


def measure_configs(
    cfgs: Mapping[str, Config],
    *,
    size: tuple[int, int] | None = None,
    batch: int = 2,
    rounds: int = 10,
    deployed: bool = False,
    device: str = 'cpu',
    progress: Callable[[str], None] = lambda text: None,
) -> list[dict[str, Any]]:
    """Return what whole models cost, of random weights on random images.

    Args:
        cfgs: By their names; left alone.
        size: Height and width of the images in pixels; by default of each config's largest.
        batch: Of a training step.
        rounds: Timed runs of each; 0 leaves times and memory out.
        deployed: Predict with the backbones' fastest form where they have one.
        device: 'cpu' or 'cuda'.
        progress: Is told what goes on.

    Returns:
        For each config its ``config``, ``size``, ``parts`` (name -> parameters, macs, activations),
        ``form`` ('deployed' or 'trained'), ``infer`` and ``train`` (as :func:`measure` returns
        them, or None), or ``error``.
    """
    rows: dict[str, dict[str, Any]] = {}
    infers, steps = {}, {}
    for name, cfg in cfgs.items():
        progress(f'building {name}')
        row = rows[name] = dict(config=name, size=size, parts={}, infer=None, train=None)
        row['form'] = 'trained'
        try:
            row['size'] = own = size or training_size(cfg)
            model = build_part(cfg.model, cfg.get('default_scope'))
            row['parts'] = {
                part: asdict(cost)
                for part, cost in model_costs(model.to('meta').eval(), own).items()
            }
            if rounds:
                cfg = copy.deepcopy(cfg)
                without_weights(cfg.model)
                if 'size' in cfg.model.get('data_preprocessor', {}):  # mmseg's pads images to it
                    cfg.model.data_preprocessor.size = own
                steps[name] = training(cfg, partial(_random, cfg, batch, own), batch)
                steps[name].model.init_weights()  # heads expect few objects
                model = copy.deepcopy(steps[name].model).eval()
                if deployed and hasattr(model.backbone, 'switch_to_deploy'):
                    deploy(model)
                    row['form'] = 'deployed'
                infers[name] = inference(model, partial(_one, _random(cfg, 1, own, model)))
        except Exception as error:  # of whatever library: it costs the others nothing
            row['error'] = one_line(error)
    for kind, runs in dict(infer=infers, train=steps).items():
        for name, found in measure(runs, rounds=rounds, device=device, progress=progress).items():
            if 'error' in found:
                rows[name]['error'] = found['error']
            else:
                rows[name][kind] = found
    return list(rows.values())


def _random(cfg: Config, batch: int, size: tuple[int, int], model: nn.Module) -> dict[str, list]:
    return random_batch(model, batch, size, segments=cfg.get('default_scope') == 'mmseg')


def _one(batch: dict[str, list], number: int) -> dict[str, list]:
    return batch


def timed(run: Callable[[], Any], device: str) -> float:
    """Return the seconds that a run takes, on a GPU by its own clock."""
    if device == 'cuda':
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end) / 1e3
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def machine(device: str = 'cpu') -> dict[str, Any]:
    """Return what a record says of where it was made."""
    if device == 'cuda':
        hardware = torch.cuda.get_device_name()
    else:
        hardware = f'{_cpu()}, {torch.get_num_threads()} threads'
    return dict(
        date=datetime.date.today().isoformat(),
        device=hardware,
        versions=dict(
            python=platform.python_version(),
            torch=torch.__version__,
            torchvision=torchvision.__version__,
            timm=timm.__version__,
        ),
        omp_wait_policy=os.environ.get('OMP_WAIT_POLICY', 'unset'),
    )


def _cpu() -> str:
    listed = Path('/proc/cpuinfo')
    lines = listed.read_text().splitlines() if listed.is_file() else []
    names = (line.partition(':')[2].strip() for line in lines if line.startswith('model name'))
    return next(names, platform.processor() or platform.machine())
