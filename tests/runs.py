"""Runs of mmengine's runner with tiny models."""

import itertools
from pathlib import Path

from mmengine.dataset import DefaultSampler, InfiniteSampler
from mmengine.runner import Runner

NUMBERS = itertools.count()


def loader(data, *, endless=False, shuffle=False, collate='default_collate', batch_size=2):
    """Return a loader's config; by default its batches are in order."""
    sampler = dict(type=InfiniteSampler if endless else DefaultSampler, shuffle=shuffle)
    collate = dict(type=collate)
    return dict(dataset=data, sampler=sampler, batch_size=batch_size, collate_fn=collate)


def build_runner(
    folder, model, data, *, epochs=None, iters=12, hooks=(), default_hooks=None, **options
):
    """Build a runner by epochs or by iterations that writes a checkpoint for each iteration.

    The options are arguments of the loader, if it has them, and else of the runner.
    """
    by_epoch = epochs is not None
    names = ('collate', 'batch_size')
    ours = {name: options.pop(name) for name in names if name in options}
    length = dict(max_epochs=epochs) if by_epoch else dict(max_iters=iters)
    checkpoint = dict(type='CheckpointHook', by_epoch=False, interval=1)
    default_hooks = dict(checkpoint=checkpoint) | (default_hooks or {})
    arguments = dict(
        train_dataloader=loader(data, endless=not by_epoch, **ours),
        train_cfg=dict(by_epoch=by_epoch, val_interval=2, **length),
        default_hooks=dict(logger=dict(type='LoggerHook', interval=1), **default_hooks),
        custom_hooks=list(hooks),
        log_processor=dict(by_epoch=by_epoch),
        randomness=dict(seed=0),
        # Runs with the same name would share log buffers.
        experiment_name=f'{Path(folder).name}-{next(NUMBERS)}',
    )
    return Runner(model, str(folder), **(arguments | options))
