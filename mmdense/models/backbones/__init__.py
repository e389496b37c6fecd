"""Backbones with multi-scale outputs; :mod:`.base` says what all of them promise."""

from mmdense.models.backbones.base import Backbone
from mmdense.models.backbones.densenet import DenseNet
from mmdense.models.backbones.rdnet import RDNet
from mmdense.models.backbones.rexnet import ReXNet

__all__ = ['Backbone', 'DenseNet', 'RDNet', 'ReXNet']
