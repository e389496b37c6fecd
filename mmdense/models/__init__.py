"""Networks: importing this package registers them, and how they take weights."""

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

import mmdense.engine  # noqa: E402, F401  (needs the networks, which need it to take weights)
