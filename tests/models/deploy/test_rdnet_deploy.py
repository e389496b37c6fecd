"""What is peculiar to RDNet deployed; test_deploy_contract.py has the rest."""

import pytest
import torch
from test_deploy_contract import (
    TOLERANCE,
    Operators,
    deployed,
    equal_in_both_precisions,
    image,
    run,
    same,
)
from test_deploy_contract import (
    build as build_network,
)
from torch.utils.flop_counter import FlopCounterMode

from mmdense.models.deploy import rdnet as _rdnet_deploy

# Blocks with a gate and without, transitions with a stride and without.
TINY = dict(stem=8, growth=(8, 4, 12, 16), down=(1, 3), blocks=2)


@pytest.fixture(params=[1, 2])
def threads(request):
    """Products of float32 are other operators with one thread than with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def build(arch=TINY, weights='random', **options):
    return build_network('RDNet', weights, arch=arch, **options)


@pytest.mark.parametrize(
    'arch',
    [
        dict(stem=3, growth=(7,), down=()),
        dict(stem=8, growth=(8, 8), down=(), blocks=1, gate_from=0),
        dict(stem=8, growth=(8, 16), down=(1,), gate_from=9, layer_scale=0.1),
    ],
)
def test_archs(arch):
    equal_in_both_precisions(build(arch), image(batch=2))


@pytest.mark.slow
def test_published_arch():
    equal_in_both_precisions(build('tiny'), image(96, 64))


def test_output_norms():
    net = build(output_norm=True, out_indices=(0, 2))
    assert len(net.output_norms) == 2
    equal_in_both_precisions(net, image(batch=2))


@pytest.mark.parametrize('size', [1, 1000, 10**9])
@pytest.mark.parametrize('dtype', TOLERANCE)
def test_strips_of_any_size(size, dtype, threads, monkeypatch):
    """Of one row of products, of some, with a rest, and all at once."""
    net, x = build().to(dtype), image(32, 48, 2).to(dtype)
    monkeypatch.setattr(_rdnet_deploy, 'STRIP', size)
    same(run(deployed(net), x), run(net, x), TOLERANCE[dtype])


def test_products_by_convolutions(threads):
    with Operators() as operators:
        run(deployed(build()), image(64, 48))
    products, gates = 2 * 8, 4
    assert operators.names.count('addmm') == gates + (products if threads == 1 else 0)
    # The stem's, the depthwise ones, and three between dense stages.
    assert operators.names.count('convolution') == 12 + (0 if threads == 1 else products)


def test_nothing_is_concatenated_and_hidden_maps_are_activated_in_place(monkeypatch):
    net = build()
    fast, called = deployed(net), []
    monkeypatch.setattr(_rdnet_deploy, 'STRIP', 64 * 96 * 4)
    for each in (net, fast):
        with Operators() as operators:
            run(each, image(64, 64))
        called.append(operators)
    blocks = sum(name.endswith('gamma') for name, _ in net.named_parameters())
    assert called[0].names.count('gelu') == called[0].names.count('cat') - 4 == blocks == 8
    assert 'gelu' not in called[1].names
    assert called[1].names.count('gelu_') > blocks  # more strips than blocks
    assert called[1].names.count('cat') < blocks  # of strips alone
    monkeypatch.setattr(_rdnet_deploy, 'STRIP', 10**9)
    with Operators() as operators:
        run(fast, image(64, 64))
    assert 'cat' not in operators.names
    assert operators.names.count('gelu_') == blocks
    assert called[1].largest < called[0].largest == operators.largest


def test_what_no_map_needs_is_not_there():
    assert [len(deployed(build(out_indices=(i,))).dense_stages) for i in range(3)] == [1, 3, 4]


def test_folded_weights_have_memory_of_their_own():
    net = build()
    taken = net.state_dict()
    net.switch_to_deploy()
    folded = ('fc1.weight', 'fc2.weight', 'scale', 'gate.weight', 'gate.bias')
    own = [p for name, p in net.named_parameters() if name.endswith(folded)]
    # Of eight blocks, four of them with a gate: two weights and a scale, and the gates'.
    assert len(own) == 8 * 3 + 4 * 2
    pieces = {value.untyped_storage().data_ptr() for value in taken.values()}
    assert not pieces & {p.untyped_storage().data_ptr() for p in own}


def test_multiply_adds_are_counted_without_memory():
    """All that remain are the trained network's."""
    net, counts = build(), []
    x = image(64, 48).to('meta')
    for each in (net, deployed(net)):
        with FlopCounterMode(display=False) as counter:
            run(each.to('meta'), x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@pytest.mark.parametrize(('granularity', 'depths'), [('stage', 6), ('layer', 10)])
def test_layer_depth_with_output_norms(granularity, depths):
    """Of the blocks and of what lies between them as in the trained network."""
    found = []
    net = build(output_norm=True)
    for each in (net, deployed(net)):
        names = [name for name, _ in each.named_parameters()]
        found.append({each.layer_depth(name, granularity) for name in names})
    assert found[0] == found[1]
    assert len(found[0]) == depths


def test_coarsest_stride_is_the_smallest_image():
    with pytest.raises(ValueError, match='at least 16'):
        run(deployed(build()), image(15, 64))
