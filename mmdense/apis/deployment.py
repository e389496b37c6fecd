"""From a trained model to one that is only run: condensed, folded, and with what that cost."""

from __future__ import annotations

import copy
import functools
import random
import statistics
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from mmengine.config import Config
from torch import Tensor, nn

from mmdense import models
from mmdense.errors import UserError
from mmdense.flops import count_cost, count_parameters
from mmdense.models import CondenseNetV2
from mmdense.models.backbones import Backbone
from mmdense.models.deploy.condensenetv2 import Workspace, can_run_dense

__all__ = [
    'FormCost',
    'compare_forms',
    'condense',
    'deploy',
    'deployable',
    'deployed_config',
    'faster_dense',
]

TOLERANCE = 1e-4  # of the largest value of a map, in float32
ROUNDS = 15


@dataclass(frozen=True)
class FormCost:
    """What a form of a network costs.

    Attributes:
        form: Such as 'learned'.
        parameters: Of the whole model; None for the deployed form, which is no model to train.
        macs: Executed multiply-adds of the backbone for the probe image.
        difference: Largest difference of any map from the first form's, as a share of the map's
            largest value.
        not_counted: Calls of operators that may be products and are not among those.
    """

    form: str
    parameters: int | None
    macs: int
    difference: float
    not_counted: Counter[str] = field(default_factory=Counter)


def deploy(model: nn.Module) -> None:
    """Turn the backbone of a trained model into its fastest form for evaluation, in place.

    Raises:
        UserError: No backbone with such a form, or one that is not ready for it.
    """
    for backbone in deployable(model):
        backbone.switch_to_deploy()


def deployable(model: nn.Module) -> list[Backbone]:
    """Return the backbones of a model that have a form for deployment.

    Raises:
        UserError: There is none.
    """
    found = [m for m in model.modules() if isinstance(m, Backbone) and _can_deploy(m)]
    if not found:
        able = [name for name in models.__all__ if _can_deploy(getattr(models, name))]
        raise UserError(
            f'{type(getattr(model, "backbone", model)).__name__} has no form for deployment: '
            f'{", ".join(able[:-1])} and {able[-1]} have one'
        )
    return found


def _can_deploy(network: object) -> bool:
    return hasattr(network, 'switch_to_deploy')


class _Forms:
    """The costs of a network's forms on one image, in float32; they must agree."""

    def __init__(self, net: Backbone, size: tuple[int, int]) -> None:
        self.first = copy.deepcopy(net).float().eval()
        weight = next(p for p in net.parameters() if p.dim() == 4)  # [C, 3, h, w], of the stem
        generator = torch.Generator().manual_seed(0)
        image = torch.randn(1, weight.shape[1], *size, generator=generator)
        self.image = image.to(weight.device)
        self.expected: tuple[Tensor, ...] = ()
        self.costs: list[FormCost] = []

    def measure(self, form: str, net: Backbone) -> None:
        """Run a form and note its cost; the first one is what the others are compared with.

        Raises:
            UserError: The image is too small.
            RuntimeError: The maps are not those of the first form.
        """
        unknown: Counter[str] = Counter()
        try:
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                cost, maps = count_cost(net, self.image, unknown)
        except ValueError as error:  # too small an image
            raise UserError(str(error)) from error
        self.expected = self.expected or maps
        difference = max(map(_difference, maps, self.expected))
        self.costs.append(FormCost(form, None, cost.macs, difference, unknown))
        if not difference < TOLERANCE:
            raise RuntimeError(
                f'the form {form!r} differs from {self.costs[0].form!r} by {difference:.1e} '
                'of the largest value, which is more than rounding: please report this'
            )


def compare_forms(model: nn.Module, *, size: tuple[int, int] = (224, 224)) -> list[FormCost]:
    """Compare a model's backbone as it was trained with its form for deployment, in float32.

    Args:
        model: A trained detector, segmentor, classifier or backbone; left alone.
        size: Height and width of the probe image, in pixels.

    Returns:
        The costs as it was trained and deployed.

    Raises:
        UserError: No backbone with such a form, more than one, one that is in it already, or an
            image that is too small for it.
        RuntimeError: The forms don't agree.
    """
    found = deployable(model)
    if len(found) != 1 or found[0].form == 'deployed':
        listed = [f'{type(net).__name__} ({net.form})' for net in found]
        raise UserError(f'a model with one backbone to deploy is needed, not {", ".join(listed)}')
    forms = _Forms(found[0], size)
    forms.measure(found[0].form, forms.first)
    forms.first.switch_to_deploy()
    forms.measure('deployed', forms.first)
    trained, deployed = forms.costs
    return [replace(trained, parameters=count_parameters(model)), deployed]


def condense(
    model: nn.Module,
    *,
    size: tuple[int, int] = (224, 224),
    allow_partial: bool = False,
    tune: bool = False,
) -> list[FormCost]:
    """Turn a model's CondenseNetV2 into the condensed form, in place, and say what that cost.

    The forms are compared in float32. Parameters are new ones: build optimizers after it.

    Args:
        model: A trained detector, segmentor, classifier or backbone.
        size: Height and width of the probe image, in pixels.
        allow_partial: Take a network that is not fully pruned yet.
        tune: Time which convolutions run faster dense on this machine at that size, and keep it in
            the backbone's ``dense``.

    Returns:
        The costs as it was, condensed, deployed, and deployed with all convolutions grouped.

    Raises:
        UserError: No CondenseNetV2, more than one, one that is not fully pruned, or an image that
            is too small for it.
        RuntimeError: The forms don't agree; the model is as it was.
    """
    networks = [module for module in model.modules() if isinstance(module, CondenseNetV2)]
    if len(networks) != 1 or networks[0].form == 'deployed':
        forms = [net.form for net in networks]
        raise UserError(f'a model with one CondenseNetV2 to condense is needed, not {forms}')
    net = networks[0]
    forms = _Forms(net, size)
    probed = forms.first
    forms.measure(net.form, probed)
    parameters = {net.form: count_parameters(model)}
    if net.form != 'condensed':
        probed.condense(allow_partial=allow_partial)
        forms.measure('condensed', probed)
    dense = faster_dense(probed, size) if tune else net.dense
    for form, names in (('deployed', dense), ('deployed, all grouped', ())):
        deployed = copy.deepcopy(probed)
        deployed.switch_to_deploy(names)
        forms.measure(form, deployed)
    net.condense(allow_partial=allow_partial)
    net.dense = dense
    parameters['condensed'] = count_parameters(model)
    return [replace(cost, parameters=parameters.get(cost.form)) for cost in forms.costs]


def faster_dense(net: CondenseNetV2, size: tuple[int, int]) -> list[str]:
    """Return which of ``net.one_by_ones()`` are faster dense, by timing them on this machine.

    Each is run on one image of that size in both ways, in rounds of random order; the medians
    decide.

    Args:
        net: A network of the condensed form.
        size: Height and width of the image, in pixels.
    """
    names = [name for name in net.one_by_ones() if _may_run_dense(net, name)]
    grouped, dense = copy.deepcopy(net), copy.deepcopy(net)
    grouped.switch_to_deploy(())
    dense.switch_to_deploy(names)
    height, width = (-(-side // net.arch.stem_stride) for side in size)
    work, like = Workspace(), next(net.parameters())
    faster = []
    for name in names:
        block, layer, conv = name.split('.')
        halvings = int(block.rpartition('_')[2]) - 1
        pixels = (height >> halvings) * (width >> halvings)
        ways = [deployed.features[block].get_submodule(layer) for deployed in (grouped, dense)]
        channels = max(ways[1].conv_1.weight.shape[1], len(ways[1].sfr.weight))
        x = torch.randn(1, channels, pixels).to(like)
        new = torch.randn(1, ways[1].growth, pixels).to(like)
        if conv == 'conv_1':
            runs = [functools.partial(way.conv_1, x, work) for way in ways]
        else:
            runs = [functools.partial(way.sfr, x, new, work) for way in ways]
        times = [[], []]
        with torch.no_grad():
            for _ in range(ROUNDS):
                for i in random.sample((0, 1), 2):
                    times[i].append(_seconds(runs[i], like.device))
        if statistics.median(times[1]) < statistics.median(times[0]):
            faster.append(name)
    return faster


def deployed_config(cfg: Config, net: Backbone, checkpoint: str) -> Config:
    """Return the config of a model that is to be deployed, or trained on.

    Args:
        cfg: Of the model as it was trained; left alone.
        net: Its backbone; a CondenseNetV2 was condensed.
        checkpoint: File of the model's weights, which training would start from.
    """
    cfg = copy.deepcopy(cfg)
    cfg.model.backbone.init_cfg = None
    if isinstance(net, CondenseNetV2):
        cfg.model.backbone.update(form='condensed', dense=net.dense)
        if net.stage != net.last_stage:
            cfg.model.backbone.stage = net.stage
        hooks = cfg.get('custom_hooks') or []
        cfg.custom_hooks = [h for h in hooks if h['type'] != 'mmdense.CondenseScheduleHook']
    cfg.load_from = checkpoint
    for key in ('work_dir', 'launcher', 'resume'):  # of the run that is over
        cfg.pop(key, None)
    return cfg


def _may_run_dense(net: CondenseNetV2, name: str) -> bool:
    return name.endswith('.sfr') or can_run_dense(net.features.get_submodule(name))


def _difference(a: Tensor, b: Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max().clamp(min=torch.finfo(b.dtype).tiny))


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Time a second call: the first one fetches what the other way has displaced."""
    run()
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    begin = time.perf_counter()
    run()
    if device.type == 'cuda':
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin
