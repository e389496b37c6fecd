"""Networks: importing this package registers them."""

from mmdense import registry  # noqa: F401  (says so if the MM packages are missing)
from mmdense.models.backbones import (
    CondenseNetV2,
    DenseNet,
    RDNet,
    ReXNet,
    ShuffleNetV2,
    TimmBackbone,
)

__all__ = ['CondenseNetV2', 'DenseNet', 'RDNet', 'ReXNet', 'ShuffleNetV2', 'TimmBackbone']
