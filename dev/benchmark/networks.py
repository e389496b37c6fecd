"""What is compared: our backbones, and those of others with the same weights and the same maps.

Each network takes images [N, 3, H, W] and returns its maps at strides 4 to 32.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F

from mmdense.models import CondenseNetV2, DenseNet, RDNet, ReXNet
from mmdense.models.backbones import Backbone
from mmdense.weights.formats import FORMATS

__all__ = ['NETWORKS', 'Network', 'PEERS', 'ReleasedCondenseNetV2', 'TorchvisionDenseNet']


@dataclass(frozen=True)
class Network:
    """A backbone that can be compared.

    Attributes:
        build: Makes ours; keyword arguments go to it.
        peers: Who has it -> makes theirs, with the weights of ours.
        options: Of ours in training: what a contender is called -> arguments.
    """

    build: Callable[..., Backbone]
    peers: Mapping[str, Callable[[Backbone], nn.Module]]
    options: Mapping[str, Mapping[str, Any]] = field(
        default_factory=lambda: {'': {}, **{m: dict(memory=m) for m in ('lean', 'recompute')}}
    )

    def create(self, **options: Any) -> Backbone:
        """Return ours with random weights, statistics and scales, none of them trivial."""
        torch.manual_seed(0)
        net = self.build(**options).eval()
        for name, value in net.state_dict().items():
            if value.ndim == 1 and value.is_floating_point():
                low = 0.5 if name.endswith(('weight', 'running_var', 'gamma')) else -0.2
                value.uniform_(low, low + (1 if low > 0 else 0.4))
        return net


def _from_timm(name: str, known: str, indices: tuple[int, ...]) -> Callable[[Backbone], nn.Module]:
    def build(ours: Backbone) -> nn.Module:
        net = timm.create_model(name, features_only=True, out_indices=indices)
        return _fill(net, ours, known)

    return build


def _fill(net: nn.Module, ours: Backbone, known: str) -> nn.Module:
    """Give another's network our weights, by the map of its names to ours."""
    theirs = FORMATS[known].map({key: key for key in net.state_dict()}).weights
    weights = ours.state_dict()
    net.load_state_dict({theirs[name]: weights[name] for name in theirs})
    return net.eval()


class TorchvisionDenseNet(nn.Module):
    """torchvision's DenseNet, tapped at the end of each block.

    Args:
        memory_efficient: Recompute in backward, as torchvision does.
    """

    def __init__(self, name: str, *, memory_efficient: bool = False) -> None:
        super().__init__()
        net = torchvision.models.get_model(name, weights=None, memory_efficient=memory_efficient)
        self.features = net.features

    def forward(self, x: Tensor) -> list[Tensor]:
        maps = []
        for name, module in self.features.named_children():
            x = module(x)
            if name.startswith('denseblock'):
                maps.append(x)
        return [*maps[:-1], F.relu(x)]


class ReleasedCondenseNetV2(nn.Module):
    """What the released converted form computes, from a network of the condensed form.

    It gathers, norms, activates, convolves and shuffles one after the other, scatters by a dense
    product with a 0/1 matrix, and concatenates: written from its description.
    """

    def __init__(self, net: CondenseNetV2) -> None:
        super().__init__()
        self.net = copy.deepcopy(net)
        for block in list(self.net.features.values())[1:]:
            for layer in block:
                index = layer.sfr.index
                matrix = F.one_hot(index, len(index)).to(layer.sfr.conv.weight)
                layer.sfr.register_buffer('matrix', matrix)

    def forward(self, x: Tensor) -> list[Tensor]:
        stem, *blocks = self.net.features.values()
        x = stem(x)
        maps = []
        for i, block in enumerate(blocks):
            if i:
                x = F.avg_pool2d(x, 2)
            for layer in block:
                x = _released_layer(layer, x)
            maps.append(x)
        return [maps[i] for i in self.net.out_indices]


def _released_layer(layer: nn.Module, x: Tensor) -> Tensor:
    conv_1, (norm, activation, conv), sfr = layer.conv_1, layer.conv_2, layer.sfr
    act = _hard_swish if isinstance(activation, nn.Hardswish) else F.relu
    new = conv_1.conv(act(conv_1.norm(torch.index_select(x, 1, conv_1.index))))
    new = layer.se(conv(act(norm(_shuffle(new, conv_1.groups)))))
    added = act(sfr.norm(new))
    added = sfr.conv(_shuffle(added, added.shape[1] // sfr.groups))
    size = added.shape
    added = torch.matmul(added.flatten(2).transpose(1, 2).contiguous(), sfr.matrix)
    added = added.transpose(1, 2).contiguous().view(size)
    return torch.cat([x + added, new], 1)


def _hard_swish(x: Tensor) -> Tensor:
    return x * F.relu6(x + 3) / 6


def _shuffle(x: Tensor, groups: int) -> Tensor:
    return x.unflatten(1, (groups, -1)).transpose(1, 2).contiguous().flatten(1, 2)


def _rdnet(arch: str) -> Network:
    return Network(
        build=lambda **options: RDNet(arch=arch, **options),
        peers=dict(timm=_from_timm(f'rdnet_{arch}', 'rdnet', (0, 1, 2, 3))),
    )


def _densenet(arch: str) -> Network:
    name = f'densenet{arch}'

    def torchvision_s(ours: Backbone, **options: bool) -> nn.Module:
        return _fill(TorchvisionDenseNet(name, **options), ours, 'densenet')

    peers = dict(
        timm=_from_timm(name, 'densenet', (1, 2, 3, 4)),
        torchvision=torchvision_s,
        torchvision_memory_efficient=lambda ours: torchvision_s(ours, memory_efficient=True),
    )
    return Network(build=lambda **options: DenseNet(arch=arch, **options), peers=peers)


def _rexnet(width: str) -> Network:
    name = f'rexnet_{width.replace(".", "")}0'
    return Network(
        build=lambda **options: ReXNet(arch=width, **options),
        peers=dict(timm=_from_timm(name, 'rexnet', (1, 2, 3, 4))),
    )


def _condensenetv2(arch: str) -> Network:
    def build(**options: Any) -> CondenseNetV2:
        net = CondenseNetV2(arch=arch, **options)
        net.prune_to(1.0)
        net.condense()
        return net

    return Network(build=build, peers=dict(official=ReleasedCondenseNetV2))


NETWORKS = {
    **{f'rdnet_{arch}': _rdnet(arch) for arch in ('tiny', 'small', 'base', 'large')},
    **{f'densenet{arch}': _densenet(arch) for arch in ('121', '161', '169', '201')},
    **{f'rexnet_{w.replace(".", "")}0': _rexnet(w) for w in ('1.0', '1.3', '1.5', '2.0', '3.0')},
    **{f'condensenetv2_{arch}': _condensenetv2(arch) for arch in 'abc'},
}
PEERS = ('timm', 'torchvision', 'torchvision_memory_efficient', 'official')
