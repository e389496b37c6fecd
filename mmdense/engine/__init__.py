"""What training needs around the networks: importing this package registers all of it."""

from mmdense import registry  # noqa: F401  (says so if the MM packages are missing)
from mmdense.engine.checkpoints import allow_training_state, load_from_timm
from mmdense.engine.hooks import ChannelsLastHook
from mmdense.engine.layer_decay import LayerDecayOptimWrapperConstructor

__all__ = [
    'ChannelsLastHook',
    'LayerDecayOptimWrapperConstructor',
    'allow_training_state',
    'load_from_timm',
]
