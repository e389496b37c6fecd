"""Pruning against a literal implementation, and the condensed against the learned form."""

import copy
import math

import pytest
import torch
from families import DEVICE
from torch import nn
from torch.nn import functional as F

from mmdense.models.layers import (
    CondensedGroupConv,
    CondensedReactivation,
    LearnedGroupConv,
    SparseReactivation,
    pruning_stage,
)

# Channels that groups select from, channels that form groups, groups, condense factor.
SHAPE = (24, 12, 6, 6)
SHAPES = [(16, 8, 4, 4), (24, 16, 4, 6), (12, 8, 8, 4), (9, 4, 1, 3), (10, 6, 3, 1)]
EVERY = pytest.mark.parametrize('shape', [SHAPE, *SHAPES], ids=str)
BOTH = pytest.mark.parametrize(
    'kind', [LearnedGroupConv, SparseReactivation], ids=lambda kind: kind.__name__
)


def make(kind, shape=SHAPE, seed=0, **options):
    torch.manual_seed(seed)
    chosen, grouped, groups, factor = shape
    sides = (chosen, grouped) if kind is LearnedGroupConv else (grouped, chosen)
    layer = kind(*sides, groups=groups, condense_factor=factor, **options)
    with torch.no_grad():
        for value in (layer.norm.weight, layer.norm.running_var):
            value.uniform_(0.5, 1.5)
        for value in (layer.norm.bias, layer.norm.running_mean):
            value.uniform_(-0.5, 0.5)
    return layer


def inputs(layer, batch=2, size=5):
    """Return the inputs of a learned layer's forward."""
    generator = torch.Generator(DEVICE).manual_seed(1)
    new = torch.randn(batch, layer.conv.in_channels, size, size, generator=generator)
    if isinstance(layer, LearnedGroupConv):
        return (new,)
    return torch.randn(batch, layer.channels, size, size, generator=generator), new


def progress(stage, factor):
    """Return the progress of training at which a stage begins."""
    return 0.5 * stage / (factor - 1) if factor > 1 else 0.5


class Literal:
    """The published pruning, one channel after the other."""

    def __init__(self, kind, weight, shape):
        self.kind, self.shape = kind, shape
        self.weight = weight.detach().flatten(1).double()
        self.pruned = [set() for _ in range(shape[2])]

    def at(self, values, group, channel):
        """Return the values of all members of a group for a channel that the group selects."""
        values = values if self.kind is LearnedGroupConv else values.t()
        return values[group :: self.shape[2], channel]

    def prune(self):
        """Let each group lose C / F of its channels, those of least L1 weight."""
        channels, _, groups, factor = self.shape
        for group in range(groups):
            left = [c for c in range(channels) if c not in self.pruned[group]]
            left.sort(key=lambda c: float(self.at(self.weight, group, c).abs().sum()))
            self.pruned[group] |= {*left[: channels // factor]}

    def mask(self):
        mask = torch.ones(self.weight.shape, dtype=torch.uint8)
        for group, channels in enumerate(self.pruned):
            for channel in channels:
                self.at(mask, group, channel).fill_(0)
        return mask


@BOTH
@EVERY
@pytest.mark.parametrize('values', ['random', 'training', 'zero', 'one', 'some zero'])
def test_masks_equal_the_literal_ones_after_every_stage(kind, shape, values):
    """Pruned connections stay pruned if weights change; the first of equal channels are pruned.

    Channels of zero weight would tie with pruned ones, if those were ranked as zeros.
    """
    layer = make(kind, shape)
    chosen, _, groups, factor = shape
    training = values == 'training'
    if values in ('zero', 'one'):
        nn.init.constant_(layer.conv.weight, values == 'one')
    if values == 'some zero':
        layer._members(layer.conv.weight.data)[:, :, 1::2] = 0
    literal = Literal(kind, layer.conv.weight, shape)
    for stage in range(factor):
        if training:
            nn.init.normal_(layer.conv.weight)
            literal.weight = layer.conv.weight.detach().flatten(1).double()
        if stage:
            literal.prune()
        layer.prune_to(progress(stage, factor))
        assert torch.equal(layer._mask.flatten(1), literal.mask()), stage
        assert layer.stage == stage
        assert layer._count == stage * chosen // factor
        assert layer.kept().shape == (groups, chosen)
        assert (layer.kept().sum(1) == chosen // factor * (factor - stage)).all()
        assert torch.equal(layer.weight, layer.conv.weight * layer._mask)


@BOTH
@pytest.mark.parametrize('jump', [(0.25, 0.5), (0.1, 0.45, 0.9), (1.0,), (0.5, 0.0, 0.35)], ids=str)
def test_stages_are_caught_up_on_and_never_undone(kind, jump):
    shape = (24, 16, 4, 6)
    jumping, stepping = make(kind, shape), make(kind, shape)
    for share in jump:
        jumping.prune_to(share)
    for stage in range(6):
        stepping.prune_to(progress(stage, 6))
    for name, value in jumping.named_buffers():
        assert torch.equal(value, stepping.get_buffer(name)), name


@BOTH
def test_pruned_weights_get_no_gradient(kind):
    layer = make(kind)
    layer.prune_to(0.3)
    x, mask = inputs(layer), layer._mask.bool()
    direction = torch.randn_like(output := layer(*x))
    (output * direction).sum().backward()
    weight = (layer.conv.weight.detach() * mask).requires_grad_()
    with torch.no_grad():
        activated = layer.activation(layer.norm(x[-1]))
    F.conv2d(activated, weight).mul(direction).sum().backward()
    assert not layer.conv.weight.grad[~mask].any()
    assert layer.conv.weight.grad[mask].all()
    torch.testing.assert_close(layer.conv.weight.grad[mask], weight.grad[mask])
    assert weight.grad[~mask].any()


@BOTH
@pytest.mark.parametrize(('condensed', 'train'), [(False, True), (True, True), (True, False)])
def test_forward_changes_no_buffer_but_the_norms(kind, condensed, train):
    layer = make(kind, drop_rate=0.2).train(train)
    layer.prune_to(0.2)
    x = inputs(layer)
    if condensed:
        layer = layer.condensed()
    before, given = copy.deepcopy(dict(layer.named_buffers())), [value.clone() for value in x]
    for _ in range(3):
        layer(*x)
    changed = {n for n, value in layer.named_buffers() if not torch.equal(value, before[n])}
    norms = {'norm.running_mean', 'norm.running_var', 'norm.num_batches_tracked'}
    assert changed == (norms if train else set())
    assert all(torch.equal(a, b) for a, b in zip(x, given, strict=True))


@pytest.mark.parametrize('factor', [1, 2, 6])
def test_stages_are_the_published_ones(factor):
    def published(share):
        for i in range(factor - 1):
            if 2 * share < (i + 1) / (factor - 1):
                return i
        return factor - 1

    shares = {i / 997 for i in range(998)} | {0.0, 0.5, 1.0}
    for i in range(factor):
        edge = 0.5 * (i + 1) / max(factor - 1, 1)
        shares |= {edge, math.nextafter(edge, 0), math.nextafter(edge, 1)}
    for share in shares:
        if share <= 1:
            assert pruning_stage(share, factor) == published(share), share


@pytest.mark.parametrize('share', [-1e-9, 1.0001, math.nan, math.inf])
def test_impossible_progress(share):
    for prune in (lambda p: pruning_stage(p, 4), make(LearnedGroupConv).prune_to):
        with pytest.raises(ValueError, match='must be from 0 to 1'):
            prune(share)


@BOTH
@EVERY
@pytest.mark.parametrize('activation', [nn.ReLU, nn.Hardswish])
def test_condensed_equals_learned_at_every_stage(kind, shape, activation):
    layer = make(kind, shape, activation=activation).eval().double()
    x = [value.double() for value in inputs(layer)]
    for stage in range(shape[3]):
        layer.prune_to(progress(stage, shape[3]))
        condensed, kept = layer.condensed(), layer.kept()
        assert isinstance(condensed, CondensedGroupConv | CondensedReactivation)
        assert condensed.index.tolist() == [c for row in kept for c in range(shape[0]) if row[c]]
        expected = layer(*x)
        torch.testing.assert_close(condensed(*x), expected)


@BOTH
@pytest.mark.parametrize(('train', 'grad'), [(True, True), (False, False)])
def test_condensing_keeps_modes_and_frozen_parameters(kind, train, grad):
    layer = make(kind, drop_rate=0.25).train(train)
    layer.conv.requires_grad_(grad)
    layer.norm.weight.requires_grad_(not grad)
    before = copy.deepcopy(layer.state_dict())
    condensed = layer.condensed()
    assert all(module.training == train for module in condensed.modules())
    assert condensed.conv.weight.requires_grad == grad
    assert condensed.norm.weight.requires_grad != grad
    assert condensed.norm.bias.requires_grad
    assert condensed.drop.p == 0.25
    nn.init.zeros_(condensed.conv.weight)
    for name, value in layer.state_dict().items():  # no memory is shared
        assert torch.equal(value, before[name]), name


@BOTH
def test_uneven_masks_are_refused(kind):
    layer = make(kind, (16, 8, 4, 4))
    layer._members(layer._mask)[1, :, 3] = 0
    with pytest.raises(ValueError, match=r'different numbers of channels: \[16, 15, 16, 16\]'):
        layer.condensed()


@BOTH
@pytest.mark.parametrize('shape', [(16, 9, 4, 4), (18, 8, 4, 4)])
def test_channels_that_do_not_divide(kind, shape):
    with pytest.raises(ValueError, match='multiple of 4'):
        make(kind, shape)
