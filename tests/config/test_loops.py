"""Loops, samplers, hooks and schedules that don't agree are one line, before anything is built."""

import pytest
from mmengine.config import ConfigDict
from mmengine.dataset import InfiniteSampler
from mmengine.runner import IterBasedTrainLoop

from mmdense import engine  # noqa: F401  (registers the loops)
from mmdense.config import read
from mmdense.config.validate import check_loops
from mmdense.errors import UserError
from support import DEMOS

EPOCHS = dict(type='mmdense.EpochBasedTrainLoop', max_epochs=2)
ITERS = dict(type='mmdense.IterBasedTrainLoop', max_iters=20, val_interval=10)
SAVED = dict(type='mmdense.CheckpointHook', by_epoch=False)
BY_ITER = {'train_cfg': ITERS, 'default_hooks.checkpoint': SAVED, 'param_scheduler': []}
SWITCH = dict(type='mmdet.PipelineSwitchHook', switch_epoch=1, switch_pipeline=[])
ENDLESS = (
    'train_dataloader.sampler: InfiniteSampler never ends, so an epoch would not either: add '
    '--cfg-options train_dataloader.sampler.type=DefaultSampler'
)


def check(task, changes, loaders=('train', 'val')):
    cfg = read.load_config(str(DEMOS[task]))
    for place, value in changes.items():
        *path, name = place.split('.')
        node = cfg
        for key in path:
            node = node[key]
        node[name] = ConfigDict(value) if isinstance(value, dict) else value
    check_loops(cfg, loaders)


@pytest.mark.parametrize('task', DEMOS)
@pytest.mark.parametrize(
    'changes',
    [
        {},
        BY_ITER,
        {**BY_ITER, 'train_cfg': dict(ITERS, type=IterBasedTrainLoop)},
    ],
)
def test_what_agrees(task, changes):
    check(task, changes)


@pytest.mark.parametrize(
    ('task', 'changes', 'message'),
    [
        ('segmentation', dict(train_cfg=EPOCHS), ENDLESS),
        ('detection', {'train_dataloader.sampler.type': InfiniteSampler}, ENDLESS),
        (
            'detection',
            {'train_dataloader.sampler.type': 'mmdet.GroupMultiSourceSampler'},
            'train_dataloader.sampler: GroupMultiSourceSampler never ends',
        ),
        (
            'segmentation',
            {'val_dataloader.sampler.type': 'InfiniteSampler'},
            'val_dataloader.sampler: InfiniteSampler never ends',
        ),
        (
            'detection',
            {'val_dataloader.drop_last': True},
            'val_dataloader.drop_last would leave images out of the metrics: add --cfg-options '
            'val_dataloader.drop_last=False',
        ),
        (
            'detection',
            {'train_cfg.val_interval': 0},
            'train_cfg.val_interval is 0, must be at least 1; without validation: val_data',
        ),
        ('detection', {'train_cfg.max_epochs': 0}, 'train_cfg.max_epochs is 0, must be at least 1'),
        (
            'detection',
            {**BY_ITER, 'default_hooks.checkpoint': dict(type='CheckpointHook', interval=1)},
            'default_hooks.checkpoint counts epochs (by_epoch), but training by iterations has '
            'only one: add --cfg-options default_hooks.checkpoint.by_epoch=False, and count in',
        ),
        (
            'segmentation',
            {'default_hooks.checkpoint.by_epoch': True},
            'default_hooks.checkpoint counts epochs (by_epoch)',
        ),
        (
            'segmentation',
            dict(param_scheduler=[ConfigDict(type='MultiStepLR', milestones=[8])]),
            'param_scheduler.0 counts epochs (by_epoch), but training by iterations has only one: '
            'add --cfg-options param_scheduler.0.by_epoch=False, and count in iterations',
        ),
        (
            'segmentation',
            dict(param_scheduler=dict(type='CosineAnnealingLR', T_max=8)),
            'param_scheduler counts epochs (by_epoch)',
        ),
        (
            'segmentation',
            dict(custom_hooks=[ConfigDict(SWITCH)]),
            'custom_hooks.0 counts epochs (switch_epoch), but training by iterations has only one: '
            'take EpochBasedTrainLoop',
        ),
    ],
)
def test_what_does_not_agree(task, changes, message):
    with pytest.raises(UserError) as error:
        check(task, changes)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ('changes', 'loaders'),
    [
        ({'default_hooks.checkpoint': dict(type='CheckpointHook', interval=-1)}, ['train']),
        (
            dict(param_scheduler=dict(type='CosineAnnealingLR', convert_to_iter_based=True)),
            ['train'],
        ),
        ({'default_hooks.checkpoint.by_epoch': True, 'train_cfg.val_interval': 0}, ['test']),
        (dict(default_hooks=None, custom_hooks=None, param_scheduler=None), ['train']),
    ],
)
def test_what_only_looks_wrong(changes, loaders):
    check('segmentation', changes, loaders)
