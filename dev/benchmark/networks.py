"""The networks to compare: mmdense's backbones and other implementations with the same weights.

Each network takes images [N, 3, H, W] and returns feature maps at strides 4 to 32.
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
        build: Builds mmdense's network from keyword arguments.
        peers: Builders of the other implementations by name; they copy the weights of the given
            backbone.
        options: Keyword arguments for training, by the name of the configuration.
    """

    build: Callable[..., Backbone]
    peers: Mapping[str, Callable[[Backbone], nn.Module]]
    options: Mapping[str, Mapping[str, Any]] = field(
        default_factory=lambda: {'': {}, **{m: dict(memory=m) for m in ('lean', 'recompute')}}
    )

    def create(self, **options: Any) -> Backbone:
        """Return mmdense's network with random weights, scales and running statistics."""
        torch.manual_seed(0)
        net = self.build(**options).eval()
        for name, value in net.state_dict().items():
            if value.ndim == 1 and value.is_floating_point():
                low = 0.5 if name.endswith(('weight', 'running_var', 'gamma')) else -0.2
                value.uniform_(low, low + (1 if low > 0 else 0.4))
        return net


def _from_timm(
    name: str, weights_format: str, indices: tuple[int, ...]
) -> Callable[[Backbone], nn.Module]:
    def build(backbone: Backbone) -> nn.Module:
        net = timm.create_model(name, features_only=True, out_indices=indices)
        return _fill(net, backbone, weights_format)

    return build


def _fill(net: nn.Module, backbone: Backbone, weights_format: str) -> nn.Module:
    """Load the weights of a backbone into another implementation, by its key map."""
    names = FORMATS[weights_format].map({key: key for key in net.state_dict()}).weights
    weights = backbone.state_dict()
    net.load_state_dict({names[name]: weights[name] for name in names})
    return net.eval()


class TorchvisionDenseNet(nn.Module):
    """torchvision's DenseNet with the output of each block.

    Args:
        name: torchvision's name of the network.
        memory_efficient: Use torchvision's activation checkpointing.
    """

    def __init__(self, name: str, *, memory_efficient: bool = False) -> None:
        super().__init__()
        net = torchvision.models.get_model(name, weights=None, memory_efficient=memory_efficient)
        self.features = net.features

    def forward(self, x: Tensor) -> list[Tensor]:
        outputs = []
        for name, module in self.features.named_children():
            x = module(x)
            if name.startswith('denseblock'):
                outputs.append(x)
        return [*outputs[:-1], F.relu(x)]


class ReleasedCondenseNetV2(nn.Module):
    """The released converted CondenseNetV2, from a network in condensed form.

    Written from its description: gather, norm, activation, convolution and shuffle are separate
    steps, features are scattered by a dense product with a 0/1 matrix, then concatenated.
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
        outputs = []
        for i, block in enumerate(blocks):
            if i:
                x = F.avg_pool2d(x, 2)
            for layer in block:
                x = _released_layer(layer, x)
            outputs.append(x)
        return [outputs[i] for i in self.net.out_indices]


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

    def torchvision_densenet(backbone: Backbone, **options: bool) -> nn.Module:
        return _fill(TorchvisionDenseNet(name, **options), backbone, 'densenet')

    peers = dict(
        timm=_from_timm(name, 'densenet', (1, 2, 3, 4)),
        torchvision=torchvision_densenet,
        torchvision_memory_efficient=lambda backbone: torchvision_densenet(
            backbone, memory_efficient=True
        ),
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
