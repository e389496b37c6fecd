"""ReXNet: `Rethinking Channel Dimensions for Efficient Model Design
<https://arxiv.org/abs/2007.00992>`_ (CVPR 2021).

A stem and 16 inverted bottlenecks whose channels grow linearly from block to block, then a 1x1
convolution to many channels, which a classifier reads. Feature maps are taken at the end of each
resolution, or as in the ReXNet U-Net: after the first block of each resolution, and after the 1x1
convolution.

ReXNet-lite is the authors' variant for fast inference: no gates, ReLU6 throughout, and channels in
multiples of 8. Parameter names are those of timm's ``rexnet_*``; tests compare the outputs.
"""

from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil, sqrt
from typing import Any

import torch
from timm.layers import DropPath, SEModule, make_divisible
from torch import Tensor, nn
from torch.nn import functional as F

from mmdense.models.backbones.base import FUSE_MORE, Backbone, resolve_arch
from mmdense.models.deploy.rexnet import DeployedBottleneck, DeployedConv
from mmdense.models.layers import lean_conv, plain_conv, recompute
from mmdense.registry import MODELS

# Per group: blocks (at depth 1), stride of the first block.
GROUPS = ((1, 1), (2, 2), (2, 2), (3, 2), (3, 1), (5, 2))
EXPANDED_FROM, GATED_FROM = 1, 2
TAPS = ('stages', 'unet')


@dataclass(frozen=True)
class Arch:
    """Shape of a ReXNet; stem and first block don't fall below the channels of width 1."""

    width: float  # multiplier of the channels
    depth: float = 1.0  # multiplier of the blocks per group, which are rounded up
    first: int = 16  # channels of the first block at width 1
    growth: int = 180  # channels that all blocks together add to these, at width 1
    lite: bool = False  # ReXNet-lite

    def __post_init__(self) -> None:
        if min(self.width, self.depth) <= 0 or self.first < 1 or self.growth < 0:
            raise ValueError(
                f'width, depth and first must be positive, growth not negative: {self}'
            )

    def groups(self) -> list[int]:
        """Return the number of blocks in each group."""
        return [ceil(blocks * self.depth) for blocks, _ in GROUPS]

    def channels(self) -> tuple[int, list[int], int]:
        """Return the channels of the stem, of each block, and of the last convolution."""
        number = sum(self.groups())
        thin = min(self.width, 1)  # cancels a width below 1 for the stem and the first block
        blocks, base = [], self.first / thin
        for _ in range(number):
            blocks.append(self._rounded(base * self.width))
            # A sum, as published: a product would round differently. ReXNet-lite counts the steps.
            base += self.growth / (number - self.lite)
        last = 1280 * (max(self.width, 1) if self.lite else self.width)
        return self._rounded(32 / thin * self.width), blocks, self._rounded(last)

    def _rounded(self, channels: float) -> int:
        return make_divisible(round(channels), 8 if self.lite else 1)


ARCHS = {f'{w}': Arch(width=w) for w in (0.9, 1.0, 1.3, 1.5, 2.0, 2.2, 3.0)}
ARCHS |= {f'lite-{w}': Arch(width=w, growth=164, lite=True) for w in (1.0, 1.3, 1.5, 2.0)}


# In place, unless autograd saves the input: it would have to be copied.
class _SiLU(nn.SiLU):
    def forward(self, x: Tensor) -> Tensor:
        return F.silu(x, self.inplace and not x.requires_grad)


class _ReLU6(nn.ReLU6):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu6(x, self.inplace and not x.requires_grad)


class _AddToFirst(torch.autograd.Function):
    """Add a tensor with fewer channels to the first channels of x, in place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, shortcut: Tensor) -> Tensor:
        ctx.mark_dirty(x)
        ctx.channels = shortcut.shape[1]
        x[:, : ctx.channels].add_(shortcut)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, grad[:, : ctx.channels]


def _conv_norm(
    in_channels: int,
    channels: int,
    kernel: int = 1,
    *,
    stride: int = 1,
    groups: int = 1,
    act: type[nn.Module] | None = None,
) -> nn.Sequential:
    # timm's ConvNormAct has the same parameter names, but its norm contains the activation, which
    # conversion to SyncBatchNorm or folding would silently drop.
    layers = OrderedDict(
        conv=nn.Conv2d(
            in_channels, channels, kernel, stride, kernel // 2, groups=groups, bias=False
        ),
        bn=nn.BatchNorm2d(channels),
    )
    if act:
        layers['act'] = act(inplace=True)
    return nn.Sequential(layers)


def init_convs(module: nn.Module) -> None:
    """Initialize convolutions as timm's ReXNet does: normal by fan-out, biases zero."""
    for conv in module.modules():
        if isinstance(conv, nn.Conv2d):
            # Per group: torch's kaiming_normal_ would count a depthwise fan-out over all channels.
            fan_out = conv.kernel_size[0] * conv.kernel_size[1] * conv.out_channels // conv.groups
            nn.init.normal_(conv.weight, std=sqrt(2 / fan_out))
            if conv.bias is not None:
                nn.init.zeros_(conv.bias)


class LinearBottleneck(nn.Module):
    """Map [N, C_in, H, W] to [N, C_out, ceil(H / stride), ceil(W / stride)].

    The depthwise convolution has ``expansion`` times C_in channels, ``act`` is the activation
    before it, ``gated`` squeeze-excites to a twelfth of the channels, and ``shortcut`` adds the
    input to the first C_in channels, where stride and channels allow it. ``drop_path`` is the
    probability that a sample skips a block with a shortcut.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        stride: int = 1,
        expansion: int = 1,
        gated: bool = False,
        act: type[nn.Module] = _SiLU,
        shortcut: bool = True,
        drop_path: float = 0.0,
        memory: str = 'plain',
    ) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.conv_exp = _conv_norm(in_channels, hidden, act=act) if expansion > 1 else None
        self.conv_dw = _conv_norm(hidden, hidden, 3, stride=stride, groups=hidden)
        self.se = None
        if gated:
            reduced = max(hidden // 12, 1)
            self.se = SEModule(hidden, rd_channels=reduced, norm_layer=nn.BatchNorm2d)
        self.act_dw = _ReLU6(inplace=True)
        self.conv_pwl = _conv_norm(hidden, out_channels)
        self.drop_path = None
        if shortcut and stride == 1 and in_channels <= out_channels:
            self.drop_path = DropPath(drop_path)
        self.conv = lean_conv if memory == 'lean' else plain_conv

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x
        chain = []
        if self.conv_exp is not None:
            x = self.conv_exp.conv(x)
            chain = [self.conv_exp.bn, self.conv_exp.act]
        x = self.conv(chain, self.conv_dw.conv, x)
        chain = [self.conv_dw.bn, *([self.se] if self.se else []), self.act_dw]
        x = self.conv_pwl.bn(self.conv(chain, self.conv_pwl.conv, x))
        if self.drop_path is None:
            return x
        x = self.drop_path(x)
        if torch.compiler.is_compiling() or torch.jit.is_tracing():
            channels = shortcut.shape[1]
            return torch.cat([x[:, :channels] + shortcut, x[:, channels:]], 1)
        return _AddToFirst.apply(x, shortcut)


@MODELS.register_module()
class ReXNet(Backbone):
    """ReXNet with feature maps at strides 2 to 32.

    Heights and widths are rounded up at each halving, as in timm. ``memory='lean'`` takes about
    40 % of the memory of training, for 1.2 times the time on a CPU. Others: see :class:`Backbone`.

    The squeeze-excite gates normalize one value per image and channel: train with at least two
    images per process (or in all processes, with SyncBatchNorm), or with ``norm_eval=True``. With a
    single image torch raises 'Expected more than 1 value per channel when training'.

    Args:
        arch: '0.9', '1.0', '1.3', '1.5', '2.0', '2.2', '3.0', ReXNet-lite's 'lite-1.0', 'lite-1.3',
            'lite-1.5', 'lite-2.0', or a dict of :class:`Arch`'s fields.
        taps: Where five of six feature maps are taken: 'stages' at the end of strides 2, 4, 8, 16
            and 32 (16, 38, 61, 128 and 185 channels at width 1), 'unet' after the first block of
            each stride (16, 27, 50, 72 and 140). The sixth is the last convolution's, at stride 32
            (1280 channels).
        out_indices: None returns strides 4 to 32, (1, 2, 3, 4), of 'stages', and all six of 'unet'.
        drop_path_rate: Stochastic depth of the last block; it rises linearly from 0.
    """

    archs = ARCHS
    weights = {f'{w / 100}': f'timm://rexnet_{w}.nav_in1k' for w in (100, 130, 150, 200, 300)}
    compile_options = FUSE_MORE
    form_marks = dict(trained='stem.bn.weight', deployed='stem.conv.bias')

    def __init__(
        self,
        *,
        arch: str | Mapping[str, Any] = '1.0',
        taps: str = 'stages',
        out_indices: int | Sequence[int] | None = None,
        drop_path_rate: float = 0.0,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        in_channels: int = 3,
        memory: str = 'plain',
        with_cp: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        if taps not in TAPS:
            raise ValueError(f'taps is {taps!r}, must be one of {TAPS}')
        arch = resolve_arch(arch, ARCHS)
        stem, channels, last = arch.channels()
        groups = [
            (group, stride if first else 1)
            for group, ((_, stride), blocks) in enumerate(zip(GROUPS, arch.groups(), strict=True))
            for first in (True, *[False] * (blocks - 1))
        ]
        num_blocks = len(groups)
        # Blocks that begin a resolution.
        begins = [0] + [i for i, (_, stride) in enumerate(groups) if stride > 1]
        if taps == 'unet':
            ends = [*begins, num_blocks]
        else:
            ends = [i - 1 for i in begins[1:]] + [num_blocks - 1, num_blocks]
            if out_indices is None:
                out_indices = range(1, 5)
        super().__init__(
            map_channels=[[*channels, last][i] for i in ends],
            map_strides=(2, 4, 8, 16, 32, 32),
            out_indices=out_indices,
            frozen_stages=frozen_stages,
            norm_eval=norm_eval,
            memory=memory,
            with_cp=with_cp,
            init_cfg=init_cfg,
        )
        self._ends = ends
        act = _ReLU6 if arch.lite else _SiLU
        self.stem = _conv_norm(in_channels, stem, 3, stride=2, act=act)
        built = ends[self.out_indices[-1]] + 1
        inputs = [stem, *channels]
        self.features = nn.ModuleList(
            LinearBottleneck(
                inputs[i],
                channels[i],
                stride=stride,
                expansion=6 if group >= EXPANDED_FROM else 1,
                gated=group >= GATED_FROM and not arch.lite,
                act=act,
                drop_path=drop_path_rate * i / (num_blocks - 1),
                memory=self.memory,
            )
            for i, (group, stride) in enumerate(groups[:built])
        )
        if built > num_blocks:
            self.features.append(_conv_norm(channels[-1], last, act=act))
        init_convs(self)
        self._freeze()

    def switch_to_deploy(self) -> None:
        """Switch to the channels-last inference form, in place; see :class:`Backbone`."""
        if self.form == 'deployed':
            return
        self.stem = DeployedConv(self.stem)
        self.features = nn.ModuleList(
            DeployedBottleneck(block)
            if isinstance(block, LinearBottleneck)
            else DeployedConv(block)
            for block in self.features
        )
        self._finish_deploy()

    def _stage_modules(self, stage: int) -> list[nn.Module]:
        if stage == 0:
            return [self.stem]
        ends = [-1, *self._ends]
        return list(self.features[ends[stage - 1] + 1 : ends[stage] + 1])

    def _layer_depths(self, granularity: str) -> tuple[Mapping[str, int], int]:
        # The last convolution has the depth of the last block.
        last_block = self._ends[-1] - 1
        depth_of = {
            i: 1 + (i if granularity == 'layer' else bisect_left(self._ends, i))
            for i in range(last_block + 1)
        }
        last = depth_of[last_block]
        depths = {f'features.{i}': depth_of.get(i, last) for i in range(len(self.features))}
        return {'stem': 0, **depths}, last + 2

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return feature maps [N, C_i, ceil(H / s_i), ceil(W / s_i)] for [N, in_channels, H, W]."""
        self._check_size(x)
        x = self.stem(x)
        returned = [self._ends[i] for i in self.out_indices]
        maps = []
        for i, block in enumerate(self.features):
            # Backward begins with the last block: recomputing it would save nothing.
            again = self.memory == 'recompute' and block is not self.features[-1]
            x = recompute(block, x) if again else block(x)
            if i in returned:
                maps.append(x)
        return tuple(maps)
