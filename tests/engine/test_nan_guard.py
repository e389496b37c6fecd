"""Stopping on numbers that are not finite, and keeping such weights out of checkpoints."""

import itertools
import math
from pathlib import Path

import pytest
import torch
from mmengine.hooks import EMAHook, Hook
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS, DefaultScope
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from torch import nn

from mmdense.engine import FiniteHook
from mmdense.errors import UserError

NUMBERS = itertools.count()
ITERS = 8


@pytest.fixture(autouse=True)
def _quiet(monkeypatch):
    """Leave out the report on the machine, which takes longer than the runs."""
    monkeypatch.setattr(Runner, '_log_env', lambda self, env_cfg: None)
    yield
    DefaultScope._instance_dict.clear()


class Model(BaseModel):
    """A weight of 1 whose loss is what ``factors`` say, one for each iteration.

    A factor makes the loss and its gradient; with ``harmless`` no gradient comes through.
    """

    def __init__(self, factors, *, harmless=False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.register_buffer('mask', torch.tensor([0.0, -math.inf]))
        self.factors = iter(factors)
        self.harmless = harmless

    def forward(self, inputs, data_samples, mode):
        factor = next(self.factors)
        loss = self.weight * 0 + factor if self.harmless else self.weight * factor
        return dict(loss_box=loss, loss_cls=self.weight * 0.0, count=torch.tensor(math.nan))


class Data(torch.utils.data.Dataset):
    def __len__(self):
        return 2 * ITERS

    def __getitem__(self, i):
        sample = BaseDataElement(metainfo=dict(img_path=f'images/{i}.jpg'))
        return dict(inputs=torch.zeros(1), data_samples=sample)


def train(folder, model, *, hooks=(), wrapper=None, checkpoints=1, **options):
    runner = Runner(
        model=model,
        work_dir=str(folder),
        experiment_name=f'finite-{next(NUMBERS)}',
        train_dataloader=dict(
            dataset=Data(),
            sampler=dict(type='DefaultSampler', shuffle=False),
            batch_size=2,
            collate_fn=dict(type='pseudo_collate'),
        ),
        train_cfg=dict(by_epoch=False, max_iters=ITERS),
        optim_wrapper=wrapper
        or dict(optimizer=dict(type='SGD', lr=0.125), clip_grad=dict(max_norm=1.0)),
        param_scheduler=dict(type='LinearLR', start_factor=0.5, end=2, by_epoch=False),
        default_hooks=dict(
            checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=checkpoints),
            finite=dict(type='mmdense.FiniteHook', **options),
        ),
        custom_hooks=list(hooks),
        log_processor=dict(by_epoch=False),
        default_scope='mmdense',
    )
    runner.train()
    return runner


def saved(folder):
    """Return the checkpoints' numbers; all of their weights must be finite."""
    files = sorted(Path(folder).glob('*.pth'))
    for file in files:
        held = torch.load(file, weights_only=False)
        assert held['state_dict']['weight'].isfinite()
    return [int(file.stem.removeprefix('iter_')) for file in files]


def test_weights_that_are_lost_stop_the_run_at_once(tmp_path):
    with pytest.raises(UserError) as caught:
        train(tmp_path, Model([1.0, 1.0, math.nan]), hooks=[EMAHook()])
    (line,) = str(caught.value).splitlines()
    assert line.startswith(
        'no finite loss since iteration 3 of 8 (loss nan, loss_box nan), at learning rate 0.125, '
        'on images/4.jpg, images/5.jpg; at iteration 3 the weights are not finite either. '
        'Try a lower learning rate or a longer warm-up, a look at these images'
    )
    assert line.endswith(f'the last one is {tmp_path / "iter_2.pth"}')
    assert saved(tmp_path) == [1, 2]


def test_the_learning_rate_is_that_of_the_iteration(tmp_path):
    """Not that of the next one; and there is no checkpoint to name."""
    with pytest.raises(UserError, match='learning rate 0.0625, .*there is none yet$'):
        train(tmp_path, Model([math.inf]))
    assert saved(tmp_path) == []


def test_losses_that_do_no_harm_may_come_for_a_while(tmp_path):
    factors = [1.0, *[math.nan] * 3, 1.0, *[math.nan] * 3]
    train(tmp_path, Model(factors, harmless=True), patience=4)
    assert saved(tmp_path) == [*range(1, ITERS + 1)]
    said = 'since iteration 6 of 8 .* at iteration 8 the weights are finite'
    with pytest.raises(UserError, match=said):
        train(tmp_path / 'less', Model([*[1.0] * 5, *[-math.inf] * 3], harmless=True), patience=3)
    assert saved(tmp_path / 'less') == [*range(1, ITERS)]


def test_a_finite_loss_that_spoils_the_weights(tmp_path):
    """They are not written, although no loss has told of them yet."""

    class Spoil(Hook):
        def after_train_iter(self, runner, **_):
            if runner.iter == 3:
                runner.model.weight.data.fill_(math.inf)

    said = f'^NaN or infinite weights at iteration 4 of 8. .* last one is {tmp_path}/iter_2.pth'
    with pytest.raises(UserError, match=said):
        train(tmp_path, Model([1.0] * ITERS), hooks=[Spoil()], checkpoints=2)
    assert saved(tmp_path) == [2]


class ScalingOptimWrapper(OptimWrapper):
    """What mmengine's AmpOptimWrapper does, with torch's scaler for a CPU."""

    def __init__(self, **options):
        super().__init__(**options)
        self.loss_scaler = torch.amp.GradScaler('cpu', init_scale=2.0**20)
        self.skipped = 0

    def backward(self, loss, **_):
        self.loss_scaler.scale(loss).backward()

    def step(self, **_):
        scale = self.loss_scaler.get_scale()
        self.loss_scaler.step(self.optimizer)
        self.loss_scaler.update()
        self.skipped += self.loss_scaler.get_scale() < scale


def test_skips_of_a_scaler_are_no_reason(tmp_path):
    model = Model([2.0**125] * ITERS)  # finite, and infinite when scaled
    wrapper = ScalingOptimWrapper(optimizer=torch.optim.SGD(model.parameters(), lr=2.0**-125))
    train(tmp_path, model, wrapper=wrapper, patience=1)
    assert wrapper.skipped == ITERS
    assert saved(tmp_path) == [*range(1, ITERS + 1)]


def test_what_a_scaler_and_unclipped_gradients_may_be_helped_by(tmp_path):
    model = Model([math.nan])
    wrapper = ScalingOptimWrapper(optimizer=torch.optim.SGD(model.parameters(), lr=1.0))
    with pytest.raises(UserError) as caught:
        train(tmp_path, model, wrapper=wrapper, patience=1)
    assert 'weights are finite. Try ' in str(caught.value)  # the scaler left the step out
    assert 'optim_wrapper.clip_grad.max_norm=10, --amp-dtype bfloat16, a look' in str(caught.value)


def test_no_device_is_asked_while_all_is_well():
    """The hook reads what is in the message hub; from a GPU that would be a wait."""

    class Numbers:
        def current(self):
            return 0.5

    class Hub:
        def get_scalar(self, name):
            assert name == 'train/loss'
            return Numbers()

    class Watched:
        message_hub, iter = Hub(), 4

    FiniteHook().after_train_iter(Watched(), 0, outputs=dict(loss=object(), acc=object()))


def test_patience_is_checked():
    with pytest.raises(ValueError, match='patience is 0, must be at least 1'):
        HOOKS.build(dict(type='mmdense.FiniteHook', patience=0))
