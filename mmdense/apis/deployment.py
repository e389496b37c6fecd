"""Prepare a trained model for deployment: condense it, and compare the costs of its forms."""

import copy
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from mmengine.config import Config
from torch import Tensor, nn

from mmdense.errors import UserError
from mmdense.flops import count_cost, count_parameters
from mmdense.models import CondenseNetV2
from mmdense.models.backbones import Backbone
from mmdense.models.deploy import deploy, deployable

TOLERANCE = 1e-4  # of the largest value of an output, in float32


@dataclass(frozen=True)
class FormCost:
    """The cost of a network in one of its forms."""

    form: str  # such as 'learned'
    parameters: int | None  # of the whole model; None for the inference form, never trained
    macs: int  # executed by the backbone for the probe image
    difference: float  # of feature maps from the first form's, at most, over their largest value
    not_counted: Counter[str]  # calls of operators that may be products


def compare_forms(model: nn.Module, *, size: tuple[int, int] = (224, 224)) -> list[FormCost]:
    """Return the costs of a trained model's backbone and of its inference form, in float32.

    ``model`` is not changed; ``size`` is the height and width of the probe image in pixels.
    UserError if there is not exactly one backbone with an inference form, it is in that form
    already, or the image is too small for it; RuntimeError if the outputs of the forms differ.
    """
    net = _single(deployable(model), 'one backbone to deploy')
    return _measure(model, net, size, [deploy])


def condense(model: nn.Module, *, size: tuple[int, int] = (224, 224)) -> list[FormCost]:
    """Convert a model's CondenseNetV2 to the condensed form, in place, and return the costs.

    They are those of its form, of the condensed and of the inference form, as in
    :func:`compare_forms`. The parameters are new ones: build optimizers afterwards. UserError if
    there is not exactly one CondenseNetV2, it is not fully pruned, or the image is too small for
    it; RuntimeError if the outputs of the forms differ. The model is not changed then.
    """
    networks = [module for module in model.modules() if isinstance(module, CondenseNetV2)]
    net = _single(networks, 'one CondenseNetV2 to condense')
    conversions = [deploy] if net.form == 'condensed' else [CondenseNetV2.condense, deploy]
    costs = _measure(model, net, size, conversions)
    net.condense()
    return costs


def _single(networks: list[Backbone], expected: str) -> Backbone:
    if len(networks) != 1 or networks[0].form == 'deployed':
        names = ', '.join(f'{type(net).__name__} ({net.form})' for net in networks) or 'none'
        raise UserError(f'a model with {expected} is needed, this one has: {names}')
    return networks[0]


def _measure(
    model: nn.Module,
    net: Backbone,
    size: tuple[int, int],
    conversions: Sequence[Callable[[nn.Module], None]],
) -> list[FormCost]:
    """Return the costs of a model's backbone in its form, and after each conversion of a copy."""
    others = count_parameters(model) - count_parameters(net)
    weight = next(p for p in net.parameters() if p.dim() == 4)  # [C, 3, h, w], of the stem
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, weight.shape[1], *size, generator=generator).to(weight.device)
    net = copy.deepcopy(net).float()
    expected: tuple[Tensor, ...] = ()
    costs: list[FormCost] = []
    for convert in (nn.Module.eval, *conversions):
        convert(net)
        unknown: Counter[str] = Counter()
        try:
            with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
                cost, outputs = count_cost(net, image, unknown)
        except ValueError as error:  # the image is too small
            raise UserError(str(error)) from error
        expected = expected or outputs
        difference = max(map(relative_difference, outputs, expected))
        parameters = None if net.form == 'deployed' else others + count_parameters(net)
        costs.append(FormCost(net.form, parameters, cost.macs, difference, unknown))
        if not difference < TOLERANCE:
            raise RuntimeError(
                f'the form {net.form!r} differs from {costs[0].form!r} by {difference:.1e} '
                'of the largest value, which is more than rounding: please report this'
            )
    return costs


def deployed_config(cfg: Config, net: Backbone, checkpoint: str) -> Config:
    """Return the config of a model that is to be deployed, or trained on from a checkpoint.

    ``cfg`` is the one that the model was trained with, and is not changed; its backbone ``net`` is
    condensed already if it is a CondenseNetV2.
    """
    cfg = copy.deepcopy(cfg)
    cfg.model.backbone.init_cfg = None
    if isinstance(net, CondenseNetV2):
        cfg.model.backbone.form = 'condensed'
        hooks = cfg.get('custom_hooks') or []
        cfg.custom_hooks = [h for h in hooks if h['type'] != 'mmdense.CondenseScheduleHook']
    cfg.load_from = checkpoint
    for key in ('work_dir', 'launcher', 'resume'):  # of the finished run
        cfg.pop(key, None)
    return cfg


def relative_difference(a: Tensor, b: Tensor) -> float:
    """Return the largest difference of two tensors, relative to the largest value of ``b``."""
    return float((a - b).abs().max() / b.abs().max().clamp(min=torch.finfo(b.dtype).tiny))
