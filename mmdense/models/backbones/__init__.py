"""Backbones with multi-scale outputs; :mod:`.base` says what all of them promise."""

from mmdense.models.backbones.base import Backbone
from mmdense.models.backbones.condensenetv2 import CondenseNetV2
from mmdense.models.backbones.densenet import DenseNet
from mmdense.models.backbones.rdnet import RDNet
from mmdense.models.backbones.rexnet import ReXNet
from mmdense.models.backbones.shufflenetv2 import ShuffleNetV2
from mmdense.models.backbones.timm_backbone import TimmBackbone

__all__ = [
    'Backbone',
    'CondenseNetV2',
    'DenseNet',
    'RDNet',
    'ReXNet',
    'ShuffleNetV2',
    'TimmBackbone',
]
