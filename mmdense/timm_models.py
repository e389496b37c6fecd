"""Networks that timm lacks: importing this module registers them with timm.

CondenseNetV2 is ``condensenetv2_a``, ``_b`` and ``_c``; timm's own DenseNet is ``densenet264``,
``densenet232_k48`` and ``densenet264_k48``. There are no URLs: ``pretrained=True`` with
``pretrained_cfg_overlay=dict(file=...)`` loads a local file.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

from timm.models import FeatureInfo, build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.densenet import DenseNet
from torch import Tensor, nn

from mmdense.models import CondenseNetV2
from mmdense.models.backbones.densenet import ARCHS
from mmdense.models.necks import CondenseNetV2Neck
from mmdense.weights.formats import recognise

HIDDEN = dict(a=828, b=1024, c=1024)  # channels that CondenseNetV2's last linear layer reads
default_cfgs: dict[str, Any] = {}  # register_model() reads it


class Network(nn.Module):
    """CondenseNetV2 with timm's interface: images [N, in_chans, H, W] to logits [N, num_classes].

    ``backbone`` is mmdense's. To train ``form='learned'``, call ``net.backbone.prune_to(progress)``
    regularly, with the share of the training that is done, and ``net.backbone.condense()`` in the
    end. Released converted weights have ``form='condensed'``. With ``features_only=True`` it
    returns a list of the feature maps at ``out_indices``.
    """

    def __init__(
        self,
        *,
        arch: str,
        form: str = 'learned',
        memory: str = 'plain',
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,  # before the last linear layer
        out_indices: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = net = CondenseNetV2(
            arch=arch, form=form, memory=memory, in_channels=in_chans, out_indices=out_indices
        )
        outputs = zip(net.out_indices, net.out_channels, net.out_strides, strict=True)
        self.feature_info = [
            dict(num_chs=channels, reduction=stride, module=f'backbone.features.denseblock_{i + 1}')
            for i, channels, stride in outputs
        ]
        self.neck = None
        if out_indices is not None:
            self.feature_info = FeatureInfo(self.feature_info, range(len(out_indices)))
            return
        self.num_features, self.head_hidden_size = net.out_channels[-1], HIDDEN[arch]
        self.neck = CondenseNetV2Neck(in_channels=self.num_features, hidden_channels=HIDDEN[arch])
        self.head = nn.Sequential(OrderedDict(drop=nn.Dropout(drop_rate)))
        self.reset_classifier(num_classes)

    def get_classifier(self) -> nn.Module:
        """Return the last linear layer."""
        return self.head.fc

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the last linear layer; 0 leaves it out."""
        self.num_classes = num_classes
        linear = nn.Linear(self.head_hidden_size, num_classes) if num_classes else nn.Identity()
        self.head.fc = linear

    def forward_features(self, x: Tensor) -> Tensor:
        """Return the last feature map."""
        return self.backbone(x)[-1]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Map it to logits, or to the features that the last linear layer reads."""
        (x,) = self.neck((x,))
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor | list[Tensor]:
        """Return the logits, or the feature maps."""
        maps = self.backbone(x)
        return self.forward_head(maps[-1]) if self.neck is not None else list(maps)


def _renamed(weights: dict[str, Tensor], net: Network) -> dict[str, Tensor]:
    if known := recognise(weights):
        weights = known.map(weights, complete=True).weights
    features = net.neck is None  # which has no classifier
    return {k: v for k, v in weights.items() if not features or k.startswith('backbone.')}


def _register(name: str, network: type[nn.Module], conv: str, linear: str, **options: Any) -> None:
    def create(pretrained: bool = False, **given: Any) -> nn.Module:
        if network is Network and given.pop('features_only', False):
            given.setdefault('out_indices', range(5))
        given['feature_cfg'] = dict(flatten_sequential=True)
        return build_model_with_cfg(network, name, pretrained, **options, **given)

    cfg = dict(first_conv=conv, classifier=linear, interpolation='bilinear')
    default_cfgs.update(generate_default_cfgs({name: cfg}))
    create.__name__ = name
    register_model(create)


for _arch in HIDDEN:
    _conv = 'backbone.features.init_conv'
    _options = dict(arch=_arch, pretrained_filter_fn=_renamed)
    _register(f'condensenetv2_{_arch}', Network, _conv, 'head.fc', **_options)
for _arch in ('264', '232-k48', '264-k48'):
    _options = dict(growth_rate=ARCHS[_arch].growth_rate, block_config=ARCHS[_arch].layers)
    _name = f'densenet{_arch.replace("-", "_")}'
    _register(_name, DenseNet, 'features.conv0', 'classifier', **_options)
