"""What a config's parts must agree on: the maps of its backbone, and what reads their channels.

C_i channels and stride s_i of the i-th map.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS
from torch import nn

from mmdense.config.explain import explained
from mmdense.errors import UserError

__all__ = [
    'AUTO',
    'Reader',
    'backbone_maps',
    'build_part',
    'fill_channels',
    'put_backbone',
    'readers',
    'without_weights',
]

AUTO = 'auto'
SSD_NECK = 'SSDNeck'
READ_ALL = ('mmdense.ReXUNetHead', 'mmdense.ReXUNetDepthHead')  # unless in_index says otherwise
PROBE = 256  # pixels
FREEZING = ('frozen_stages', 'norm_eval')


@dataclass(frozen=True)
class Reader:
    """A place in a model's config that names channels of the backbone's maps.

    Attributes:
        name: Such as 'neck' or 'decode_head'.
        node: The part's config.
        key: In it, such as 'in_channels'.
        channels: Those that the backbone gives: of all maps that are read, or of the one.
    """

    name: str
    node: dict
    key: str
    channels: list[int] | int

    @property
    def fits(self) -> bool:
        """Whether the config says what the backbone gives, or leaves it open."""
        said = self.node.get(self.key)
        if isinstance(said, tuple):
            said = list(said)
        if self.name == 'neck':  # a single number, or coarse to fine, is the habit of some
            return not isinstance(said, list) or said in (self.channels, self.channels[::-1])
        return said is None or said == self.channels


def readers(model: Mapping[str, Any], channels: Sequence[int]) -> Iterator[Reader]:
    """Yield whatever in a model's config reads the backbone.

    Args:
        model: The config of a detector or segmentor.
        channels: C_i of the backbone's maps.

    Raises:
        UserError: A head that reads a map which isn't there.
    """
    if model.get('neck'):
        neck = model['neck']  # further necks read the first one
        first = neck[0] if isinstance(neck, list | tuple) else neck
        yield Reader('neck', first, 'in_channels', list(channels))
        return
    for name in ('decode_head', 'auxiliary_head'):
        nodes = model.get(name) or []
        for node in nodes if isinstance(nodes, list | tuple) else [nodes]:
            said = node.get('in_channels')
            if isinstance(said, list | tuple) or node.get('type') in READ_ALL:
                own = list(range(len(channels) if said == AUTO else len(said)))
            else:
                own = -1
            index = node.get('in_index', own)
            many = isinstance(index, list | tuple)
            if max(index if many else [index]) >= len(channels):
                raise UserError(
                    f'{name}.in_index is {index}, but the backbone returns {len(channels)} maps, '
                    'counted from 0'
                )
            given = [channels[i] for i in index] if many else channels[index]
            yield Reader(name, node, 'in_channels', given)
            if 'c1_in_channels' in node:  # of DeepLabV3+, from the finest map
                yield Reader(name, node, 'c1_in_channels', channels[0])


def fill_channels(cfg: Config) -> None:
    """Write the backbone's channels wherever a neck or head says ``in_channels='auto'``.

    It may stand in what reads the backbone: the (first) neck, or the heads of a segmentor without
    one, whose ``in_index`` counts. With mmdet's SSDNeck the first ``out_channels`` follow, and
    ``in_channels='auto'`` of the head is what the neck puts out.

    Args:
        cfg: A whole config; changed in place.

    Raises:
        UserError: 'auto' where nothing is known to fill in, or a backbone that can't be built.
    """
    if not _has_auto(cfg.model):
        return
    channels, _ = backbone_maps(cfg.model.backbone, cfg.get('default_scope'))
    for reader in readers(cfg.model, channels):
        if reader.node.get(reader.key) == AUTO:
            reader.node[reader.key] = reader.channels
    neck = cfg.model.get('neck')
    if isinstance(neck, dict) and neck.get('type') == SSD_NECK:
        neck.out_channels = [*channels, *neck.out_channels[len(channels) :]]
        if cfg.model.bbox_head.get('in_channels') == AUTO:
            cfg.model.bbox_head.in_channels = neck.out_channels
    if _has_auto(cfg.model):
        raise UserError(
            f"{cfg.filename}: in_channels='auto' is for what reads the backbone: the first neck, "
            'or the heads of a segmentor without one'
        )


def _has_auto(node: Any) -> bool:
    if isinstance(node, dict):
        here = any(node.get(key) == AUTO for key in ('in_channels', 'c1_in_channels'))
        return here or any(map(_has_auto, node.values()))
    return isinstance(node, list | tuple) and any(map(_has_auto, node))


def backbone_maps(
    backbone: Mapping[str, Any], scope: str | None
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return C_i and s_i of the maps that a backbone returns, fine to coarse.

    Ours announce them; of others they are found by running one image of 256 x 256 pixels.

    Args:
        backbone: Its config.
        scope: The config's ``default_scope``.

    Raises:
        UserError: It can't be built.
    """
    return _maps(build_part(backbone, scope), backbone.get('in_channels', 3))


def _maps(net: nn.Module, in_channels: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    if hasattr(net, 'out_strides'):
        return tuple(net.out_channels), tuple(net.out_strides)
    image = torch.empty(1, in_channels, PROBE, PROBE, device=next(net.parameters()).device)
    net.eval()  # those of mmdet return nothing
    with torch.no_grad():
        maps = net(image)
    return tuple(x.shape[1] for x in maps), tuple(PROBE // x.shape[2] for x in maps)


def build_part(node: Mapping[str, Any], scope: str | None) -> nn.Module:
    """Build a model or a part of one without its weights, on the meta device where it can be.

    Raises:
        UserError: It can't be built; with the reason.
    """
    node = without_weights(copy.deepcopy(dict(node)))
    with MODELS.switch_scope_and_registry(scope) as registry:
        try:
            with explained():
                try:
                    with torch.device('meta'):
                        return registry.build(ConfigDict(node))
                except (RuntimeError, NotImplementedError):  # reads a value at once (Swin)
                    return registry.build(ConfigDict(node))
        except (ValueError, TypeError, KeyError, AssertionError) as error:
            raise UserError(f'cannot build {node.get("type")}: {error.args[0]}') from error


def without_weights(node: Any) -> Any:
    """Return a config in which nothing asks for pretrained weights."""
    if isinstance(node, dict):
        node.pop('pretrained', None)
        if 'Pretrained' in str(node.get('init_cfg')):
            node.pop('init_cfg')
        for child in node.values():
            without_weights(child)
    elif isinstance(node, list | tuple):
        for child in node:
            without_weights(child)
    return node


def put_backbone(cfg: Config, backbone: Mapping[str, Any]) -> None:
    """Replace the backbone of a config by one with maps of the same strides, and fill in channels.

    What of the old one is frozen stays frozen, the stages up to the same stride and the statistics
    of norms, unless the new one begins with random weights: then nothing is.

    Args:
        cfg: A whole config; changed in place.
        backbone: The config of one of mmdense's backbones; of the maps that it returns those of
            the strides that are needed are taken. What it says of freezing is not.

    Raises:
        UserError: It has no map of a stride that is needed.
    """
    scope, old = cfg.get('default_scope'), cfg.model.backbone
    new = ConfigDict({k: v for k, v in backbone.items() if k not in FREEZING})
    if 'in_channels' in old:
        new.in_channels = old.in_channels
    _, strides = backbone_maps(old, scope)
    indices = _indices_of(new, scope)
    missing = {*strides} - {*indices}
    if missing or len({*strides}) < len(strides):
        raise UserError(
            f'{cfg.filename} reads maps at strides {_listed(strides)}, but {new.type} has them at '
            f'{_listed(indices)}'
        )
    new.out_indices = [indices[stride] for stride in strides]
    if new.get('init_cfg'):
        new.update({key: old[key] for key in FREEZING if key in old})
        frozen = old.get('frozen_stages', -1)
        if frozen > 0:
            limit = {i: s for s, i in _all_indices_of(old, scope).items()}.get(frozen - 1, 2)
            new.frozen_stages = 1 + max((i for s, i in indices.items() if s <= limit), default=-1)
    cfg.model.backbone = new
    for reader in readers(cfg.model, strides):
        if reader.node.get(reader.key) is not None:
            reader.node[reader.key] = AUTO
    neck = cfg.model.get('neck')
    if isinstance(neck, dict) and neck.get('type') == SSD_NECK:
        cfg.model.bbox_head.in_channels = AUTO
    fill_channels(cfg)


def _all_indices_of(backbone: Mapping[str, Any], scope: str | None) -> dict[int, int]:
    """Return :func:`_indices_of` of all maps, whichever the config returns."""
    own = ('out_indices', *FREEZING)
    try:
        return _indices_of({k: v for k, v in backbone.items() if k not in own}, scope)
    except UserError:  # a network that has not all that are usual
        return _indices_of(backbone, scope)


def _indices_of(backbone: Mapping[str, Any], scope: str | None) -> dict[int, int]:
    """Return the strides -> indices of the maps that a backbone returns."""
    net = build_part(backbone, scope)
    _, strides = _maps(net, backbone.get('in_channels', 3))
    return dict(zip(strides, getattr(net, 'out_indices', range(len(strides))), strict=True))


def _listed(numbers: Iterable[int]) -> str:
    *first, last = map(str, numbers)
    return f'{", ".join(first)} and {last}' if first else last
