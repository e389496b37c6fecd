"""Fixtures of the operators, which the tests call through ``mmcv.ops`` where it supports CPUs."""

import os

import pytest
import torch

import mmdense.ops


@pytest.fixture(autouse=True)
def _mmdense_operators():
    if mmdense.ops.backend() != 'torchvision':
        pytest.skip('mmcv uses its compiled extension: set MMDENSE_OPS=torchvision')


DEVICE = os.environ.get('MMDENSE_TEST_DEVICE')
HERE = ['cpu', 'cuda'] if torch.cuda.is_available() else ['cpu']


@pytest.fixture(params=[DEVICE] if DEVICE else HERE)
def device(request) -> torch.device:
    return torch.device(request.param)


@pytest.fixture
def rng(device) -> torch.Generator:
    return torch.Generator(device).manual_seed(0)
