"""Names that several test files use."""

from pathlib import Path

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
