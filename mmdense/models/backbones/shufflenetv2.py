"""ShuffleNetV2: `Practical Guidelines for Efficient CNN Architecture Design
<https://arxiv.org/abs/1807.11164>`_ (ECCV 2018).

A convolution and a pooling to stride 4, three stages of units that convolve half of the channels
and shuffle them with the other half, then a 1x1 convolution to many channels, which a classifier
reads. Feature maps are taken after the pooling, each stage and the last convolution.

Parameter names are those of torchvision's ``shufflenet_v2_*``; tests compare the outputs.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.shufflenetv2 import InvertedResidual
from torchvision.ops import Conv2dNormActivation

from mmdense.models.backbones.base import Backbone, resolve_arch
from mmdense.models.layers import recompute
from mmdense.registry import MODELS


@dataclass(frozen=True)
class Arch:
    """Shape of a ShuffleNetV2."""

    channels: tuple[int, int, int]  # of the three stages, even
    units: tuple[int, int, int] = (4, 8, 4)  # per stage; the first one halves the resolution
    stem: int = 24  # channels of the first convolution
    last: int = 1024  # channels of the last convolution

    def __post_init__(self) -> None:
        if len(self.channels) != 3 or len(self.units) != 3:
            raise ValueError(f'channels and units need one number for each of three stages: {self}')
        if min(*self.channels, *self.units, self.stem, self.last) < 1:
            raise ValueError(f'channels, units, stem and last must be positive: {self}')
        if any(channels % 2 for channels in self.channels):
            raise ValueError(f'channels must be even: {self}')


ARCHS = {
    '0.5': Arch(channels=(48, 96, 192)),
    '1.0': Arch(channels=(116, 232, 464)),
    '1.5': Arch(channels=(176, 352, 704)),
    '2.0': Arch(channels=(244, 488, 976), last=2048),
}


class Unit(InvertedResidual):
    """Map [N, C_in, H, W] to [N, C_out, ceil(H / stride), ceil(W / stride)].

    torchvision's unit, but channels-last inputs give channels-last outputs.
    """

    def forward(self, x: Tensor) -> Tensor:
        left, right = (x, x) if self.stride > 1 else x.chunk(2, dim=1)
        left, right = self.branch1(left), self.branch2(right)
        # Interleaving two branches equals concatenating and shuffling them.
        if right.is_contiguous(memory_format=torch.channels_last):
            left, right = left.permute(0, 2, 3, 1), right.permute(0, 2, 3, 1)
            return torch.stack((left, right), 4).flatten(3).permute(0, 3, 1, 2)
        return torch.stack((left, right), 2).flatten(1, 2)


@MODELS.register_module()
class ShuffleNetV2(Backbone):
    """ShuffleNetV2 with feature maps at strides 4, 8, 16 and 32, and the last convolution's at 32.

    Heights and widths are rounded up at each halving. Other arguments: see :class:`Backbone`;
    ``memory`` has no 'lean' mode here.

    Args:
        arch: '0.5', '1.0', '1.5', '2.0', or a dict of :class:`Arch`'s fields.
        out_indices: 0 is the pooled stem, 1 to 3 are the stages and 4 is the last convolution.
        frozen_stages: Stage 1 is the pooling, which has no parameters.
    """

    archs = ARCHS
    weights = {
        arch: f'torchvision://shufflenet_v2_x{arch.replace(".", "_")}.imagenet1k_v1'
        for arch in ARCHS
    }
    memory_modes = ('plain', 'recompute')

    def __init__(
        self,
        *,
        arch: str | Mapping[str, Any] = '1.0',
        out_indices: int | Sequence[int] = (0, 1, 2, 3),
        frozen_stages: int = -1,
        norm_eval: bool = False,
        in_channels: int = 3,
        memory: str = 'plain',
        with_cp: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        arch = resolve_arch(arch, ARCHS)
        channels = (arch.stem, *arch.channels, arch.last)
        super().__init__(
            map_channels=channels,
            map_strides=(4, 8, 16, 32, 32),
            out_indices=out_indices,
            frozen_stages=frozen_stages,
            norm_eval=norm_eval,
            memory=memory,
            with_cp=with_cp,
            init_cfg=init_cfg,
        )
        self._units = arch.units
        self.conv1 = Conv2dNormActivation(in_channels, arch.stem, 3, 2)
        self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self._parts = ['maxpool', 'stage2', 'stage3', 'stage4', 'conv5'][: self.out_indices[-1] + 1]
        for i, name in enumerate(self._parts[1:4]):
            units = [
                Unit(channels[i + (j > 0)], channels[i + 1], 1 if j else 2)
                for j in range(arch.units[i])
            ]
            self.add_module(name, nn.Sequential(*units))
        if 'conv5' in self._parts:
            self.conv5 = Conv2dNormActivation(channels[3], arch.last, 1)
        self._freeze()

    def _stage_modules(self, stage: int) -> list[nn.Module]:
        names = ['conv1', *self._parts][stage : stage + 1]
        return [self.get_submodule(name) for name in names]

    def _layer_depths(self, granularity: str) -> tuple[Mapping[str, int], int]:
        # The last convolution has the depth of the last unit.
        depths, last = {'conv1': 0}, 0
        for stage, units in enumerate(self._units, 2):
            first, last = last + 1, last + (units if granularity == 'layer' else 1)
            depths |= {f'stage{stage}.{j}': min(first + j, last) for j in range(units)}
        return {**depths, 'conv5': last}, last + 2

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return feature maps [N, C_i, ceil(H / s_i), ceil(W / s_i)] for [N, in_channels, H, W]."""
        self._check_size(x)
        x = self.conv1(x)
        maps = []
        for i, name in enumerate(self._parts):
            part = getattr(self, name)
            if self.memory == 'recompute' and name.startswith('stage'):
                for unit in part:
                    x = recompute(unit, x)
            else:
                x = part(x)
            if i in self.out_indices:
                maps.append(x)
        return tuple(maps)
