"""What training needs around the networks: importing this package registers all of it."""

from mmdense import registry  # noqa: F401  (says so if the MM packages are missing)
from mmdense.engine.checkpoint_hook import CheckpointHook
from mmdense.engine.checkpoints import load_from_condensenetv2, load_from_timm
from mmdense.engine.condense_schedule import CondenseScheduleHook
from mmdense.engine.coverage import Coverage, CoverageHook, PretrainedInit, load_into
from mmdense.engine.files import allow_training_state, read_checkpoint, write_checkpoint
from mmdense.engine.finite import FiniteHook
from mmdense.engine.hooks import ChannelsLastHook, CompileBackboneHook
from mmdense.engine.layer_decay import LayerDecayOptimWrapperConstructor
from mmdense.engine.loops import EpochBasedTrainLoop, IterBasedTrainLoop
from mmdense.engine.optim_wrapper import BFloat16OptimWrapper

__all__ = [
    'BFloat16OptimWrapper',
    'ChannelsLastHook',
    'CheckpointHook',
    'CompileBackboneHook',
    'CondenseScheduleHook',
    'Coverage',
    'CoverageHook',
    'EpochBasedTrainLoop',
    'FiniteHook',
    'IterBasedTrainLoop',
    'LayerDecayOptimWrapperConstructor',
    'PretrainedInit',
    'allow_training_state',
    'load_from_condensenetv2',
    'load_from_timm',
    'load_into',
    'read_checkpoint',
    'write_checkpoint',
]
