"""What training needs around the networks: importing this package registers all of it."""

from mmdense.engine.checkpoints import load_from_timm
from mmdense.engine.hooks import ChannelsLastHook

__all__ = ['ChannelsLastHook', 'load_from_timm']
