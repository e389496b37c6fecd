"""DenseNet: `Densely Connected Convolutional Networks <https://arxiv.org/abs/1608.06993>`_.

Every layer of a block reads the concatenation of the block's input and the outputs of all earlier
layers, and adds ``growth_rate`` channels. Between blocks a transition reduces the channels and
halves the resolution. Feature maps are taken at the end of each block, before its transition, at
strides 4, 8, 16 and 32.

Parameter names are those of timm's and torchvision's ``densenet*``; tests compare the outputs.
"""

import dataclasses
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from mmcv.cnn import build_norm_layer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from mmdense.models.backbones._densenet_lean import can_be_lean, lean_block
from mmdense.models.backbones._densenet_shared import can_share, shared_block
from mmdense.models.backbones.base import FUSE_MORE, Backbone, resolve_arch
from mmdense.models.deploy.densenet import (
    DeployedBlock,
    DeployedNorm,
    DeployedStem,
    DeployedTransition,
)
from mmdense.models.layers import lean_conv, plain_conv, recompute
from mmdense.models.layers.lean import saves_memory
from mmdense.registry import MODELS

STEMS = ('imagenet', 'deep', 'cifar')
TAPS = ('block', 'activated')
BN = dict(type='BN')


@dataclass(frozen=True)
class Arch:
    """Shape of a DenseNet.

    The stem is 'imagenet' (7 x 7 convolution of stride 2, then pooling), 'deep' (three 3 x 3
    convolutions, then pooling) or 'cifar' (one 3 x 3 convolution, no stride).
    """

    growth_rate: int  # channels that each layer adds (k of the paper)
    layers: tuple[int, ...]  # per block
    stem: str = 'imagenet'
    stem_channels: int | None = None  # after the stem; twice the growth rate by default
    bottleneck: bool = True  # a 1 x 1 convolution to 4k channels before each 3 x 3 one (DenseNet-B)
    reduction: float = 0.5  # share of the channels that a transition keeps, above 0, at most 1

    def __post_init__(self) -> None:
        if not self.layers or min(self.growth_rate, *self.layers, self.inputs()[0]) < 1:
            raise ValueError(
                f'growth_rate, stem_channels and each of layers must be positive: {self}'
            )
        if self.stem not in STEMS:
            raise ValueError(f'stem is {self.stem!r}, must be one of {STEMS}')
        if not 0 < self.reduction <= 1 or min(self.inputs()) < 1:
            raise ValueError(f'reduction must leave channels, and be at most 1: {self}')

    def inputs(self) -> list[int]:
        """Return the channels at the beginning of each block."""
        inputs = [2 * self.growth_rate if self.stem_channels is None else self.stem_channels]
        for layers in self.layers[:-1]:
            inputs.append(int((inputs[-1] + layers * self.growth_rate) * self.reduction))
        return inputs

    def outputs(self) -> list[int]:
        """Return the channels at the end of each block."""
        return [
            channels + layers * self.growth_rate
            for channels, layers in zip(self.inputs(), self.layers, strict=True)
        ]


ARCHS = {
    '121': Arch(growth_rate=32, layers=(6, 12, 24, 16)),
    '161': Arch(growth_rate=48, layers=(6, 12, 36, 24)),
    '169': Arch(growth_rate=32, layers=(6, 12, 32, 32)),
    '201': Arch(growth_rate=32, layers=(6, 12, 48, 32)),
    '264': Arch(growth_rate=32, layers=(6, 12, 64, 48)),
    '232-k48': Arch(growth_rate=48, layers=(6, 12, 48, 48)),
    '264-k48': Arch(growth_rate=48, layers=(6, 12, 64, 48)),
}


def _norm(norm_cfg: Mapping[str, Any], channels: int) -> nn.Module:
    return build_norm_layer(dict(norm_cfg), channels)[1]


class DenseLayer(nn.Module):
    """Map all features of the block, [N, C, H, W] in total, to ``growth_rate`` new channels."""

    def __init__(
        self, channels: int, arch: Arch, norm_cfg: Mapping[str, Any], drop_rate: float
    ) -> None:
        super().__init__()
        growth = arch.growth_rate
        self.norm1 = _norm(norm_cfg, channels)
        if arch.bottleneck:
            self.conv1 = nn.Conv2d(channels, 4 * growth, 1, bias=False)
            self.norm2 = _norm(norm_cfg, 4 * growth)
            self.conv2 = nn.Conv2d(4 * growth, growth, 3, padding=1, bias=False)
        else:
            self.conv1 = nn.Conv2d(channels, growth, 3, padding=1, bias=False)
        self.bottleneck = arch.bottleneck
        self.drop = nn.Dropout(drop_rate)

    def forward(self, features: list[Tensor]) -> Tensor:
        x = self.drop(self.conv1(F.relu(self.norm1(torch.cat(features, 1)))))
        if self.bottleneck:
            x = self.drop(self.conv2(F.relu(self.norm2(x))))
        return x


class DenseBlock(nn.Sequential):
    """Dense layers; each reads the block's input and the outputs of all earlier layers."""

    def __init__(self, layers: Sequence[DenseLayer], *, memory: str) -> None:
        super().__init__(OrderedDict((f'denselayer{i}', m) for i, m in enumerate(layers, 1)))
        self.memory = memory
        self.may_share = False  # set by DenseNet.compile

    def forward(self, x: Tensor) -> Tensor:
        if self.may_share and torch.compiler.is_compiling() and can_share(self, x):
            return shared_block(self, x)
        if self.memory == 'lean' and saves_memory() and can_be_lean(self):
            return lean_block(self, x)
        features = [x]
        for layer in self:
            # Only the features are saved; the concatenation is recomputed in backward.
            saves = self.memory == 'recompute'
            features.append(recompute(layer, features[:]) if saves else layer(features))
        return torch.cat(features, 1)


@MODELS.register_module()
class DenseNet(Backbone):
    """DenseNet with feature maps at strides 4, 8, 16 and 32 (1, 2 and 4 with the 'cifar' stem).

    Heights and widths are rounded up by the stem and down by each transition, as in timm.
    ``memory='lean'`` takes a quarter of the memory of training in about the same time. Other
    arguments: see :class:`Backbone`.

    Args:
        arch: '121', '161', '169', '201', '264', '232-k48', '264-k48', or a dict of :class:`Arch`'s
            fields; there is one feature map per block.
        growth_rate: Replaces the architecture's; so do the next three.
        bottleneck: False for a plain DenseNet, with 3 x 3 convolutions only.
        reduction: Share of the channels that a transition keeps.
        stem: 'imagenet', 'deep' or 'cifar'.
        tap: 'block' returns the blocks' concatenations, the last one after the network's last norm
            and ReLU, as timm does; 'activated' returns all feature maps after the norm and the ReLU
            that follow them.
        drop_rate: Dropout after each convolution but the first, as in the paper (torchvision: after
            3 x 3 convolutions only).
        norm_cfg: mmcv's config of the norms: BN, or SyncBN.
    """

    archs = ARCHS
    weights = {
        '121': 'timm://densenet121.ra_in1k',
        **{arch: f'timm://densenet{arch}.tv_in1k' for arch in ('161', '169', '201')},
    }
    compile_options = FUSE_MORE
    recipe = dict(tap='activated')
    form_marks = dict(trained='.running_mean', deployed=('.norm1.low', '.norm1.scale'))

    def __init__(
        self,
        *,
        arch: str | Mapping[str, Any] = '121',
        growth_rate: int | None = None,
        bottleneck: bool | None = None,
        reduction: float | None = None,
        stem: str | None = None,
        tap: str = 'block',
        out_indices: int | Sequence[int] | None = None,
        drop_rate: float = 0.0,
        frozen_stages: int = -1,
        norm_cfg: Mapping[str, Any] = BN,
        norm_eval: bool = False,
        in_channels: int = 3,
        memory: str = 'plain',
        with_cp: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        fields = dict(
            growth_rate=growth_rate, bottleneck=bottleneck, reduction=reduction, stem=stem
        )
        arch = dataclasses.replace(
            resolve_arch(arch, ARCHS), **{k: v for k, v in fields.items() if v is not None}
        )
        if tap not in TAPS:
            raise ValueError(f'tap is {tap!r}, must be one of {TAPS}')
        if not 0 <= drop_rate < 1:
            raise ValueError(f'drop_rate is {drop_rate}, must be from 0 to below 1')
        inputs, outputs = arch.inputs(), arch.outputs()
        first_stride = 1 if arch.stem == 'cifar' else 4
        super().__init__(
            map_channels=outputs,
            map_strides=[first_stride * 2**i for i in range(len(outputs))],
            out_indices=out_indices,
            frozen_stages=frozen_stages,
            norm_eval=norm_eval,
            memory=memory,
            with_cp=with_cp,
            init_cfg=init_cfg,
        )
        self.tap = tap
        self._layers = arch.layers
        self.features = nn.ModuleDict(_stem(arch, in_channels, norm_cfg))
        self._stem = list(self.features)
        self._built = self.out_indices[-1] + 1
        for i in range(self._built):
            layers = [
                DenseLayer(inputs[i] + j * arch.growth_rate, arch, norm_cfg, drop_rate)
                for j in range(arch.layers[i])
            ]
            if memory == 'lean' and not isinstance(layers[0].norm1, _BatchNorm):
                raise ValueError(f"memory='lean' needs batch norms, not {dict(norm_cfg)}")
            self.features[f'denseblock{i + 1}'] = DenseBlock(layers, memory=self.memory)
            if i == len(outputs) - 1:
                self.features['norm5'] = _norm(norm_cfg, outputs[i])
            elif i + 1 < self._built or tap == 'activated':
                transition = dict(norm=_norm(norm_cfg, outputs[i]))
                if i + 1 < self._built:
                    transition['conv'] = nn.Conv2d(outputs[i], inputs[i + 1], 1, bias=False)
                    transition['drop'] = nn.Dropout(drop_rate)
                self.features[f'transition{i + 1}'] = nn.ModuleDict(transition)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
        self._freeze()

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile, as :meth:`torch.nn.Module.compile` does; arguments are those of torch.compile.

        Without any, layers share batch statistics in training on CUDA, but for 'recompute'.
        """
        super().compile(*args, **kwargs)
        shares = self.memory != 'recompute' and self._on_cuda() and self._options_exist()
        if args or kwargs or not shares:
            return
        for i in range(1, self._built + 1):
            self.features[f'denseblock{i}'].may_share = True
        # DDP's optimizer would split the graph, which torch refuses if it has a custom backward.
        whole = torch._dynamo.config.patch(optimize_ddp=False)
        self._compiled_call_impl = whole(self._compiled_call_impl)

    def switch_to_deploy(self) -> None:
        """Switch to the channels-last inference form, in place; see :class:`Backbone`.

        ValueError if the norms have no running statistics.
        """
        if self.form == 'deployed':
            return
        features = dict(stem=DeployedStem([self.features[name] for name in self._stem]))
        for block in range(1, self._built + 1):
            features[f'denseblock{block}'] = DeployedBlock(self.features[f'denseblock{block}'])
            norm = self._norm_after(block)
            if block - 1 in self.out_indices and self._returns_normed(block):
                features[f'norm{block}'] = DeployedNorm(norm)
                norm = None
            if block < self._built:
                conv = self.features[f'transition{block}']['conv']
                features[f'transition{block}'] = DeployedTransition(norm, conv)
        self.features = nn.ModuleDict(features)
        self._stem = ['stem']
        self._finish_deploy()

    def _norm_after(self, block: int) -> nn.Module | None:
        """Return the norm that reads a block's output, counted from 1, if it is built."""
        if f'transition{block}' in self.features:
            return self.features[f'transition{block}']['norm']
        return self.features['norm5'] if block == len(self._layers) else None

    def _returns_normed(self, block: int) -> bool:
        return self.tap == 'activated' or block == len(self._layers)

    def _stage_modules(self, stage: int) -> list[nn.Module]:
        if stage == 0:
            return [self.features[name] for name in self._stem]
        modules = []
        if 1 < stage <= self._built:
            transition = self.features[f'transition{stage - 1}']
            modules += [transition['conv'], transition['drop']]
            if not self._returns_normed(stage - 1):
                modules.append(self._norm_after(stage - 1))
        if stage <= self._built:
            modules.append(self.features[f'denseblock{stage}'])
            if self._returns_normed(stage):
                modules.append(self._norm_after(stage))
        return modules

    def _layer_depths(self, granularity: str) -> tuple[Mapping[str, int], int]:
        depths = {f'features.{name}': 0 for name in self._stem}
        last = 0
        for block, layers in enumerate(self._layers, 1):
            depths[f'features.transition{block - 1}'] = last + 1
            for j in range(1, layers + 1):
                last += j == 1 or granularity == 'layer'
                depths[f'features.denseblock{block}.denselayer{j}'] = last
            if self._returns_normed(block):
                depths[f'features.transition{block}.norm'] = last
        return {**depths, 'features.norm5': last}, last + 2

    def _run_stem(self, modules: list[nn.Module], x: Tensor) -> Tensor:
        if self.memory != 'lean':
            for module in modules:
                x = module(x)
            return x
        chain: list[nn.Module] = []
        for module in modules:
            if isinstance(module, nn.Conv2d):
                x, chain = lean_conv(chain, module, x), []
            else:
                chain.append(module)
        return recompute(chain, x)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return feature maps [N, C_i, ~H / s_i, ~W / s_i] for images [N, in_channels, H, W]."""
        self._check_size(x)
        if self.form == 'deployed':
            return self._forward_deployed(x)
        x = self._run_stem([self.features[name] for name in self._stem], x)
        maps = []
        for block in range(1, self._built + 1):
            x = self.features[f'denseblock{block}'](x)
            norm = self._norm_after(block)
            chain = (norm, F.relu_)
            if block - 1 in self.out_indices:
                if self._returns_normed(block):
                    x, chain = F.relu_(norm(x)), ()
                maps.append(x)
            if block < self._built:
                transition = self.features[f'transition{block}']
                run = lean_conv if self.memory == 'lean' else plain_conv
                x = F.avg_pool2d(transition['drop'](run(chain, transition['conv'], x)), 2)
        return tuple(maps)

    def _forward_deployed(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.features['stem'](x)
        maps = []
        for block in range(1, self._built + 1):
            x = self.features[f'denseblock{block}'](x)
            if f'norm{block}' in self.features:
                x = self.features[f'norm{block}'](x)
            if block - 1 in self.out_indices:
                maps.append(x)
            if block < self._built:
                x = self.features[f'transition{block}'](x)
        return tuple(maps)


def _stem(arch: Arch, in_channels: int, norm_cfg: Mapping[str, Any]) -> dict[str, nn.Module]:
    channels = arch.inputs()[0]
    if arch.stem == 'cifar':
        return dict(conv0=nn.Conv2d(in_channels, channels, 3, padding=1, bias=False))
    between, kernel = ([], 7) if arch.stem == 'imagenet' else ([arch.growth_rate] * 2, 3)
    modules = {}
    for i, (inputs, outputs) in enumerate(pairwise([in_channels, *between, channels])):
        modules[f'conv{i}'] = nn.Conv2d(
            inputs, outputs, kernel, stride=1 if i else 2, padding=kernel // 2, bias=False
        )
        modules[f'norm{i}'] = _norm(norm_cfg, outputs)
        modules[f'relu{i}'] = nn.ReLU(inplace=True)
    return {**modules, 'pool0': nn.MaxPool2d(3, stride=2, padding=1)}
