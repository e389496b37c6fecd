"""Batch norms folded into convolutions."""

import copy

import pytest
import torch
from families import randomise, run, same
from torch import nn

from mmdense.models.deploy.fold import fold_norm


@pytest.mark.parametrize(
    ('bias', 'affine', 'groups'), [(False, True, 1), (True, False, 1), (True, True, 4)]
)
def test_folding_equals_the_norm(bias, affine, groups):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, 3, 2, 1, groups=groups, bias=bias)
    norm = nn.BatchNorm2d(8, eps=0.1, affine=affine)
    norm(torch.randn(4, 8, 5, 5) * 3 + 1)
    if affine:
        randomise(norm, signed=True)
    before = copy.deepcopy([*conv.state_dict().values(), *norm.state_dict().values()])
    folded = fold_norm(conv, norm)
    after = [*conv.state_dict().values(), *norm.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert norm.training
    assert not folded.training
    assert not any(p.requires_grad for p in folded.parameters())
    x = torch.randn(2, 4, 9, 7)
    same([run(folded, x)], [run(lambda y: norm.eval()(conv(y)), x)])


def test_folded_weights_are_rounded_once():
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(64, 64, 1).bfloat16(), nn.BatchNorm2d(64).bfloat16()
    randomise(norm, signed=True)
    folded = fold_norm(conv, norm)
    exact = fold_norm(conv.double(), norm.double())
    assert torch.equal(folded.weight, exact.weight.float().bfloat16())
    assert torch.equal(folded.bias, exact.bias.float().bfloat16())
