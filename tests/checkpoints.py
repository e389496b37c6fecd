"""Checkpoints that several test files make: plain and hostile files, and those of short runs."""

import itertools
from pathlib import Path

import pytest
import safetensors.torch
import torch
from mmengine.dataset import InfiniteSampler
from mmengine.registry import DefaultScope
from mmengine.runner import Runner

from mmdense.errors import UserError

NUMBERS = itertools.count()


class Call:
    """Is pickled as the call of a function."""

    def __init__(self, function, *args):
        self.function, self.args = function, args

    def __reduce__(self):
        return self.function, self.args

    def __call__(self):  # so that the result of a call can be called
        raise AssertionError


def tensors(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        'a.weight': torch.randn(64, 32, generator=generator),
        'a.bias': torch.randn(64, generator=generator).half(),
        'b.count': torch.tensor(3),
    }


def save_legacy(content, file):
    torch.save(content, file, _use_new_zipfile_serialization=False)


TORCH_WRITERS = dict(zip=torch.save, legacy=save_legacy)
WRITERS = dict(**TORCH_WRITERS, safetensors=safetensors.torch.save_file)


def assert_same(weights, expected):
    assert weights.keys() == expected.keys()
    for name, value in expected.items():
        assert weights[name].dtype == value.dtype, name
        assert torch.equal(weights[name], value), name


def error_of(function, *args, **options):
    """Return the message of the UserError that a call raises, which must be one line."""
    with pytest.raises(UserError) as error:
        function(*args, **options)
    assert '\n' not in str(error.value)
    return str(error.value)


def make_runner(folder, model, data, iters=2, hooks=(), **options):
    """Return a runner for some iterations of two images; it writes a checkpoint after each."""
    return Runner(
        model=model,
        work_dir=str(folder),
        experiment_name=f'{Path(folder).name}-{next(NUMBERS)}',
        train_dataloader=dict(
            dataset=data,
            sampler=dict(type=InfiniteSampler, shuffle=False),
            batch_size=2,
            collate_fn=dict(type='default_collate'),
        ),
        train_cfg=dict(by_epoch=False, max_iters=iters),
        optim_wrapper=dict(optimizer=dict(type='SGD', lr=0.01)),
        param_scheduler=dict(type='ConstantLR', by_epoch=False),
        custom_hooks=list(hooks),
        default_hooks=dict(checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=1)),
        log_processor=dict(by_epoch=False),
        randomness=dict(seed=0),
        **options,
    )


@pytest.fixture
def short_runs(monkeypatch):
    """Leave out mmengine's report on the machine, which takes longer than a short run."""
    monkeypatch.setattr(Runner, '_log_env', lambda self, env_cfg: None)
    yield
    DefaultScope._instance_dict.clear()
