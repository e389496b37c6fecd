"""bfloat16 training on the available device."""

from contextlib import contextmanager

import pytest
import torch
from mmengine.device import get_device
from mmengine.optim import build_optim_wrapper
from torch import nn

import mmdense  # noqa: F401


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)
        self.synchronised = True

    def forward(self, x):
        self.dtype = self.layer(x).dtype
        return self.layer(x).float().square().mean()

    @contextmanager
    def no_sync(self):  # as in DDP
        self.synchronised = False
        yield
        self.synchronised = True


@pytest.fixture
def model():
    torch.manual_seed(0)
    return Model().to(get_device())


def build(model, **options):
    optimizer = dict(type='SGD', lr=0.1, momentum=0.9)
    options = dict(type='mmdense.BFloat16OptimWrapper', optimizer=optimizer, **options)
    return build_optim_wrapper(model, options)


def test_only_the_model_runs_in_bfloat16(model):
    wrapper = build(model, clip_grad=dict(max_norm=1.0))
    before = model.layer.weight.clone()
    with wrapper.optim_context(model):
        loss = model(torch.ones(3, 4, device=get_device()))
    assert model.dtype == torch.bfloat16
    wrapper.backward(loss)
    gradient = model.layer.weight.grad
    (expected,) = torch.autograd.grad(
        model(torch.ones(3, 4, device=get_device())), model.layer.weight
    )
    torch.testing.assert_close(gradient, expected, rtol=0.02, atol=0.01)  # float32, not scaled
    wrapper.step()
    assert model.layer.weight.dtype == torch.float32
    assert not torch.equal(model.layer.weight, before)


def test_gradients_accumulate_without_synchronisation(model):
    wrapper = build(model, accumulative_counts=2)
    wrapper.initialize_count_status(model, 0, 4)
    seen = []
    for _ in range(2):
        with wrapper.optim_context(model):
            seen.append(model.synchronised)
            loss = model(torch.ones(3, 4, device=get_device()))
        wrapper.update_params(loss)
    assert seen == [False, True]


def test_resumes_from_a_run_with_loss_scaling(model):
    wrapper = build(model)
    state = wrapper.state_dict()
    assert 'loss_scaler' not in state
    state['param_groups'][0]['lr'] = 0.5
    wrapper.load_state_dict(dict(state, loss_scaler=dict(scale=512.0)))  # from AmpOptimWrapper
    assert wrapper.optimizer.param_groups[0]['lr'] == 0.5
