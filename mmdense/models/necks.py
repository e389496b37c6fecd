"""The layers of the families' classifiers between the last feature map and the last linear layer.

They are necks of mmpretrain's ImageClassifier, before its LinearClsHead. Complete released
classifiers then load; tests compare the logits. DenseNet's neck is mmpretrain's
GlobalAveragePooling. A neck maps the backbone's tuple of feature maps, of which the last one
[N, C, H, W] counts, to a tuple of one tensor [N, C'].
"""

from collections import OrderedDict
from collections.abc import Sequence

from mmengine.model import Sequential
from torch import Tensor, nn

from mmdense.models.backbones.condensenetv2 import SqueezeExcite
from mmdense.registry import MODELS


class _Neck(Sequential):
    def __init__(self, **layers: nn.Module) -> None:
        super().__init__(OrderedDict(layers))

    def forward(self, maps: Sequence[Tensor]) -> tuple[Tensor]:
        return (super().forward(maps[-1]).flatten(1),)


@MODELS.register_module()
class RDNetNeck(_Neck):
    """Pooling and LayerNorm, with timm's eps (the authors' code has 1e-5): [N, in_channels]."""

    def __init__(self, *, in_channels: int) -> None:
        norm = nn.LayerNorm(in_channels, eps=1e-6)
        super().__init__(pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten(), norm=norm)


@MODELS.register_module()
class CondenseNetV2Neck(_Neck):
    """Norm, ReLU, pooling and a squeeze-excite gate, then a linear layer and hard-swish.

    Args:
        in_channels: Channels of the last feature map.
        hidden_channels: Of the linear layer, 828 for 'a', 1024 for 'b' and 'c'. By default
            what follows the pooling is left out.
    """

    def __init__(self, *, in_channels: int, hidden_channels: int | None = None) -> None:
        pool = nn.AdaptiveAvgPool2d(1)
        layers = dict(norm=nn.BatchNorm2d(in_channels), relu=nn.ReLU(inplace=True), pool=pool)
        if hidden_channels:
            layers |= dict(se=SqueezeExcite(in_channels, reduction=16), flat=nn.Flatten())
            layers |= dict(fc=nn.Linear(in_channels, hidden_channels), act=nn.Hardswish())
        super().__init__(**layers)


@MODELS.register_module()
class ReXNetNeck(_Neck):
    """Pooling and dropout of the last convolution, ``out_indices=(5,)``.

    ReXNet-lite has a linear layer from ``in_channels``, the convolution's, to ``hidden_channels``,
    1024, with a norm and ReLU6 before the dropout.
    """

    def __init__(
        self,
        *,
        in_channels: int = 1280,
        hidden_channels: int | None = None,
        drop_rate: float = 0.2,
    ) -> None:
        layers = dict(pool=nn.AdaptiveAvgPool2d(1), flat=nn.Flatten())
        if hidden_channels:
            layers['fc'] = nn.Linear(in_channels, hidden_channels)
            layers |= dict(bn=nn.BatchNorm1d(hidden_channels), act=nn.ReLU6(inplace=True))
        super().__init__(**layers, drop=nn.Dropout(drop_rate))
