"""What training needs around the networks: importing this package registers its hooks."""

from mmdense.engine.hooks import ChannelsLastHook

__all__ = ['ChannelsLastHook']
