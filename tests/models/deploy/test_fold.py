"""Batch norms folded into convolutions."""

import copy

import pytest
import torch
from families import randomise, run, same
from torch import nn

from mmdense.models import TimmBackbone
from mmdense.models.deploy.fold import fold_batch_norms, fold_norm


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


@pytest.mark.parametrize(
    ('name', 'left'),
    [
        ('test_resnet', 0),
        ('mobilenetv3_small_050', 0),  # with activations in norms and squeeze-excite gates
        ('resnetv2_18', 8),  # norms of sums
        ('test_convnext', 0),  # has no batch norms
    ],
)
def test_norms_of_any_network(name, left):
    net = TimmBackbone(model_name=name).eval()
    randomise(net)
    x = torch.randn(2, 3, 64, 96)
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    expected = run(net, x)
    assert fold_batch_norms(net, torch.randn(1, 3, 64, 64)) == len(norms) - left
    assert sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) == left
    same(run(net, x), expected)


class Odd(nn.Module):
    """Norms that don't fold: after an activation in place, and after a convolution used twice."""

    def __init__(self):
        super().__init__()
        self.convs, self.norms = nn.ModuleList(), nn.ModuleList()
        for _ in range(3):
            self.convs.append(nn.Conv2d(3, 3, 1))
            self.norms.append(nn.BatchNorm2d(3))

    def forward(self, x):
        x = self.norms[0](self.convs[0](x))
        x = self.norms[1](self.convs[1](x).relu_())
        return [self.norms[2](self.convs[2](x)) + self.convs[2](x)]


class Shared(Odd):
    def forward(self, x):
        x = self.convs[0](x)
        return [x + self.norms[0](x)]


def test_only_what_can_be_folded():
    nets = [Odd().eval(), Shared().eval()]
    for net in nets:
        randomise(net)
    x = torch.randn(1, 3, 8, 8)
    expected = run(nets[0], x)
    assert fold_batch_norms(nets[0], x) == 1
    same(run(nets[0], x), expected)
    with pytest.raises(RuntimeError, match='Shared: outputs differ'):
        fold_batch_norms(nets[1], x)
