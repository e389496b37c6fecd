"""Shared paths, options and helpers."""

import json
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

from mmengine.logging import MMLogger
from mmengine.registry import DefaultScope
from mmengine.visualization import Visualizer

ROOT = Path(__file__).parents[1]
DEMOS = dict(
    detection=ROOT / 'configs/detection/demo/faster-rcnn_rdnet-nano_fpn_8e_digits.py',
    segmentation=ROOT / 'configs/segmentation/demo/upernet_rdnet-nano_400i_digits-192x192.py',
)
CONDENSED = ROOT / 'configs/detection/demo/faster-rcnn_condensenetv2-nano_fpn_8e_digits.py'
# Two iterations of eight images, then one validation.
TWO_ITERATIONS = dict(
    detection=['train_cfg.max_epochs=1'],
    segmentation=[
        'train_cfg.max_iters=2',
        'train_cfg.val_interval=2',
        'default_hooks.checkpoint.interval=2',
    ],
)


def load_tool(name):
    """Import tools/NAME.py as a module."""
    spec = spec_from_file_location(f'tools_{name}', ROOT / f'tools/{name}.py')
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_log(work_dir, records, run='20260101_000000'):
    """Write the training log of a run in a work dir."""
    file = work_dir / run / 'vis_data/scalars.json'
    file.parent.mkdir(parents=True)
    file.write_text('\n'.join(map(json.dumps, records)))


def forget_runs():
    """Forget the scopes, loggers and visualizers that mmengine keeps for the whole process."""
    for kind in (DefaultScope, MMLogger, Visualizer, *Visualizer.__subclasses__()):
        kind._instance_dict.clear()
