"""Backbones with multi-scale outputs; :mod:`.base` says what all of them promise."""

from mmdense.models.backbones.base import Backbone
from mmdense.models.backbones.rdnet import RDNet

__all__ = ['Backbone', 'RDNet']
