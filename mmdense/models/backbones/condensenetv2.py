"""CondenseNetV2: `Sparse Feature Reactivation for Deep Networks
<https://arxiv.org/abs/2104.04382>`_ (CVPR 2021).

Five densely connected blocks with 2x2 average pooling between them. Each layer reads some of the
features before it, adds ``growth`` new features, and updates some of the earlier ones with these.
The connections are learned: most are pruned during the first half of training. Feature maps are
taken at the end of each block, before the pooling.

Parameter and buffer names are those of the released models: of the unconverted ones while the
network is trained (``form='learned'``), of the converted ones once it is condensed
(``form='condensed'``).
"""

import operator
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from mmcv.cnn import build_norm_layer
from torch import Tensor, nn
from torch.nn import functional as F

from mmdense.errors import UserError
from mmdense.models.backbones.base import Backbone, resolve_arch
from mmdense.models.deploy.condensenetv2 import DeployedBlock, ThreadWorkspace
from mmdense.models.layers import (
    CondensedGroupConv,
    CondensedReactivation,
    LearnedGroupConv,
    SparseReactivation,
    lean_conv,
    plain_conv,
    recompute,
)
from mmdense.registry import MODELS

FORMS = ('learned', 'condensed')
BOTTLENECK = 4
BN = dict(type='BN')


@dataclass(frozen=True)
class Arch:
    """Shape of a CondenseNetV2; blocks count from 0."""

    layers: tuple[int, ...]  # per block
    growth: tuple[int, ...]  # channels that each layer of a block adds
    groups: int = 8  # of the 1x1 and of the 3x3 convolutions
    condense_factor: int | None = None  # a group keeps one in so many channels; groups by default
    stem_stride: int = 2  # of the first convolution
    hard_swish_from: int = 2  # first block with hard-swish; earlier ones have ReLU
    gated_from: int = 3  # first block whose new features have a squeeze-excite gate

    def __post_init__(self) -> None:
        if len(self.layers) != len(self.growth) or not self.layers:
            raise ValueError(f'layers and growth must have the same length: {self}')
        if min(*self.layers, *self.growth, self.groups, self.factor, self.stem_stride) < 1:
            raise ValueError(f'each of layers and growth, groups, ... must be positive: {self}')
        for name, number in (('groups', self.groups), ('condense_factor', self.factor)):
            if any(growth % number for growth in self.growth) or self.inputs()[0] % number:
                raise ValueError(f'{name} must divide each growth: {self}')

    @property
    def factor(self) -> int:
        """The condense factor."""
        return self.groups if self.condense_factor is None else self.condense_factor

    def inputs(self) -> list[int]:
        """Return the channels at the beginning of each block."""
        return [2 * self.growth[0], *self.outputs()[:-1]]

    def outputs(self) -> list[int]:
        """Return the channels at the end of each block."""
        added = map(operator.mul, self.layers, self.growth)
        return list(accumulate(added, initial=2 * self.growth[0]))[1:]


ARCHS = {
    'a': Arch(layers=(1, 1, 4, 6, 8), growth=(8, 8, 16, 32, 64)),
    'b': Arch(layers=(2, 4, 6, 8, 6), growth=(6, 12, 24, 48, 96), groups=6),
    'c': Arch(layers=(4, 6, 8, 10, 8), growth=(8, 16, 32, 64, 128)),
}


class SqueezeExcite(nn.Module):
    """Scale channels by gates computed from their means: [N, C, H, W] to the same."""

    def __init__(self, channels: int, reduction: int = 1) -> None:
        super().__init__()
        hidden = max(channels // reduction, 1)
        self.fc = nn.Sequential(
            nn.Linear(channels, hidden, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(hidden, channels, bias=False),
            nn.Sigmoid(),
        )

    def gate(self, x: Tensor) -> Tensor:
        """Return the gates, [N, C, 1, 1]."""
        return self.fc(x.mean((2, 3)))[..., None, None]

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gate(x)


class DenseLayer(nn.Module):
    """Map the features of a block [N, C, H, W] to [N, C + growth, H, W], updating some of them.

    In the condensed form each group keeps ``kept`` channels; None builds the learned form.
    """

    def __init__(
        self,
        channels: int,
        arch: Arch,
        block: int,
        *,
        kept: int | None,
        norm_cfg: Mapping[str, Any],
        drop_rate: float,
        memory: str,
    ) -> None:
        super().__init__()
        growth = arch.growth[block]
        wide = BOTTLENECK * growth
        activation = nn.Hardswish if block >= arch.hard_swish_from else nn.ReLU
        options = dict(
            groups=arch.groups,
            norm_cfg=norm_cfg,
            activation=activation,
            drop_rate=drop_rate,
            memory=memory,
        )
        if kept is None:
            options['condense_factor'] = arch.factor
            self.conv_1 = LearnedGroupConv(channels, wide, **options)
            self.sfr = SparseReactivation(growth, channels, **options)
        else:
            self.conv_1 = CondensedGroupConv(arch.groups * kept, wide, **options)
            self.sfr = CondensedReactivation(growth, arch.groups * kept, **options)
        self.conv_2 = nn.Sequential(
            OrderedDict(
                norm=build_norm_layer(dict(norm_cfg), wide)[1],
                activation=activation(inplace=activation is nn.ReLU),
                conv=nn.Conv2d(wide, growth, 3, padding=1, groups=arch.groups, bias=False),
            )
        )
        self.se = SqueezeExcite(growth) if block >= arch.gated_from else nn.Identity()
        self.conv = lean_conv if memory == 'lean' else plain_conv

    def forward(self, x: Tensor) -> Tensor:
        norm, activation, conv = self.conv_2
        new = self.se(self.conv((norm, activation), conv, self.conv_1(x)))
        return torch.cat([self.sfr(x, new), new], 1)


class DenseBlock(nn.Sequential):
    """Dense layers, after the pooling that halves the output of the block before it."""

    def __init__(self, layers: Sequence[DenseLayer], *, pool: bool, memory: str) -> None:
        super().__init__(OrderedDict((f'denselayer_{i}', m) for i, m in enumerate(layers, 1)))
        self.pool = pool
        self.memory = memory

    def forward(self, x: Tensor) -> Tensor:
        if self.pool:
            x = F.avg_pool2d(x, 2)
        for layer in self:
            x = recompute(layer, x) if self.memory == 'recompute' else layer(x)
        return x


@MODELS.register_module()
class CondenseNetV2(Backbone):
    """CondenseNetV2 with feature maps at strides 2, 4, 8, 16 and 32; the first is off by default.

    A network of the learned form starts with all connections; :meth:`prune_to`, which
    ``mmdense.CondenseScheduleHook`` calls during training, masks them stage by stage. Masks are
    saved with the weights, and don't change without the hook. :meth:`condense` converts a fully
    pruned network to the condensed form. Both forms can be trained.

    Heights and widths are rounded up by the stem and down by each pooling. ``memory='lean'`` takes
    about two thirds of the memory of training, for 1.2 times the time on a CPU. Others: see
    :class:`Backbone`.

    Args:
        arch: 'a', 'b', 'c', or a dict of :class:`Arch`'s fields; there is one feature map per
            block.
        form: 'learned' (dense convolutions with masks) or 'condensed' (group convolutions).
        drop_rate: Dropout before each 1x1 convolution.
        norm_cfg: mmcv's config of the norms: BN, or SyncBN.
    """

    archs = ARCHS
    weights = {
        arch: f'condensenetv2://checkpoints/condensenetv2-{arch}_converted.pth' for arch in ARCHS
    }
    pretrained_recipe = dict(form='condensed')
    form_marks = dict(learned='._mask', condensed='.sfr.index', deployed='.sfr.norm.scale')

    def __init__(
        self,
        *,
        arch: str | Mapping[str, Any] = 'c',
        form: str = 'learned',
        out_indices: int | Sequence[int] | None = (1, 2, 3, 4),
        drop_rate: float = 0.0,
        frozen_stages: int = -1,
        norm_cfg: Mapping[str, Any] = BN,
        norm_eval: bool = False,
        in_channels: int = 3,
        memory: str = 'plain',
        with_cp: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        arch = resolve_arch(arch, ARCHS)
        if form not in FORMS:
            raise ValueError(f'form is {form!r}, must be one of {FORMS}')
        if not 0 <= drop_rate < 1:
            raise ValueError(f'drop_rate is {drop_rate}, must be from 0 to below 1')
        super().__init__(
            map_channels=arch.outputs(),
            map_strides=[arch.stem_stride * 2**i for i in range(len(arch.layers))],
            out_indices=out_indices,
            frozen_stages=frozen_stages,
            norm_eval=norm_eval,
            memory=memory,
            with_cp=with_cp,
            init_cfg=init_cfg,
        )
        self.form = form
        self.arch = arch
        stem = nn.Conv2d(
            in_channels, arch.inputs()[0], 3, stride=arch.stem_stride, padding=1, bias=False
        )
        self.features = nn.ModuleDict(dict(init_conv=stem))
        for block in range(self.out_indices[-1] + 1):
            layers = []
            for i in range(arch.layers[block]):
                channels = arch.inputs()[block] + i * arch.growth[block]
                layers.append(
                    DenseLayer(
                        channels,
                        arch,
                        block,
                        kept=channels // arch.factor if form == 'condensed' else None,
                        norm_cfg=norm_cfg,
                        drop_rate=drop_rate,
                        memory=self.memory,
                    )
                )
            self.features[f'denseblock_{block + 1}'] = DenseBlock(
                layers, pool=block > 0, memory=self.memory
            )
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode='fan_out', nonlinearity='relu')
        self._freeze()

    @property
    def stage(self) -> int:
        """The stage of pruning that all layers have reached; the last in other forms."""
        if self.form != 'learned':
            return self.last_stage
        return min(layer.stage for layer in self.learned_layers())

    @property
    def last_stage(self) -> int:
        """The stage at which each group keeps one of ``condense_factor`` channels."""
        return self.arch.factor - 1

    def learned_layers(self) -> list[LearnedGroupConv | SparseReactivation]:
        """Return the layers with masks, of the learned form."""
        if self.form != 'learned':
            raise ValueError(f"form is {self.form!r}: only form='learned' has masks")
        kinds = (LearnedGroupConv, SparseReactivation)
        return [module for module in self.modules() if isinstance(module, kinds)]

    def prune_to(self, progress: float) -> None:
        """Prune the connections that are due at this progress of training, in all layers.

        The last stage begins at 0.5, as published. The result depends on weights, masks and stages
        only. No other function changes masks. ValueError if the progress isn't from 0 to 1, or the
        form isn't the learned one.
        """
        for layer in self.learned_layers():
            layer.prune_to(progress)

    def connections(self) -> float:
        """Return the share of connections that are not pruned, of the learned form."""
        masks = [layer._mask for layer in self.learned_layers()]
        return sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)

    def condense(self) -> None:
        """Convert the network to the condensed form, in place: group convolutions without masks.

        Its outputs stay the same. UserError if the network is not fully pruned.
        """
        if self.form != 'learned':
            return
        if self.stage < self.last_stage:
            raise UserError(
                f'pruning is at stage {self.stage} of {self.last_stage}: train on with '
                'mmdense.CondenseScheduleHook'
            )
        for module in self.modules():
            if isinstance(module, DenseLayer):
                module.conv_1 = module.conv_1.condensed()
                module.sfr = module.sfr.condensed()
        self.form = 'condensed'
        self.train(self.training)

    def switch_to_deploy(self) -> None:
        """Switch to the inference form, in place; see :class:`Backbone`. It has no gradients.

        UserError if the network is not fully pruned.
        """
        if self.form == 'deployed':
            return
        self.condense()
        for name, block in self.features.items():
            if isinstance(block, DenseBlock):
                self.features[name] = DeployedBlock(block)
        self.features['init_conv'].to(memory_format=torch.channels_last)
        self.form = 'deployed'
        self._local = ThreadWorkspace()
        self.requires_grad_(False).eval()

    def _stage_modules(self, stage: int) -> list[nn.Module]:
        name = f'denseblock_{stage}' if stage else 'init_conv'
        return [self.features[name]] if name in self.features else []

    def _layer_depths(self, granularity: str) -> tuple[Mapping[str, int], int]:
        depths, last = {'features.init_conv': 0}, 0
        for block, layers in enumerate(self.arch.layers, 1):
            for i in range(1, layers + 1):
                last += i == 1 or granularity == 'layer'
                depths[f'features.denseblock_{block}.denselayer_{i}'] = last
        return depths, last + 2

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest: Any) -> None:
        for name, buffer in self.named_buffers():
            key = prefix + name
            if key not in state_dict or buffer.is_floating_point():
                continue
            value = state_dict[key]
            if value.shape != buffer.shape and key.endswith('.index'):
                raise UserError(
                    f'{key} is {tuple(value.shape)}, must be {tuple(buffer.shape)}: load released '
                    'files from condensenetv2://FILE'
                )
            if value.is_floating_point() and (value != value.round()).any():
                raise UserError(
                    f'{key} has fractions, as of a moving average: load released files from '
                    'condensenetv2://FILE'
                )
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return feature maps [N, C_i, ~H / s_i, ~W / s_i] for images [N, in_channels, H, W]."""
        self._check_size(x)
        if self.form == 'deployed':
            return self._forward_deployed(x)
        maps = []
        for i, module in enumerate(self.features.values()):
            x = module(x)
            if i - 1 in self.out_indices:
                maps.append(x)
        return tuple(maps)

    def _forward_deployed(self, x: Tensor) -> tuple[Tensor, ...]:
        """Run in the precision of the weights."""
        if x.requires_grad and torch.is_grad_enabled():
            raise UserError('the deployed form has no gradients: the condensed form has them')
        stem, *blocks = self.features.values()
        work = {}
        if x.device.type == 'cpu' and not torch.compiler.is_compiling():
            work = self._local.workspace
        maps = []
        with torch.autocast(x.device.type, enabled=False):
            # The stem is several times faster in channels-last.
            x = stem(x.to(stem.weight.dtype).contiguous(memory_format=torch.channels_last))
            for block in blocks:
                x = block(x, work)
                maps.append(x)
        return tuple(maps[i] for i in self.out_indices)
