"""Training: importing this package registers hooks, loops and optimizer wrappers."""
# ruff: noqa: F401

from mmdense import models  # registers the models that hooks look for
from mmdense.engine.checkpoint_hook import CheckpointHook
from mmdense.engine.condense_schedule import CondenseScheduleHook
from mmdense.engine.hooks import ChannelsLastHook, CompileBackboneHook, LoadReportHook
from mmdense.engine.layer_decay import LayerDecayOptimWrapperConstructor
from mmdense.engine.loops import EpochBasedTrainLoop, IterBasedTrainLoop
from mmdense.engine.nan_guard import NaNGuardHook
from mmdense.engine.optim_wrapper import BFloat16OptimWrapper
from mmdense.engine.outputs import SaveLabelMapsHook, SavePredictionsHook
