"""Networks: importing this package registers them."""

from mmdense import registry  # noqa: F401  (says so if the MM packages are missing)
from mmdense.models.backbones import DenseNet, RDNet, ReXNet

__all__ = ['DenseNet', 'RDNet', 'ReXNet']
