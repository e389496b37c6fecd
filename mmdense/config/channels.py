"""Channels of a backbone's feature maps, and the necks and heads of a config that read them.

C_i and s_i are the channels and the stride of the i-th feature map.
"""

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS
from torch import nn

from mmdense.config.parts import check_part, dicts
from mmdense.errors import UserError, first_of, one_line

AUTO = 'auto'
SSD_NECK = 'SSDNeck'
READ_ALL = ('mmdense.ReXUNetHead', 'mmdense.ReXUNetDepthHead')  # read all maps by default
PROBE = 256  # pixels
FREEZING = ('frozen_stages', 'norm_eval')


@dataclass(frozen=True)
class Reader:
    """A neck or head that reads the backbone's feature maps, in a model's config."""

    name: str  # such as 'decode_head'
    node: dict  # its config
    key: str  # that states the channels, such as 'in_channels'
    channels: list[int] | int  # C_i of the feature maps that it reads, or of the only one

    @property
    def fits(self) -> bool:
        """Whether the config states these channels, or none."""
        stated = self.node.get(self.key)
        if isinstance(stated, tuple):
            stated = list(stated)
        if self.name == 'neck' and isinstance(self.channels, list):  # some read one, or backwards
            return not isinstance(stated, list) or stated in (self.channels, self.channels[::-1])
        return stated is None or stated == self.channels


def readers(model: Mapping[str, Any], channels: Sequence[int]) -> Iterator[Reader]:
    """Yield the necks and heads of a model's config that read the backbone's maps of C_i channels.

    A head that reads a feature map that does not exist raises UserError.
    """
    if str(model.get('type')).endswith('ImageClassifier'):
        name = 'neck' if 'in_channels' in (model.get('neck') or {}) else 'head'
        yield Reader(name, model[name], 'in_channels', channels[-1])
        return
    if model.get('neck'):
        neck = model['neck']  # further necks read the first one
        first = neck[0] if isinstance(neck, list | tuple) else neck
        yield Reader('neck', first, 'in_channels', list(channels))
        return
    if 'panoptic_head' in model:  # MaskFormer's and Mask2Former's
        yield Reader('panoptic_head', model['panoptic_head'], 'in_channels', list(channels))
    for name in ('decode_head', 'auxiliary_head'):
        nodes = model.get(name) or []
        for node in nodes if isinstance(nodes, list | tuple) else [nodes]:
            node = node.get('kernel_generate_head', node)  # K-Net's
            stated = node.get('in_channels')
            index = -1
            if isinstance(stated, list | tuple) or node.get('type') in READ_ALL:
                index = list(range(len(channels) if stated == AUTO else len(stated)))
            index = node.get('in_index', index)
            several = isinstance(index, list | tuple)
            if max(index if several else [index]) >= len(channels):
                raise UserError(
                    f'{name}.in_index is {index}, but the backbone returns {len(channels)} feature '
                    'maps, counted from 0'
                )
            read = [channels[i] for i in index] if several else channels[index]
            yield Reader(name, node, 'in_channels', read)
            if 'c1_in_channels' in node:  # of DeepLabV3+, for the finest map
                yield Reader(name, node, 'c1_in_channels', channels[0])


def nested_models(model: Mapping[str, Any], place: str = '') -> Iterator[tuple[str, dict]]:
    """Yield a model's config and those inside it, such as ``detector``, that have a backbone."""
    if isinstance(model.get('backbone'), dict):
        yield place, model
    for key, node in model.items():
        if isinstance(node, dict) and key != 'backbone':
            yield from nested_models(node, f'{place}{key}.')


def fill_channels(cfg: Config) -> None:
    """Replace ``in_channels='auto'`` in a complete config by the backbone's channels, in place.

    It may be used in the (first) neck, in the heads of a segmentor without one, where ``in_index``
    counts, and in Mask2Former's ``panoptic_head``; also in models inside others, such as
    SoftTeacher's. Elsewhere it raises UserError. With mmdet's SSDNeck the first ``out_channels``
    become the backbone's, and 'auto' of the bbox head becomes the neck's ``out_channels``.
    """
    for _, model in nested_models(cfg.model):
        if not _has_auto(model):
            continue
        channels = backbone_maps(model.backbone, cfg.get('default_scope')).channels
        for reader in readers(model, channels):
            if reader.node.get(reader.key) == AUTO:
                reader.node[reader.key] = reader.channels
        neck = model.get('neck')
        if isinstance(neck, dict) and neck.get('type') == SSD_NECK:
            neck.out_channels = [*channels, *neck.out_channels[len(channels) :]]
            if model.bbox_head.get('in_channels') == AUTO:
                model.bbox_head.in_channels = neck.out_channels
    if _has_auto(cfg.model):
        raise UserError(
            f"{cfg.filename}: in_channels='auto' works in parts that read the backbone: the first "
            'neck or, without one, the heads of a segmentor and the panoptic_head'
        )


def _has_auto(model: Mapping[str, Any]) -> bool:
    keys = ('in_channels', 'c1_in_channels')
    return any(node.get(key) == AUTO for node in dicts(model) for key in keys)


class FeatureMaps(NamedTuple):
    """The feature maps that a backbone returns, fine to coarse: C_i, s_i and their indices."""

    channels: tuple[int, ...]
    strides: tuple[int, ...]
    indices: tuple[int, ...]


def backbone_maps(backbone: Mapping[str, Any], scope: str | None) -> FeatureMaps:
    """Return the feature maps of the backbone that :func:`build_part` builds.

    A backbone that has no ``out_channels`` and ``out_strides`` runs once, on 256 x 256 pixels.
    """
    net = build_part(backbone, scope)
    if hasattr(net, 'out_strides'):
        channels, strides = net.out_channels, net.out_strides
    else:
        device = next(net.parameters()).device
        image = torch.empty(1, backbone.get('in_channels', 3), PROBE, PROBE, device=device)
        net.eval()  # mmdet's train() returns None
        with torch.no_grad():
            maps = net(image)
        channels, strides = ([x.shape[1] for x in maps], [PROBE // x.shape[2] for x in maps])
    indices = getattr(net, 'out_indices', range(len(strides)))
    return FeatureMaps(tuple(channels), tuple(strides), tuple(indices))


def build_part(node: Mapping[str, Any], scope: str | None) -> nn.Module:
    """Build a model or a part of one without its weights, on the meta device if possible.

    ``scope`` is the config's ``default_scope``. UserError has the reason if it cannot be built.
    """
    node = ConfigDict(copy.deepcopy(node))
    remove_weights(node)
    check_part(node, scope=scope, place=str(node.get('type')))
    with MODELS.switch_scope_and_registry(scope) as registry:
        try:
            try:
                with torch.device('meta'):
                    return registry.build(node)
            except RuntimeError:  # Swin's constructor reads a value
                return registry.build(node)
        except (AssertionError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f'cannot build {node.get("type")}: {one_line(error)}') from error


def remove_weights(node: Any) -> None:
    """Remove everything that asks for pretrained weights from a config or a part of it."""
    for part in dicts(node):
        part.pop('pretrained', None)
        if 'Pretrained' in str(part.get('init_cfg')):
            part.pop('init_cfg')


def put_backbone(cfg: Config, backbone: Mapping[str, Any], *, frozen: bool = False) -> None:
    """Replace the backbone of a complete config, keeping the strides of its feature maps.

    The channels of necks and heads change with it, in place. Frozen stages and norm statistics stay
    frozen, up to the same stride, unless the new backbone starts from random weights: then nothing
    is frozen. ``frozen`` freezes all stages. ``backbone`` is one of mmdense's; its ``out_indices``
    and frozen parts are replaced. UserError if it has no feature map at one of the strides, or
    heads of a detector read the backbone.
    """
    scope, old = cfg.get('default_scope'), cfg.model.backbone
    new = ConfigDict({k: v for k, v in backbone.items() if k not in FREEZING})
    if 'in_channels' in old:
        new.in_channels = old.in_channels
    channels, strides, _ = backbone_maps(old, scope)
    if scope == 'mmpretrain':  # the neck may be of one family
        cfg.model.neck = ConfigDict(type='GlobalAveragePooling')
    found = [*readers(cfg.model, channels)]
    if not found:
        raise UserError(f'{cfg.filename} has no neck: only detectors with one take other backbones')
    maps = backbone_maps(new, scope)
    indices = dict(zip(maps.strides, maps.indices, strict=True))
    missing = {*strides} - {*indices}
    if missing or len({*strides}) < len(strides):
        raise UserError(
            f'{cfg.filename} reads feature maps at strides {first_of(strides)}, but {new.type} has '
            f'them at {first_of([*indices])}'
        )
    new.out_indices = [indices[stride] for stride in strides]
    if new.get('init_cfg'):
        new.update({key: old[key] for key in FREEZING if key in old})
        stages = old.get('frozen_stages', -1)
        if stages > 0:
            limit = backbone_maps({**old, 'out_indices': [stages - 1]}, scope).strides[0]
            new.frozen_stages = 1 + max((i for s, i in indices.items() if s <= limit), default=-1)
    if frozen:
        new.update(frozen_stages=1 + new.out_indices[-1], norm_eval=True)
    cfg.model.backbone = new
    width = dict(zip(maps.strides, maps.channels, strict=True))
    for reader in found:
        stated = reader.node.get(reader.key)
        if reader.name == 'neck' and isinstance(stated, int):  # reads the last map, as CenterNet's
            reader.node[reader.key] = width[strides[-1]]
        elif stated == [*channels[::-1]] != [*channels]:  # coarse to fine, as YOLOv3's
            reader.node[reader.key] = [width[stride] for stride in strides[::-1]]
        elif stated is not None:
            reader.node[reader.key] = AUTO
    neck = cfg.model.get('neck')
    if isinstance(neck, dict) and neck.get('type') == SSD_NECK:
        cfg.model.bbox_head.in_channels = AUTO
    fill_channels(cfg)
