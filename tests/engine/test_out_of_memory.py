"""Advice when memory runs out."""

import numpy as np
import pytest
import torch

from mmdense.config.read import load_config
from mmdense.engine.out_of_memory import explain_out_of_memory
from mmdense.errors import UserError
from support import DEMOS, ROOT

RECIPE = str(ROOT / 'configs/detection/rdnet/cascade-mask-rcnn_rdnet-t_fpn_amp-ms-crop-3x_coco.py')


def advice(path, loader='train', **options):
    """Return the message after a CPU has run out of memory for real."""
    cfg = load_config(path, options=options)
    with pytest.raises(UserError) as caught, explain_out_of_memory(cfg, loader):
        torch.empty(1 << 60)
    (line,) = str(caught.value).splitlines()
    assert "can't allocate memory" in line
    return line


def test_options_in_use_are_not_advised():
    line = advice(RECIPE)
    assert 'train_dataloader.batch_size=4 and images of up to 800 x 1344. ' in line
    assert 'model.backbone.memory=lean, then train_dataloader.batch_size=2 with' in line
    assert 'bfloat16' not in line
    line = advice(RECIPE, **{'model.backbone.memory': 'lean', 'train_dataloader.batch_size': 1})
    assert 'Try --cfg-options model.backbone.memory=recompute, then what ' in line
    line = advice(RECIPE, **{'model.backbone.with_cp': True})
    assert 'Try train_dataloader.batch_size=2 with --auto-scale-lr, then what ' in line
    line = advice(RECIPE, 'test', **{'test_dataloader.batch_size': 1})
    assert 'with test_dataloader.batch_size=1. Try smaller images. (' in line


def test_a_backbone_without_memory_modes_and_images_of_unknown_size():
    options = {'model.backbone.type': 'ResNet', 'train_dataloader.dataset.pipeline': []}
    line = advice(str(DEMOS['detection']), **options)
    assert 'batch_size=8. Try train_dataloader.batch_size=4 with' in line


def raise_(error):
    raise error


@pytest.mark.parametrize(
    ('fail', 'reason'),
    [
        (lambda: np.empty(1 << 57), '.*Unable to allocate.*'),
        (lambda: raise_(MemoryError()), 'MemoryError'),
        (
            lambda: raise_(torch.cuda.OutOfMemoryError('CUDA is full.\nBy 1 GiB.')),
            'OutOfMemoryError: CUDA is full',
        ),
        (lambda: raise_(RuntimeError('CUDNN_STATUS_ALLOC_FAILED')), '.*ALLOC_FAILED'),
        (lambda: raise_(RuntimeError('CUDA error: out of memory')), '.*CUDA error: out of memory'),
    ],
)
def test_errors_of_memory(fail, reason):
    cfg = load_config(str(DEMOS['detection']))
    with pytest.raises(UserError, match=rf' \({reason}\)$'), explain_out_of_memory(cfg, 'train'):
        fail()


def test_other_errors_pass():
    cfg = load_config(str(DEMOS['detection']))
    with pytest.raises(RuntimeError, match='shapes'), explain_out_of_memory(cfg, 'train'):
        raise RuntimeError('shapes do not match')
