"""Any `timm <https://github.com/huggingface/pytorch-image-models>`_ network with feature maps of
several strides, as a baseline for mmdense's families.

Feature maps are those of timm's ``forward_intermediates``; layers that none of them needs are
pruned. Parameter names are timm's. Plain ViTs get a simple feature pyramid.
"""

from __future__ import annotations

import difflib
import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from functools import partial
from typing import Any

import timm
from timm.layers import BatchNormAct2d, FrozenBatchNormAct2d, PatchEmbed, SyncBatchNormAct
from timm.models._manipulate import group_with_matcher
from torch import Tensor, nn
from torch.nn import functional as F

from mmdense.models.backbones.base import GRANULARITIES, Backbone
from mmdense.models.layers import recompute
from mmdense.registry import MODELS

RESERVED = ('pretrained', 'num_classes', 'in_chans', 'features_only')
STATE = ('_modules', '_parameters', '_buffers', '_non_persistent_buffers_set')
FLEXIBLE = dict(strict_img_size=False, dynamic_img_size=True)  # take images of any size
PYRAMID = (4, 8, 16, 32)  # strides that a plain ViT gets
PRUNE = 'prune_intermediate_layers'  # comes with forward_intermediates
WITH_ACT = (BatchNormAct2d, SyncBatchNormAct, FrozenBatchNormAct2d)
HEAD = 'head.fc.weight'  # no group_matcher matches it, so it gets the depth of heads


@MODELS.register_module()
class TimmBackbone(Backbone):
    """A timm network with the feature maps that its ``feature_info`` lists.

    ``init_cfg=dict(type='Pretrained', checkpoint='timm://NAME')`` loads timm's weights. Stage 1 is
    empty in networks whose first feature map is the stem's (``resnet18``: ``act1``, stride 2).
    Images may have any size: Swin is built with ``strict_img_size=False``, and images are padded
    with zeros to whole patches or, for MaxViT, windows of the coarsest feature map.

    A ViT of a single stride that takes images of any size, such as DINOv2's, gets the simple
    feature pyramid of `ViTDet <https://arxiv.org/abs/2203.16527>`_: strides 4 to 32 from its normed
    last feature map, by deconvolutions of 2 x 2 pixels, which halve the channels, and max pooling,
    for a neck such as FPN. With patches of 14 pixels, images are resized to 14/16, so that strides
    are exact. Its blocks freeze with the last stage, the pyramid never does.

    timm's norms often contain the activation. mmengine's ``sync_bn`` would drop it, so ``train()``
    raises an error; ``timm.layers.convert_sync_batchnorm`` keeps it.

    Other arguments: see :class:`Backbone`; ``memory`` has no 'lean' mode here.

    Args:
        model_name: timm's, with or without a tag; the tag has no effect on the network.
        out_indices: Counted as in ``feature_info``. None returns strides 4 to 32.
        model_kwargs: Further arguments of ``timm.create_model``, such as ``drop_path_rate``.

    ValueError if timm has no such network or tag, the network has no feature maps of several
    strides or no group matcher, ``model_kwargs`` repeats an argument, or an index or stage is
    impossible.
    """

    memory_modes = ('plain', 'recompute')
    not_pretrained = ('pyramid.',)

    def __init__(
        self,
        *,
        model_name: str,
        out_indices: int | Sequence[int] | None = None,
        frozen_stages: int = -1,
        norm_eval: bool = False,
        in_channels: int = 3,
        memory: str = 'plain',
        with_cp: bool = False,
        model_kwargs: Mapping[str, Any] | None = None,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        net = _create(model_name, in_channels, model_kwargs or {})
        strides = [info['reduction'] for info in net.feature_info]
        channels = [info['num_chs'] for info in net.feature_info]
        self._patch = self._stride = strides[0] if len({*strides}) == 1 else 0  # of a plain ViT
        if self._patch:
            self._stride = 2 ** round(math.log2(self._patch))
            levels = [_level(channels[-1], self._stride, stride) for stride in PYRAMID]
            strides, channels = PYRAMID, [width for _, width in levels]
        if out_indices is None:
            out_indices = [i for i, stride in enumerate(strides) if 4 <= stride <= 32]
        super().__init__(
            map_channels=channels,
            map_strides=strides,
            out_indices=out_indices,
            frozen_stages=frozen_stages,
            norm_eval=norm_eval,
            memory=memory,
            with_cp=with_cp,
            init_cfg=init_cfg,
        )
        sides = [side for m in net.modules() for side in getattr(m, 'partition_size', ())]
        self._multiple = math.lcm(*sides) * self._coarsest if sides else 1
        if isinstance(patches := getattr(net, 'patch_embed', None), PatchEmbed):
            self._multiple = self._coarsest if self._patch else patches.patch_size[0]
        last = self.out_indices[-1] + 1
        if self._patch:
            net.pyramid = nn.ModuleDict({str(i): levels[i][0] for i in self.out_indices})
            net.prune_intermediate_layers()
            stages = {name: 5 if name.startswith('pyramid.') else last for name in _names(net)}
        self._depths = {granularity: _depths(net, granularity) for granularity in GRANULARITIES}
        if not self._patch:
            _prune(net, self.out_indices)
        self._stage_of = stages if self._patch else _stages(net, last)
        for name in self._stage_of:
            if self._depths['stage'][name] == 0:
                self._stage_of[name] = 0
        # The backbone shares the network's dicts of submodules and parameters, so that names have
        # no prefix in state_dict(), in named_parameters() and in mmengine's versions of both.
        # Sharing the dicts lets both see a replaced module (SyncBatchNorm), also after a deep copy
        # (EMA).
        self.__dict__['_net'] = net
        for state in STATE:
            setattr(self, state, getattr(net, state))
        self._activated = [
            name for name, module in net.named_modules() if isinstance(module, BatchNormAct2d)
        ]
        if self.memory == 'recompute':
            # timm's set_grad_checkpointing would count each batch twice in running statistics.
            for depth, block in _largest(net, self._depths['layer']):
                if 0 < depth < self._depths['layer'][HEAD]:
                    block.forward = partial(_recomputed, block)
        self._freeze()

    def _stage_modules(self, stage: int) -> list[nn.Module]:
        return [module for of, module in _largest(self, self._stage_of) if of == stage]

    def _layer_depths(self, granularity: str) -> tuple[Mapping[str, int], int]:
        depths = self._depths[granularity]
        return {name: depths[name] for name in self._stage_of}, depths[HEAD] + 1

    def _freeze(self) -> None:
        super()._freeze()
        for name, parameter in self.named_parameters():  # also those outside the stages' modules
            if self._stage_of[name] <= self.frozen_stages:
                parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> TimmBackbone:
        """Set training mode as :class:`Backbone` does.

        ValueError if a norm with an activation was replaced by one without.
        """
        for name in self._activated:
            if not isinstance(self.get_submodule(name), WITH_ACT):
                raise ValueError(
                    f'{name} lost its activation: make norms synchronised by '
                    'timm.layers.convert_sync_batchnorm, not by sync_bn'
                )
        super().train(mode)
        self._net.training = mode
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return feature maps [N, C_i, ~H / s_i, ~W / s_i] for images [N, in_channels, H, W]."""
        self._check_size(x)
        height, width = x.shape[-2:]
        if self._multiple > 1:  # else it would copy the images
            x = F.pad(x, (0, -width % self._multiple, 0, -height % self._multiple))
        if self._patch != self._stride:
            sides = [side // self._stride * self._patch for side in x.shape[-2:]]
            x = F.interpolate(x, sides, mode='bilinear')
        indices, norm = (1, True) if self._patch else (list(self.out_indices), False)
        maps = self._net.forward_intermediates(
            x, indices=indices, norm=norm, intermediates_only=True, output_fmt='NCHW'
        )
        if self._patch:
            maps = [level(maps[0]) for level in self.pyramid.values()]
        if self._multiple == 1:
            return tuple(maps)
        pairs = zip(maps, self.out_strides, strict=True)
        return tuple(y[..., : -(-height // s), : -(-width // s)] for y, s in pairs)


def _create(model_name: str, in_channels: int, model_kwargs: Mapping[str, Any]) -> nn.Module:
    for key in RESERVED:
        if key in model_kwargs:
            raise ValueError(f'model_kwargs: {key!r} is set by TimmBackbone')
    if not timm.is_model(model_name):
        close = difflib.get_close_matches(model_name, timm.list_models(), n=3)
        hint = f'; close: {close}' if close else ''
        raise ValueError(f'timm has no network {model_name!r}{hint}')
    try:
        timm.models.get_pretrained_cfg(model_name)
    except RuntimeError as error:
        raise ValueError(f'timm has no tag of {model_name!r}') from error
    create = partial(timm.create_model, model_name, num_classes=0, in_chans=in_channels)
    net = create(**model_kwargs)
    known = inspect.signature(type(net)).parameters
    if flexible := [{key: value} for key, value in FLEXIBLE.items() if key in known]:
        net = create(**flexible[0] | dict(model_kwargs))
    strides = [info['reduction'] for info in getattr(net, 'feature_info', ())]
    plain = 'dynamic_img_size' in known and isinstance(net.patch_embed, PatchEmbed)
    if len({*strides}) < 2 - plain or strides != sorted(strides) or not hasattr(net, PRUNE):
        raise ValueError(
            f"{model_name!r} has no feature maps of several strides, or timm can't return them; "
            'choose a convolutional or hierarchical network, such as resnet18, or a plain ViT'
        )
    return net


def _level(channels: int, stride: int, target: int) -> tuple[nn.Module, int]:
    """Return what makes a feature map of one stride from that of another, and its channels."""
    layers: list[nn.Module] = [nn.MaxPool2d(target // stride)] if target > stride else []
    while stride > target:
        layers += [timm.layers.LayerNorm2d(channels), nn.GELU()] if layers else []
        layers.append(nn.ConvTranspose2d(channels, channels // 2, 2, 2))
        channels, stride = channels // 2, stride // 2
    return nn.Sequential(*layers), channels


def _prune(net: nn.Module, indices: Sequence[int]) -> None:
    net.prune_intermediate_layers(list(indices), prune_norm=True, prune_head=True)


def _depths(net: nn.Module, granularity: str) -> dict[str, int]:
    try:
        matcher = net.group_matcher(coarse=granularity == 'stage')
    except (AttributeError, AssertionError) as error:
        raise ValueError(f'timm has no group matcher for {type(net).__name__}: {error}') from error
    names = [*_names(net), HEAD]
    return group_with_matcher(((name, None) for name in names), matcher, reverse=True)


def _names(module: nn.Module) -> list[str]:
    """Return the names of its parameters, all names of shared ones."""
    return [name for name, _ in module.named_parameters(remove_duplicate=False)]


def _stages(net: nn.Module, num_maps: int) -> dict[str, int]:
    """Return for each parameter 1 + the first feature map that needs it."""
    net, stages = deepcopy(net), {}
    for index in reversed(range(num_maps)):
        _prune(net, (index,))
        stages |= dict.fromkeys(_names(net), index + 1)
    return stages


def _largest(
    module: nn.Module, group_of: Mapping[str, int], prefix: str = ''
) -> Iterator[tuple[int, nn.Module]]:
    """Yield ``(group, module)``, the largest modules whose parameters are all of one group."""
    for name, child in module.named_children():
        path = f'{prefix}{name}.'
        groups = {group_of[path + parameter] for parameter in _names(child)}
        if len(groups) == 1 and not isinstance(child, nn.ModuleList):  # never called itself
            yield groups.pop(), child
        elif groups:
            yield from _largest(child, group_of, path)


def _recomputed(block: nn.Module, *inputs: Any, **options: Any) -> Any:
    """Run the ``forward`` of a block's class, since this function replaces the block's.

    Lists are copied, since blocks write to them (HRNet) or append to them later (DenseNet).
    """

    def call(*inputs: Any) -> Any:
        return type(block).forward(block, *_copied(inputs), **options)

    return recompute(block, *_copied(inputs), call=call)


def _copied(inputs: tuple) -> list:
    return [x[:] if isinstance(x, list) else x for x in inputs]
