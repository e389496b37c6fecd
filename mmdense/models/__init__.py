"""Networks: importing this package registers them."""

from mmdense.models.backbones import RDNet

__all__ = ['RDNet']
