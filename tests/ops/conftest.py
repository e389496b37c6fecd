"""Operators are called as mmcv calls them, through ``mmcv.ops``, where mmcv lets a CPU do so."""

import pytest
import torch

import mmdense.ops


@pytest.fixture(autouse=True)
def _our_operators():
    if mmdense.ops.backend() != 'torchvision':
        pytest.skip('mmcv uses its compiled extension here: MMDENSE_OPS=torchvision tests ours')


@pytest.fixture(params=['cpu', 'cuda'] if torch.cuda.is_available() else ['cpu'])
def device(request) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def rng(device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)
