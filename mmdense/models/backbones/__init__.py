"""Backbones with feature maps of several strides; :mod:`.base` defines their contract."""

from mmdense.models.backbones.base import Backbone
from mmdense.models.backbones.condensenetv2 import CondenseNetV2
from mmdense.models.backbones.densenet import DenseNet
from mmdense.models.backbones.rdnet import RDNet
from mmdense.models.backbones.rexnet import ReXNet
from mmdense.models.backbones.shufflenetv2 import ShuffleNetV2
from mmdense.models.backbones.timm_backbone import TimmBackbone

__all__ = [
    'FAMILIES',
    'Backbone',
    'CondenseNetV2',
    'DenseNet',
    'RDNet',
    'ReXNet',
    'ShuffleNetV2',
    'TimmBackbone',
]

# mmdense's families, by the name that begins a backbone's: the benchmark and the documents list
# their ``archs`` and ``weights`` in this order.
FAMILIES: dict[str, type[Backbone]] = {
    family.__name__.lower(): family
    for family in (RDNet, DenseNet, ReXNet, CondenseNetV2, ShuffleNetV2)
}
