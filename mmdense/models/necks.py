"""The layers of the families' classifiers between the last feature map and the linear layer.

They are necks of mmpretrain's ImageClassifier, whose LinearClsHead has the linear layer::

    backbone=dict(type='mmdense.RDNet', arch='tiny', out_indices=(-1,)),
    neck=dict(type='mmdense.RDNetNeck', in_channels=1040),
    head=dict(type='LinearClsHead', num_classes=1000, in_channels=1040)

With these heads complete released classifiers load; tests compare the logits. DenseNet's last
feature map has its norm and ReLU: mmpretrain's GlobalAveragePooling is its neck. Each neck maps
the backbone's tuple of feature maps, of which the last [N, C, H, W] counts, to a tuple of one
tensor of features, [N, C'].
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from mmengine.model import Sequential
from torch import Tensor, nn

from mmdense.registry import MODELS


class _Neck(Sequential):
    def __init__(self, **layers: nn.Module) -> None:
        super().__init__(OrderedDict(layers))

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor]:
        return (super().forward(maps[-1]),)


class _Pool(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.mean((2, 3))


@MODELS.register_module()
class RDNetNeck(_Neck):
    """Pooling and LayerNorm: [N, in_channels]."""

    def __init__(self, *, in_channels: int) -> None:
        # timm's eps; the authors' code has 1e-5.
        super().__init__(pool=_Pool(), norm=nn.LayerNorm(in_channels, eps=1e-6))


class _Gate(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(
            nn.Linear(channels, channels // 16, bias=False),
            nn.ReLU(inplace=True),
            nn.Linear(channels // 16, channels, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x * self.fc(x)


@MODELS.register_module()
class CondenseNetV2Neck(_Neck):
    """Norm, ReLU, pooling, squeeze-excite gate, linear layer and hard-swish: [N, hidden_channels].

    Args:
        in_channels: Channels of the last feature map, at least 16.
        hidden_channels: 828 for 'a', 1024 for 'b' and 'c'.
    """

    def __init__(self, *, in_channels: int, hidden_channels: int) -> None:
        if in_channels < 16:
            raise ValueError(f'in_channels is {in_channels}, must be at least 16')
        super().__init__(
            norm=nn.BatchNorm2d(in_channels),
            relu=nn.ReLU(inplace=True),
            pool=_Pool(),
            se=_Gate(in_channels),
            fc=nn.Linear(in_channels, hidden_channels),
            act=nn.Hardswish(),
        )


@MODELS.register_module()
class ReXNetNeck(_Neck):
    """Pooling and dropout of the last convolution, ``out_indices=(5,)``: [N, in_channels].

    Args:
        in_channels: Channels of the convolution; needed for ``hidden_channels`` only.
        hidden_channels: Add a linear layer, a norm and ReLU6 before the dropout, as ReXNet-lite
            does with 1024.
        drop_rate: Dropout; the published rate by default.
    """

    def __init__(
        self,
        *,
        in_channels: int | None = None,
        hidden_channels: int | None = None,
        drop_rate: float = 0.2,
    ) -> None:
        layers = {}
        if hidden_channels:
            if in_channels is None:
                raise ValueError('hidden_channels needs in_channels')
            layers = dict(
                fc=nn.Linear(in_channels, hidden_channels),
                bn=nn.BatchNorm1d(hidden_channels),
                act=nn.ReLU6(inplace=True),
            )
        super().__init__(pool=_Pool(), **layers, drop=nn.Dropout(drop_rate))
