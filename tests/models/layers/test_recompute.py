"""Activation checkpointing equals the plain call, side effects included."""

import pytest
import torch
from families import Operators
from torch import nn

from mmdense.models.layers import recompute


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.3), nn.BatchNorm2d(8)
    )


def step(net, run, steps=2):
    torch.manual_seed(1)
    results = []
    for i in range(steps):
        x = (torch.randn(4, 3, 8, 8) + i).requires_grad_()
        y = run(net, x)
        (y * torch.randn_like(y)).sum().backward()
        results += [y.detach(), x.grad]
    return results + [p.grad for p in net.parameters()] + list(net.buffers())


@pytest.mark.parametrize('mode', ['train', 'eval', 'frozen'])
def test_bit_for_bit(mode):
    results = []
    for run in (lambda net, x: net(x), recompute):
        net = network()
        if mode == 'eval':
            net.eval()
        elif mode == 'frozen':
            net[1].eval()
        results.append(step(net, run))
        assert results[-1][-1] is net[4].num_batches_tracked
    assert len(results[0]) == 4 + 6 + 6
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


def test_intermediates_are_not_saved():
    net, x = network(), torch.randn(4, 3, 8, 8, requires_grad=True)
    saved = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor.shape
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        recompute(net, x)
    shapes = [shape for shape in saved.values() if shape.numel()]  # torch 2.4 keeps an empty one
    assert shapes
    assert all(shape == x.shape for shape in shapes)


def test_second_backward():
    net = network()
    y = recompute(net, torch.randn(4, 3, 8, 8, requires_grad=True)).sum()
    first = torch.autograd.grad(y, net[0].weight, retain_graph=True)[0]
    second = torch.autograd.grad(y, net[0].weight)[0]
    assert torch.equal(first, second)
    assert net[1].num_batches_tracked == 1


@pytest.mark.parametrize('hooked', [False, True])
def test_statistics_that_nobody_reads_are_not_copied(hooked):
    """A norm of another class, or with a hook, may read them in training."""
    norm, read = nn.BatchNorm2d(3, momentum=None), []
    if hooked:
        norm.register_forward_hook(lambda norm, *_: read.append(norm.num_batches_tracked.item()))
    with Operators() as operators:
        recompute([norm, nn.ReLU()], torch.randn(2, 3, 4, 4, requires_grad=True)).sum().backward()
    assert operators.names.count('clone') == (3 if hooked else 0)
    assert read == ([1, 2] if hooked else [])
    assert norm.num_batches_tracked == 1
