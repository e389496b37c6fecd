"""Learned connections against literal references, and their condensed form against them."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from mmdense.models.layers import (
    CondensedGroupConv,
    CondensedReactivation,
    LearnedGroupConv,
    SparseReactivation,
    pruning_stage,
)

KINDS = (LearnedGroupConv, SparseReactivation)
# What groups choose from, what forms groups, groups, condense factor.
SHAPES = [
    (16, 8, 4, 4),
    (24, 12, 6, 6),
    (16, 8, 8, 8),
    (24, 16, 4, 6),
    (24, 12, 6, 2),
    (12, 8, 8, 4),
    (9, 4, 1, 3),
    (10, 6, 3, 1),
]
EVERY = pytest.mark.parametrize('shape', SHAPES, ids=str)
BOTH = pytest.mark.parametrize('kind', KINDS, ids=lambda kind: kind.__name__)


def make(kind, shape, seed=0, **options):
    """Return a layer whose groups choose from the first number of channels."""
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
    """Return what a learned layer's forward takes."""
    generator = torch.Generator().manual_seed(1)
    new = torch.randn(batch, layer.conv.in_channels, size, size, generator=generator)
    if isinstance(layer, LearnedGroupConv):
        return (new,)
    return torch.randn(batch, layer.channels, size, size, generator=generator), new


def progress(stage, factor):
    """Return the share of the training at which a stage begins."""
    return 0.5 * stage / (factor - 1) if factor > 1 else 0.5


def at(weight, kind, group, member, channel, groups):
    """Return the value of a group's member for a channel that the group chooses."""
    position = member * groups + group
    row, column = (position, channel) if kind is LearnedGroupConv else (channel, position)
    return weight[row, column]


class Literal:
    """The pruning of the facts page, one channel after the other."""

    def __init__(self, kind, weight, shape):
        self.kind, self.shape = kind, shape
        self.weight = weight.detach().flatten(1).double().numpy()
        self.pruned = [set() for _ in range(shape[2])]

    def stage(self):
        """Each group loses C / F of its channels, those of the least L1 weight."""
        channels, grouped, groups, factor = self.shape
        for group in range(groups):
            sizes = []
            for channel in range(channels):
                size = sum(
                    abs(at(self.weight, self.kind, group, member, channel, groups))
                    for member in range(grouped // groups)
                )
                if channel not in self.pruned[group]:
                    sizes.append((size, channel))
            self.pruned[group] |= {channel for _, channel in sorted(sizes)[: channels // factor]}

    def mask(self):
        channels, grouped, groups, _ = self.shape
        sides = (grouped, channels) if self.kind is LearnedGroupConv else (channels, grouped)
        mask = torch.ones(sides, dtype=torch.uint8)
        for group in range(groups):
            for member in range(grouped // groups):
                for channel in self.pruned[group]:
                    at(mask, self.kind, group, member, channel, groups)[...] = 0
        return mask


@BOTH
@EVERY
def test_masks_equal_the_literal_ones_after_every_stage(kind, shape):
    layer = make(kind, shape)
    chosen, grouped, groups, factor = shape
    literal = Literal(kind, layer.conv.weight, shape)
    for stage in range(factor):
        if stage:
            literal.stage()
        layer.prune_to(progress(stage, factor))
        assert torch.equal(layer._mask.flatten(1), literal.mask()), stage
        assert layer.stage == stage
        assert layer._count == stage * chosen // factor
        assert layer.kept().shape == (groups, chosen)
        assert (layer.kept().sum(1) == chosen // factor * (factor - stage)).all()
        assert torch.equal(layer.weight, layer.conv.weight * layer._mask)


@BOTH
def test_masks_of_weights_that_change_between_stages(kind):
    """As in training: what is pruned stays so, whatever its weights do afterwards."""
    shape = (24, 12, 6, 6)
    layer = make(kind, shape)
    literal = Literal(kind, layer.conv.weight, shape)
    for stage in range(1, 6):
        with torch.no_grad():
            layer.conv.weight.copy_(torch.randn_like(layer.conv.weight))
        pruned, literal = literal.pruned, Literal(kind, layer.conv.weight, shape)
        literal.pruned = pruned
        literal.stage()
        layer.prune_to(progress(stage, 6))
        assert torch.equal(layer._mask.flatten(1), literal.mask()), stage


@BOTH
@pytest.mark.parametrize('jump', [(0.5,), (0.25, 0.5), (0.1, 0.45, 0.9), (1.0,)])
def test_jumps_over_stages_end_where_steps_do(kind, jump):
    shape = (24, 16, 4, 6)
    jumping, stepping = make(kind, shape), make(kind, shape)
    for share in jump:
        jumping.prune_to(share)
    for stage in range(6):
        stepping.prune_to(progress(stage, 6))
    for name, value in jumping.named_buffers():
        assert torch.equal(value, stepping.get_buffer(name)), name


@BOTH
def test_going_back_and_again_does_nothing(kind):
    layer = make(kind, (16, 8, 4, 4))
    layer.prune_to(0.4)
    before = {name: value.clone() for name, value in layer.named_buffers()}
    with torch.no_grad():
        layer.conv.weight.copy_(torch.randn_like(layer.conv.weight))
    for share in (0.4, 0.0, 0.1, 0.35):
        layer.prune_to(share)
        for name, value in layer.named_buffers():
            assert torch.equal(value, before[name]), name


@BOTH
@EVERY
@pytest.mark.parametrize('value', [0.0, 1.0])
def test_of_equals_the_first_go(kind, shape, value):
    layer = make(kind, shape)
    nn.init.constant_(layer.conv.weight, value)
    chosen, _, _, factor = shape
    for stage in range(factor):
        layer.prune_to(progress(stage, factor))
        pruned = stage * chosen // factor
        assert (~layer.kept()[:, :pruned]).all()
        assert layer.kept()[:, pruned:].all()


@BOTH
def test_zero_weights_are_not_counted_twice(kind):
    """Channels of no weight tie with pruned ones, if those are ranked as zeros."""
    layer = make(kind, (16, 8, 4, 4))
    with torch.no_grad():
        members = layer._members(layer.conv.weight)
        members[:, :, 5:9] = 0
    for stage in range(1, 4):
        layer.prune_to(progress(stage, 4))
        assert (layer.kept().sum(1) == 16 - 4 * stage).all()
        assert not layer.kept()[:, 5:9].any()


@BOTH
def test_pruned_weights_get_no_gradient(kind):
    layer = make(kind, (16, 8, 4, 4))
    layer.prune_to(0.3)
    x = inputs(layer)
    output = layer(*x)
    direction = torch.randn_like(output)
    (output * direction).sum().backward()
    dense = copy.deepcopy(layer)
    with torch.no_grad():
        dense.conv.weight *= dense._mask
    dense.conv.weight.grad = None
    activated = dense.drop(dense.activation(dense.norm(x[-1])))
    F.conv2d(activated, dense.conv.weight).mul(direction).sum().backward()
    mask = layer._mask.bool()
    assert not layer.conv.weight.grad[~mask].any()
    assert layer.conv.weight.grad[mask].all()
    torch.testing.assert_close(layer.conv.weight.grad[mask], dense.conv.weight.grad[mask])
    assert dense.conv.weight.grad[~mask].any()


@BOTH
@pytest.mark.parametrize('condensed', [False, True])
@pytest.mark.parametrize('train', [False, True], ids=['eval', 'train'])
def test_forward_changes_no_buffer_but_the_norms(kind, condensed, train):
    layer = make(kind, (16, 8, 4, 4), drop_rate=0.2).train(train)
    layer.prune_to(0.2)
    x = inputs(layer)
    if condensed:
        layer = layer.condensed()
    before = {name: value.clone() for name, value in layer.named_buffers()}
    given = [value.clone() for value in x]
    for _ in range(3):
        layer(*x)
    changed = {n for n, value in layer.named_buffers() if not torch.equal(value, before[n])}
    norms = {'norm.running_mean', 'norm.running_var', 'norm.num_batches_tracked'}
    assert changed == (norms if train else set())
    for value, expected in zip(x, given, strict=True):
        assert torch.equal(value, expected)


@pytest.mark.parametrize('factor', [1, 2, 4, 6, 8])
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
    assert pruning_stage(0, factor) == 0
    assert pruning_stage(0.5, factor) == pruning_stage(1, factor) == factor - 1
    if factor > 1:
        assert pruning_stage(math.nextafter(0.5, 0), factor) == factor - 2


@pytest.mark.parametrize('share', [-1e-9, 1.0001, math.nan, math.inf])
def test_shares_of_nothing(share):
    with pytest.raises(ValueError, match='must be from 0 to 1'):
        pruning_stage(share, 4)
    with pytest.raises(ValueError, match='must be from 0 to 1'):
        make(LearnedGroupConv, (16, 8, 4, 4)).prune_to(share)


@BOTH
@EVERY
@pytest.mark.parametrize('activation', [nn.ReLU, nn.Hardswish])
def test_condensed_equals_learned_at_every_stage(kind, shape, activation):
    layer = make(kind, shape, activation=activation).eval()
    factor = shape[3]
    x = inputs(layer)
    for stage in range(factor):
        layer.prune_to(progress(stage, factor))
        condensed = layer.condensed()
        kept = layer.kept()
        assert isinstance(condensed, CondensedGroupConv | CondensedReactivation)
        assert condensed.index.tolist() == [c for row in kept for c in range(shape[0]) if row[c]]
        expected = layer(*x)
        assert (condensed(*x) - expected).abs().max() <= 1e-6 * max(1, expected.abs().max())


@BOTH
def test_condensed_keeps_what_is_frozen(kind):
    for train, grad in ((True, True), (True, False), (False, True)):
        layer = make(kind, (16, 8, 4, 4), drop_rate=0.25).train(train)
        layer.conv.requires_grad_(grad)
        layer.norm.weight.requires_grad_(not grad)
        before = copy.deepcopy(layer.state_dict())
        condensed = layer.condensed()
        assert all(module.training == train for module in condensed.modules())
        assert condensed.conv.weight.requires_grad == grad
        assert condensed.norm.weight.requires_grad != grad
        assert condensed.norm.bias.requires_grad
        assert condensed.drop.p == 0.25
        with torch.no_grad():
            condensed.conv.weight.zero_()
        for name, value in layer.state_dict().items():  # it is no view of the learned one
            assert torch.equal(value, before[name]), name


def test_condensed_norm_has_the_statistics_of_what_it_gathers():
    layer = make(LearnedGroupConv, (16, 8, 4, 4))
    layer.prune_to(0.3)
    condensed = layer.condensed()
    assert condensed.norm.num_features == len(condensed.index) == 4 * 12
    for name, value in layer.norm.state_dict().items():
        got = condensed.norm.state_dict()[name]
        assert torch.equal(got, value[condensed.index] if value.ndim else value), name


@BOTH
def test_uneven_masks_are_refused(kind):
    layer = make(kind, (16, 8, 4, 4))
    layer._members(layer._mask)[1, :, 3] = 0
    with pytest.raises(ValueError, match=r'different numbers of channels: \[16, 15, 16, 16\]'):
        layer.condensed()


@pytest.mark.parametrize('sides', [(16, 9), (18, 8)])
def test_channels_that_do_not_divide(sides):
    with pytest.raises(ValueError, match='multiple of 4'):
        LearnedGroupConv(*sides, groups=4, condense_factor=4)
    with pytest.raises(ValueError, match='multiple of 4'):
        SparseReactivation(*reversed(sides), groups=4, condense_factor=4)


def test_only_what_forms_groups_must_be_their_multiple():
    read = LearnedGroupConv(15, 8, groups=4, condense_factor=3).eval()
    added = SparseReactivation(8, 15, groups=4, condense_factor=3).eval()
    x = torch.randn(1, 15, 2, 2)
    for layer in (read, added):
        layer.prune_to(1)
        assert layer.kept().sum(1).tolist() == [5] * 4
    expected = added(x, read(x))
    torch.testing.assert_close(added.condensed()(x, read.condensed()(x)), expected)


@BOTH
def test_progress_is_kept_in_integers(kind):
    layer = make(kind, (16, 8, 4, 4))
    buffers = {n: b for n, b in layer.named_buffers() if not n.startswith('norm.')}
    assert {n: b.dtype for n, b in buffers.items()} == dict(
        _count=torch.int64, _stage=torch.int64, _mask=torch.uint8
    )
    layer.prune_to(0.4)
    other = make(kind, (16, 8, 4, 4), seed=1)
    other.load_state_dict(layer.state_dict())
    assert other.stage == layer.stage == 2
    condensed = layer.condensed()
    assert condensed.index.dtype == torch.int64
    layer.half()
    assert layer._mask.dtype == torch.uint8


@BOTH
@EVERY
def test_group_lasso_is_the_literal_sum(kind, shape):
    layer = make(kind, shape)
    chosen, grouped, groups, factor = shape
    for stage in sorted({0, factor // 2, factor - 1}):
        layer.prune_to(progress(stage, factor))
        weight = layer.weight.detach().flatten(1)
        expected = 0.0
        for group in range(groups):
            for channel in range(chosen):
                squares = 0.0
                for member in range(grouped // groups):
                    squares += float(at(weight, kind, group, member, channel, groups)) ** 2
                expected += math.sqrt(squares)
        layer.zero_grad()
        lasso = layer.group_lasso()
        lasso.backward()
        pruned = int((~layer.kept()).sum())  # each stands for the root of EPSILON
        assert lasso.item() == pytest.approx(expected + 1e-6 * pruned, rel=1e-5)
        grad = layer.conv.weight.grad
        assert torch.isfinite(grad).all()
        assert not grad[layer._mask == 0].any()
        assert grad[layer._mask == 1].all()
