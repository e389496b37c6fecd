"""Compare Faster R-CNN on mmdense's backbones with the same detector on timm's.

timm's networks run in mmpretrain's TIMMBackbone, and their RoIAlign is torchvision's kernel: on a
CPU the same loop on one thread as in a compiled mmcv. Backbone, neck and heads have the same
weights, and every step the same images, boxes and random numbers. TIMMBackbone can't freeze stages
or norms, so nothing is frozen, and RDNet has neither stochastic depth nor output norms.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from torch import Tensor

from dev.benchmark.compare import DTYPES, MMDENSE, Contender, Setting, summary
from dev.benchmark.networks import NETWORKS
from mmdense.benchmark.memory import peak_bytes, random_batch
from mmdense.benchmark.timing import Run, inference_run, seconds_of, training_run
from mmdense.config.edit import use_amp
from mmdense.errors import UserError, one_line
from mmdense.models.deploy import deploy

__all__ = ['CONFIGS', 'FORMS', 'build', 'compare_detectors', 'detectors', 'outputs']

CONFIGS = dict(
    rdnet_tiny='rdnet/faster-rcnn_rdnet-t_fpn_1x_coco.py',
    densenet121='densenet/faster-rcnn_densenet-121_fpn_1x_coco.py',
    rexnet_100='rexnet/faster-rcnn_rexnet-1.0_fpn_1x_coco.py',
)
FOLDER = Path(__file__).parents[2] / 'configs/detection'
FORMS = dict(infer=('plain', 'deployed'), train=('plain', 'lean', 'recompute'))
PRECISIONS = dict(float32='fp32', bfloat16='bf16', float16='amp')
AGREEMENT = 1e-6  # in float64, where the order of sums gives 1e-13
SEED = 0


def detectors(mode: str, *, forms: Sequence[str], compiled: bool = True) -> list[Contender]:
    """Return the configurations to compare in a mode: of mmdense in some forms, and of timm."""
    known = ['' if form == 'plain' else form for form in FORMS[mode] if form in forms]
    formats = [(False, False), (True, False), (True, True)]
    return [
        Contender(library, form, last, fast)
        for library, form in [*((MMDENSE, form) for form in known), ('timm', '')]
        for last, fast in formats[form == 'deployed' : 2 + compiled]
    ]


def build(contender: Contender, setting: Setting, parts: Mapping[str, Tensor]) -> Run:
    """Return a step of a detector with these weights of neck and heads; random ones if empty."""
    network = NETWORKS[setting.network]
    cfg = Config.fromfile(FOLDER / CONFIGS[setting.network])
    if setting.mode == 'train' and setting.dtype != 'float32':
        use_amp(cfg, setting.dtype)
    options = network.options.get(contender.form, {})
    source = network.create(**options)
    if contender.library == MMDENSE:
        weights = source.state_dict()
        backbone = {key: cfg.model.backbone[key] for key in ('type', 'arch')} | options
    else:
        import_module('mmpretrain.models')  # registers TIMMBackbone
        peer = network.peers[contender.library](source)
        weights = {f'timm_model.{key}': value for key, value in peer.state_dict().items()}
        backbone = dict(
            type='mmpretrain.TIMMBackbone',
            model_name=setting.network,
            features_only=True,
            out_indices=tuple(peer.feature_info.out_indices),
        )
        cfg.model.roi_head.bbox_roi_extractor.roi_layer.use_torchvision = True
    cfg.model.backbone = backbone
    torch.manual_seed(SEED)  # of the images and boxes
    data = random_batch(setting.batch, setting.size, scope='mmdet')
    for sample in data['data_samples']:  # copied for every step, but not read
        del sample.gt_instances.masks, sample.gt_sem_seg
    run = training_run(cfg, data)
    model = run.model
    model.init_weights()
    weights = {f'backbone.{key}': value for key, value in weights.items()}
    model.load_state_dict({**parts, **weights}, strict=bool(parts))
    if contender.form == 'deployed':
        deploy(model.eval())
    model.to(setting.device)
    if contender.channels_last:
        model.to(memory_format=torch.channels_last)
    if contender.compiled:
        model.backbone.compile()
    if setting.mode == 'train':
        return run
    return inference_run(model.eval(), lambda _: data, setting.batch, PRECISIONS[setting.dtype])


def _step(run: Run) -> None:
    """Run once, from the same random numbers and without gradients of an earlier step."""
    run.model.zero_grad(set_to_none=True)
    torch.manual_seed(SEED)
    run(0)()


def outputs(run: Run, setting: Setting, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Return the losses, or in 'infer' the neck's maps, of a model with weights in a dtype."""
    model, trains = run.model.to(dtype), setting.mode == 'train'
    torch.manual_seed(SEED)
    data = model.data_preprocessor(run.prepare(0), training=trains)
    with torch.set_grad_enabled(trains):  # as in a step: another mode would be compiled anew
        if not trains:
            return list(model.extract_feat(data['inputs'].to(dtype)))
        losses = model(data['inputs'].to(dtype), data['data_samples'], mode='loss')
    values = model.parse_losses(losses)[1].items()
    return [torch.stack([value.detach() for name, value in values if 'loss' in name])]


def _error(values: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    pairs = zip(values, exact, strict=True)
    return max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)


def compare_detectors(
    setting: Setting,
    *,
    forms: Sequence[str] = ('plain', 'deployed'),
    compiled: bool = True,
    rounds: int = 10,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, Any]:
    """Measure detectors; the result is that of :func:`.compare`, with the config as network.

    Before anything is timed, losses (in 'infer' the neck's maps) of mmdense's and timm's detector
    must agree in float64. ``error`` is that of the losses or maps, ``memory`` is measured on a GPU.

    Raises:
        UserError: If they don't agree, a norm gets a single value, or all of timm's configurations
            fail.
    """
    torch.compiler.reset()  # or another size would be compiled for dynamic shapes
    progress('comparing in float64')
    run = build(Contender(MMDENSE), setting, {})
    weights = run.model.state_dict().items()
    parts = {key: x.clone() for key, x in weights if not key.startswith('backbone.')}
    try:
        exact = outputs(run, setting, torch.float64)
    except ValueError as failure:  # BatchNorm of a single value
        reason = one_line(failure)
        raise UserError(f'{setting.network}: {reason}; use a larger --batch') from failure
    run = build(Contender('timm'), setting, parts)
    difference = _error(outputs(run, setting, torch.float64), exact)
    if not difference <= AGREEMENT:
        raise UserError(f'{setting.network}: mmdense and timm differ by {difference:.1e}')
    rows, steps, dtype = {}, {}, DTYPES[setting.dtype]
    for contender in detectors(setting.mode, forms=forms, compiled=compiled):
        progress(f'building {contender.name}')
        try:
            run = build(contender, setting, parts)
            step = partial(_step, run)
            step()
            run.model.zero_grad(set_to_none=True)
            on_gpu = setting.device != 'cpu'
            row = dict(memory=peak_bytes(step, setting.device)) if on_gpu else {}
            with torch.autocast(setting.device, dtype, enabled=dtype != torch.float32):
                rows[contender] = row | dict(error=_error(outputs(run, setting), exact))
            steps[contender] = step
        except Exception as failure:  # a compiler error, or too little memory
            rows[contender] = dict(failed=one_line(failure))
    seconds: dict[Contender, list[float]] = {contender: [] for contender in steps}
    for number in range(rounds):
        progress(f'round {number + 1} of {rounds}')
        for contender in random.sample(list(steps), len(steps)):
            seconds[contender].append(seconds_of(steps[contender], setting.device))
    result = summary(setting, rows, seconds)
    result['setting']['network'] = Path(CONFIGS[setting.network]).stem
    return result
