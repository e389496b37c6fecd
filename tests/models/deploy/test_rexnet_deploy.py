"""What is peculiar to ReXNet deployed, and folded norms; test_deploy_contract.py has the rest."""

import copy
import operator

import pytest
import torch
from test_deploy_contract import (
    CHANNELS_LAST,
    Operators,
    deployed,
    equal_in_both_precisions,
    image,
    maps_are_the_callers,
    randomise,
    run,
    same,
)
from test_deploy_contract import (
    build as build_network,
)
from torch import nn

from mmdense.models.layers.fold import fold_norm

TINY = dict(width=0.25, depth=0.4)


def build(arch=TINY, weights='random', **options):
    return build_network('ReXNet', weights, arch=arch, **options)


@pytest.mark.parametrize('taps', ['stages', 'unet'])
@pytest.mark.parametrize('width', [0.5, 1.0, 1.3])
def test_widths(width, taps):
    equal_in_both_precisions(build(dict(width=width), taps=taps), image(45, 70))


@pytest.mark.parametrize('depth', [0.2, 1.5])
def test_depths(depth):
    """At 1.5 a second block of stride 2 has a shortcut, and no expansion."""
    equal_in_both_precisions(build(dict(width=0.25, depth=depth)), image(batch=2))


def test_nothing_is_normed_or_concatenated():
    net = build()
    fast = deployed(net)
    called = []
    for each in (net, fast):
        with Operators() as operators:
            run(each, image())
        called.append(operators.names)
    assert {'cat', 'native_batch_norm', 'mul', 'add'} <= set(called[0])
    assert not {'cat', 'native_batch_norm', 'mul', 'add', 'silu', 'hardtanh'} & set(called[1])
    shortcuts = called[0].count('cat')
    assert shortcuts == called[1].count('add_') == 4
    # The gates' are linear layers.
    gates = sum(block.se is not None for block in net.features[:-1])
    assert called[1].count('convolution') == called[0].count('convolution') - 2 * gates
    assert called[1].count('addmm') == 2 * gates > 0


def test_what_no_map_needs_is_not_there():
    assert [len(deployed(build(out_indices=(i,))).features) for i in (0, 4, 5)] == [1, 9, 10]


@pytest.mark.parametrize('given', [torch.contiguous_format, CHANNELS_LAST])
@pytest.mark.parametrize('growth', [180, 0])
def test_returned_maps_are_the_callers(given, growth):
    """Without growth a block's input is as large as its output."""
    fast = deployed(build(dict(width=0.25, depth=1.5, growth=growth), taps='unet'))
    assert len(fast.features) > 16
    maps_are_the_callers(fast, given)


def test_compiled_shortcuts_write_to_no_part_of_a_map():
    """With frozen weights torch 2.15's inductor fails on them."""
    seen = []

    def backend(graph, inputs):
        seen.extend(node.target for node in graph.graph.nodes)
        return graph.forward

    torch.compiler.reset()
    fast = deployed(build(dict(width=0.25, depth=0.2)))
    same(run(torch.compile(fast, fullgraph=True, backend=backend), image()), run(fast, image()))
    pads = sum('pad' in str(target) for target in seen)
    assert pads == sum(block.shortcut for block in fast.features[:-1]) > 0
    assert not {operator.iadd, operator.setitem} & set(seen)


@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('affine', [False, True])
@pytest.mark.parametrize('groups', [1, 4])
def test_fold_norm(bias, affine, groups):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, 3, 2, 1, groups=groups, bias=bias)
    norm = nn.BatchNorm2d(8, eps=0.1, affine=affine)
    norm(torch.randn(4, 8, 5, 5) * 3 + 1)
    if affine:
        randomise(norm)
    state = copy.deepcopy([*conv.state_dict().values(), *norm.state_dict().values()])
    folded = fold_norm(conv, norm)
    after = [*conv.state_dict().values(), *norm.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(after, state, strict=True))
    assert norm.training
    assert not folded.training
    x = torch.randn(2, 4, 9, 7)
    with torch.no_grad():
        same([folded(x)], [norm.eval()(conv(x))])
    assert not any(p.requires_grad for p in folded.parameters())


def test_fold_norm_is_rounded_once():
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(64, 64, 1).bfloat16(), nn.BatchNorm2d(64).bfloat16()
    randomise(norm)
    folded = fold_norm(conv, norm)
    exact = fold_norm(conv.double(), norm.double())
    assert torch.equal(folded.weight, exact.weight.float().bfloat16())
    assert torch.equal(folded.bias, exact.bias.float().bfloat16())


def test_norms_by_the_batch_cannot_be_folded():
    norm = nn.BatchNorm2d(8, track_running_stats=False)
    with pytest.raises(ValueError, match='no running statistics'):
        fold_norm(nn.Conv2d(4, 8, 1), norm)
