"""RDNet: `DenseNets Reloaded <https://arxiv.org/abs/2403.19588>`_ (ECCV 2024).

A patch stem and 7 to 12 dense stages. Each block reads the concatenation of the stage's input and
the outputs of all earlier blocks, and adds ``growth`` channels. Between dense stages a norm and a
convolution halve the channels, and the resolution where a new stride begins. Feature maps are taken
at the end of the last dense stage of each stride, before that norm.

Parameter names are those of timm's ``rdnet_*``; tests compare the outputs.
"""

import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from timm.layers import DropPath, EffectiveSEModule
from torch import Tensor, nn
from torch.nn import functional as F

from mmdense.models.backbones.base import Backbone, resolve_arch
from mmdense.models.layers import lean_conv, plain_conv, recompute
from mmdense.registry import MODELS

# memory='lean' recomputes the hidden layer too in blocks with fewer channels: these products take
# little time for the memory that they save, by measurement.
RECOMPUTE_BELOW = 250


def _concatenate(*features: Tensor) -> Tensor:
    return torch.cat(features, 1)


def _without_autocast(x: Tensor) -> torch.autocast:
    # The meta device, on which MACs are counted, has no autocast.
    return torch.autocast('cpu' if x.is_meta else x.device.type, enabled=False)


def _eighths(channels: float) -> int:
    return int(channels / 8) * 8


@dataclass(frozen=True)
class Arch:
    """Shape of an RDNet; dense stages count from 0."""

    stem: int  # channels after the 4 x 4 patch stem
    growth: tuple[int, ...]  # channels that each block adds, one number per dense stage
    down: tuple[int, ...]  # dense stages that begin by halving the resolution
    blocks: int = 3  # per dense stage
    gate_from: int = 2  # first dense stage whose blocks end in a squeeze-excite gate
    layer_scale: float = 1e-6  # initial value of the learned scale of each block's output

    def __post_init__(self) -> None:
        last = len(self.growth) - 1
        if last < 0 or min(self.stem, self.blocks, *self.growth) < 1:
            raise ValueError(f'stem, blocks and each growth must be positive: {self}')
        if list(self.down) != sorted(set(self.down)) or any(not 1 <= i <= last for i in self.down):
            raise ValueError(f'down must increase within 1 to {last}: {self.down}')
        if any(channels < 8 for channels in self.channels()[0][1:]):
            raise ValueError(f'fewer than 16 channels at the end of a dense stage: {self}')

    def channels(self) -> tuple[list[int], list[int]]:
        """Return the channels at the beginning and at the end of each dense stage."""
        inputs, outputs = [], []
        for growth in self.growth:
            inputs.append(_eighths(outputs[-1] * 0.5) if outputs else self.stem)
            outputs.append(inputs[-1] + self.blocks * growth)
        return inputs, outputs


ARCHS = dict(
    tiny=Arch(stem=64, growth=(64, 104, *[128] * 4, 224), down=(1, 2, 6)),
    small=Arch(stem=72, growth=(64, 128, *[128] * 7, 240, 240), down=(1, 2, 9)),
    base=Arch(stem=120, growth=(96, 128, *[168] * 7, 336, 336), down=(1, 2, 9)),
    large=Arch(stem=144, growth=(128, 192, *[256] * 8, 360, 360), down=(1, 2, 10)),
)


class ChannelNorm(nn.LayerNorm):
    """LayerNorm over the channels of [N, C, H, W], in the type of the features.

    Autocast would run it in float32 on a GPU, whose kernel computes only the statistics so.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = self.weight, self.bias
        if torch.compiler.is_compiling():  # inductor fuses the casts
            wide = torch.promote_types(x.dtype, torch.float32)
            with _without_autocast(x):
                return (
                    super().forward(x.permute(0, 2, 3, 1).to(wide)).permute(0, 3, 1, 2).to(x.dtype)
                )
        if x.is_cuda:  # whose kernel takes one type; the CPU's is more precise with two
            weight, bias = weight.to(x.dtype), bias.to(x.dtype)
        with _without_autocast(x):
            x = F.layer_norm(x.permute(0, 2, 3, 1), self.normalized_shape, weight, bias, self.eps)
        return x.permute(0, 3, 1, 2)


class OutputNorm(nn.GroupNorm):
    """GroupNorm(1) of [N, C, H, W], in the memory format and the type of the features.

    It computes in float32 at least and rounds once, without a copy of x in another layout or type.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(1, channels)

    def forward(self, x: Tensor) -> Tensor:
        axes, size = (1, 2, 3), math.prod(x.shape[1:])
        wide = torch.promote_types(x.dtype, torch.float32)
        if not x.is_cuda or torch.compiler.is_compiling():  # CUDA's kernel copies channels-last
            weight, bias = self.weight.to(wide), self.bias.to(wide)
            with _without_autocast(x):
                return F.group_norm(x.to(wide), 1, weight, bias, self.eps).to(x.dtype)
        with _without_autocast(x):
            if x.dtype == wide:
                variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
            else:  # no copy in float32; a half type's own rounding hides that of the difference
                mean = x.mean(axes, keepdim=True, dtype=wide)
                length = torch.linalg.vector_norm(x, dim=axes, keepdim=True, dtype=wide)
                variance = (length.square() / size - mean.square()).clamp(min=0)
            scale = self.weight.view(1, -1, 1, 1) * (variance + self.eps).rsqrt()
            shift = self.bias.view(1, -1, 1, 1) - mean * scale
            return torch.addcmul(shift, x, scale).to(x.dtype)


class MixBlock(nn.Module):
    """Map all features of the dense stage, [N, C, H, W] in total, to ``growth`` new channels."""

    def __init__(
        self,
        channels: int,
        growth: int,
        *,
        gated: bool,
        layer_scale: float,
        drop_path: float,
        memory: str,
    ) -> None:
        super().__init__()
        hidden = _eighths(channels * 4)
        layers = [
            nn.Conv2d(channels, channels, 7, padding=3, groups=channels),
            ChannelNorm(channels),
            nn.Conv2d(channels, hidden, 1),
            nn.GELU(),
            nn.Conv2d(hidden, growth, 1),
        ]
        if gated:
            layers.append(EffectiveSEModule(growth))
        # As in timm: dense_block0.layers.layers.0.weight
        self.layers = nn.Sequential(OrderedDict(layers=nn.Sequential(*layers)))
        self.gamma = nn.Parameter(torch.full((growth,), layer_scale))
        self.drop_path = DropPath(drop_path)
        self.conv = lean_conv if memory == 'lean' else plain_conv

    def forward(self, features: list[Tensor]) -> Tensor:
        depthwise, norm, widen, activation, narrow, *gate = self.layers.layers
        x = self.conv((_concatenate,), depthwise, *features)
        if widen.in_channels < RECOMPUTE_BELOW and not torch.compiler.is_compiling():
            x = self.conv((norm, widen, activation), narrow, x)
        else:
            x = self.conv((activation,), narrow, self.conv((norm,), widen, x))
        scale = self.gamma.view(1, -1, 1, 1)
        for module in gate:
            # Both scales in one product, or autograd would save the value in between.
            scale = scale * module.gate(module.fc(x.mean((2, 3), keepdim=True)))
        # Under autocast the scale is cast: otherwise the features would become float32.
        return self.drop_path(x * scale.to(x.dtype))


class DenseStage(nn.Sequential):
    """Mix blocks; each reads the stage's input and the outputs of all earlier blocks."""

    def __init__(self, blocks: Sequence[MixBlock], *, memory: str) -> None:
        super().__init__(OrderedDict((f'dense_block{i}', b) for i, b in enumerate(blocks)))
        self.memory = memory

    def forward(self, x: Tensor) -> Tensor:
        features = [x]
        for block in self:
            # Only the features are saved; the concatenation is recomputed in backward.
            saves = self.memory == 'recompute'
            features.append(recompute(block, features[:]) if saves else block(features))
        return torch.cat(features, 1)


@MODELS.register_module()
class RDNet(Backbone):
    """RDNet with feature maps at strides 4, 8, 16 and 32.

    Heights and widths are rounded down at each halving, as in timm. ``memory='lean'`` takes about
    half the memory of training, for 1.15 times the time on a CPU. Others: see :class:`Backbone`;
    ``norm_eval`` has no effect, since RDNet's norms have no running statistics.

    Args:
        arch: 'tiny', 'small', 'base', 'large', or a dict of :class:`Arch`'s fields; the number of
            feature maps is one more than the number of entries in ``down``.
        output_norm: Add one GroupNorm(1) per returned feature map, as the published detectors do
            (the published segmentors don't).
        drop_path_rate: Stochastic depth of the last block; it rises linearly from 0.
    """

    archs = ARCHS
    weights = {arch: f'timm://rdnet_{arch}.nv_in1k' for arch in ARCHS}
    detector_recipe = dict(output_norm=True)
    not_pretrained = ('output_norms.',)

    def __init__(
        self,
        *,
        arch: str | Mapping[str, Any] = 'tiny',
        out_indices: int | Sequence[int] | None = None,
        output_norm: bool = False,
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        in_channels: int = 3,
        memory: str = 'plain',
        with_cp: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        arch = resolve_arch(arch, ARCHS)
        num_stages = len(arch.growth)
        inputs, outputs = arch.channels()
        ends = [i - 1 for i in arch.down] + [num_stages - 1]
        super().__init__(
            map_channels=[outputs[i] for i in ends],
            map_strides=[4 * 2**i for i in range(len(ends))],
            out_indices=out_indices,
            frozen_stages=frozen_stages,
            norm_eval=norm_eval,
            memory=memory,
            with_cp=with_cp,
            init_cfg=init_cfg,
        )
        self._ends = ends
        self._blocks = arch.blocks
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, arch.stem, 4, stride=4), ChannelNorm(arch.stem)
        )
        num_blocks = num_stages * arch.blocks
        rates = [drop_path_rate * i / max(num_blocks - 1, 1) for i in range(num_blocks)]
        self.dense_stages = nn.Sequential()
        for i in range(ends[self.out_indices[-1]] + 1):
            layers = []
            if i:
                stride = 2 if i in arch.down else 1
                layers += [
                    ChannelNorm(outputs[i - 1]),
                    nn.Conv2d(outputs[i - 1], inputs[i], stride, stride=stride),
                ]
            blocks = [
                MixBlock(
                    inputs[i] + b * arch.growth[i],
                    arch.growth[i],
                    gated=i >= arch.gate_from,
                    layer_scale=arch.layer_scale,
                    drop_path=rates[i * arch.blocks + b],
                    memory=self.memory,
                )
                for b in range(arch.blocks)
            ]
            layers.append(DenseStage(blocks, memory=self.memory))
            self.dense_stages.append(nn.Sequential(*layers))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        self.output_norms = nn.ModuleDict()
        if output_norm:
            for index, channels in zip(self.out_indices, self.out_channels, strict=True):
                self.output_norms[str(index)] = OutputNorm(channels)
        self._freeze()

    def switch_to_deploy(self) -> None:
        """Switch to evaluation in channels-last, in place; see :class:`Backbone`.

        Layers and weights stay as they are: folding has not made the compiled network faster.
        """
        self._finish_deploy()

    def _stage_modules(self, stage: int) -> list[nn.Module]:
        if stage == 0:
            return [self.stem]
        ends = [-1, *self._ends]
        return list(self.dense_stages[ends[stage - 1] + 1 : ends[stage] + 1])

    def _layer_depths(self, granularity: str) -> tuple[Mapping[str, int], int]:
        per_stage = self._blocks if granularity == 'layer' else 1
        depths = {'stem': 0}
        for i, stage in enumerate(self.dense_stages):
            first = 1 + i * per_stage
            if granularity == 'layer':
                dense = f'dense_stages.{i}.{len(stage) - 1}'
                depths |= {f'{dense}.dense_block{b}': first + b for b in range(per_stage)}
            depths[f'dense_stages.{i}'] = first  # the norm and the convolution before it
        last = 1 + (self._ends[-1] + 1) * per_stage
        return {**depths, 'output_norms': last}, last + 1

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return feature maps [N, C_i, H // s_i, W // s_i] for images [N, in_channels, H, W]."""
        self._check_size(x)
        x = self.stem(x)
        maps = []
        for i, stage in enumerate(self.dense_stages):
            x = stage(x)
            if i in self._ends and self._ends.index(i) in self.out_indices:
                index = str(self._ends.index(i))
                maps.append(self.output_norms[index](x) if index in self.output_norms else x)
        return tuple(maps)
