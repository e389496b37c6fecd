"""The NaN guard: when it stops a run, and what its message says."""

import math
from pathlib import Path

import pytest
import torch
from mmengine.hooks import EMAHook, Hook
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper
from mmengine.registry import HOOKS
from mmengine.structures import BaseDataElement
from torch import nn

from mmdense.engine import NaNGuardHook
from mmdense.errors import UserError
from runs import build_runner

ITERS = 8


class Model(BaseModel):
    """A single weight, multiplied by the iteration's factor to give the loss.

    With ``harmless``, the factor has no gradient.
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


SAMPLES = [BaseDataElement(metainfo=dict(img_path=f'images/{i}.jpg')) for i in range(2 * ITERS)]
DATA = [dict(inputs=torch.zeros(1), data_samples=sample) for sample in SAMPLES]


def train(folder, model, *, hooks=(), wrapper=None, checkpoints=1, **options):
    sgd = dict(optimizer=dict(type='SGD', lr=0.125), clip_grad=dict(max_norm=1.0))
    runner = build_runner(
        folder,
        model,
        DATA,
        iters=ITERS,
        collate='pseudo_collate',
        optim_wrapper=wrapper or sgd,
        param_scheduler=dict(type='LinearLR', start_factor=0.5, end=2, by_epoch=False),
        default_hooks=dict(
            checkpoint=dict(type='CheckpointHook', by_epoch=False, interval=checkpoints),
            nan_guard=dict(type='mmdense.NaNGuardHook', **options),
        ),
        hooks=hooks,
        default_scope='mmdense',
    )
    runner.train()


def saved(folder):
    """Return the iterations of the checkpoints, whose weights must be finite."""
    files = sorted(Path(folder).glob('*.pth'))
    for file in files:
        checkpoint = torch.load(file, weights_only=False)
        assert checkpoint['state_dict']['weight'].isfinite()
    return [int(file.stem.removeprefix('iter_')) for file in files]


def test_broken_weights_stop_the_run_at_once(tmp_path):
    with pytest.raises(UserError) as caught:
        train(tmp_path, Model([1.0, 1.0, math.nan]), hooks=[EMAHook()])
    (line,) = str(caught.value).splitlines()
    assert line.startswith(
        'no finite loss since iteration 3 of 8 (loss nan, loss_box nan), at learning rate 0.125, '
        'on images/4.jpg, images/5.jpg; at iteration 3 the weights are not finite either. '
        'Try a lower learning rate or a longer warm-up, checking these images'
    )
    assert line.endswith(f'last checkpoint: {tmp_path / "iter_2.pth"}')
    assert saved(tmp_path) == [1, 2]


def test_the_message_has_the_learning_rate_of_the_bad_iteration(tmp_path):
    """Not of the next one. There is no checkpoint to name."""
    with pytest.raises(UserError, match='learning rate 0.0625, .*last checkpoint: none yet$'):
        train(tmp_path, Model([math.inf]))
    assert saved(tmp_path) == []


def test_harmless_bad_losses_are_tolerated_for_a_while(tmp_path):
    factors = [1.0, *[math.nan] * 3, 1.0, *[math.nan] * 3]
    train(tmp_path, Model(factors, harmless=True), patience=4)
    assert saved(tmp_path) == [*range(1, ITERS + 1)]
    message = 'since iteration 6 of 8 .* at iteration 8 the weights are finite'
    with pytest.raises(UserError, match=message):
        train(tmp_path / 'less', Model([*[1.0] * 5, *[-math.inf] * 3], harmless=True), patience=3)
    assert saved(tmp_path / 'less') == [*range(1, ITERS)]


def test_broken_weights_are_not_saved_after_a_finite_loss(tmp_path):
    class BreakWeights(Hook):
        def after_train_iter(self, runner, **_):
            if runner.iter == 3:
                runner.model.weight.data.fill_(math.inf)

    message = f'^NaN or infinite weights at iteration 4 of 8. .*: {tmp_path}/iter_2.pth$'
    with pytest.raises(UserError, match=message):
        train(tmp_path, Model([1.0] * ITERS), hooks=[BreakWeights()], checkpoints=2)
    assert saved(tmp_path) == [2]


class ScalingOptimWrapper(OptimWrapper):
    """mmengine's AmpOptimWrapper with torch's scaler for CPUs."""

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


def test_steps_that_a_scaler_skips_do_not_count(tmp_path):
    model = Model([2.0**125] * ITERS)  # finite, but infinite when scaled
    wrapper = ScalingOptimWrapper(optimizer=torch.optim.SGD(model.parameters(), lr=2.0**-125))
    train(tmp_path, model, wrapper=wrapper, patience=1)
    assert wrapper.skipped == ITERS
    assert saved(tmp_path) == [*range(1, ITERS + 1)]


def test_the_message_suggests_clipping_and_bfloat16(tmp_path):
    model = Model([math.nan])
    wrapper = ScalingOptimWrapper(optimizer=torch.optim.SGD(model.parameters(), lr=1.0))
    with pytest.raises(UserError) as caught:
        train(tmp_path, model, wrapper=wrapper, patience=1)
    assert 'weights are finite. Try ' in str(caught.value)  # the scaler skipped the step
    assert 'clip_grad.max_norm=10, --amp-dtype bfloat16, checking' in str(caught.value)


def test_finite_losses_cause_no_wait_for_the_device():
    """The hook reads the message hub and touches no tensor."""

    class Numbers:
        def current(self):
            return 0.5

    class Hub:
        def get_scalar(self, name):
            assert name == 'train/loss'
            return Numbers()

    class FakeRunner:
        message_hub, iter = Hub(), 4

    NaNGuardHook().after_train_iter(FakeRunner(), 0, outputs=dict(loss=object(), acc=object()))


@pytest.mark.parametrize('name', ['NaNGuardHook', 'FiniteHook'])  # the second is deprecated
def test_patience_is_checked(name):
    with pytest.raises(ValueError, match='patience is 0, must be at least 1'):
        HOOKS.build(dict(type=f'mmdense.{name}', patience=0))
