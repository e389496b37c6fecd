"""RDNet's inference form; test_deploy_contract.py has what all families share."""

import pytest
import torch
from families import (
    TOLERANCE,
    deployed,
    deployed_equals_trained,
    image,
    operators_of,
    randomise,
    run,
    same,
)
from torch.utils.flop_counter import FlopCounterMode

from mmdense.models import RDNet
from mmdense.models.deploy import rdnet as rdnet_deploy

# Blocks with a gate and without, transitions with a stride and without.
TINY = dict(stem=8, growth=(8, 4, 12, 16), down=(1, 3), blocks=2)


@pytest.fixture(params=[1, 2])
def threads(request):
    """Products of float32 are other operators with one thread than with several."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def build(arch=TINY, **options):
    torch.manual_seed(0)
    return randomise(RDNet(arch=arch, **options), signed=True).eval()


@pytest.mark.parametrize(
    'arch',
    [
        dict(stem=3, growth=(7,), down=()),
        dict(stem=8, growth=(8, 8), down=(), blocks=1, gate_from=0),
        dict(stem=8, growth=(8, 16), down=(1,), gate_from=9, layer_scale=0.1),
        pytest.param('tiny', marks=pytest.mark.slow),
    ],
)
def test_archs(arch):
    deployed_equals_trained(build(arch), image(64, 32))


@pytest.mark.parametrize(
    ('size', 'dtype'), [(1, torch.float64), (1000, torch.float32), (10**9, torch.float64)]
)
def test_strips_of_any_size(size, dtype, threads, monkeypatch):
    """One row of products, several with a remainder, and all at once."""
    net, x = build().to(dtype), image(32, 48, 2).to(dtype)
    monkeypatch.setattr(rdnet_deploy, 'STRIP', size)
    same(run(deployed(net), x), run(net, x), TOLERANCE[dtype])


def test_products_by_convolutions(threads):
    names = operators_of(deployed(build()), image(64, 48)).names
    products, gates = 2 * 8, 4
    assert names.count('addmm') == gates + (products if threads == 1 else 0)
    # The stem's, the depthwise ones, and three between dense stages.
    assert names.count('convolution') == 12 + (0 if threads == 1 else products)


def test_nothing_is_concatenated_and_hidden_layers_are_activated_in_place(monkeypatch):
    net = build()
    fast, x = deployed(net), image(64, 64)
    monkeypatch.setattr(rdnet_deploy, 'STRIP', 64 * 96 * 4)
    trained, strips = operators_of(net, x), operators_of(fast, x)
    monkeypatch.setattr(rdnet_deploy, 'STRIP', 10**9)
    at_once = operators_of(fast, x)
    blocks = sum(name.endswith('gamma') for name, _ in net.named_parameters())
    assert trained.names.count('gelu') == trained.names.count('cat') - 4 == blocks == 8
    assert 'gelu' not in strips.names
    assert strips.names.count('gelu_') > blocks  # more strips than blocks
    assert strips.names.count('cat') < blocks  # of strips only
    assert 'cat' not in at_once.names
    assert at_once.names.count('gelu_') == blocks
    assert strips.largest < trained.largest == at_once.largest


def test_unneeded_stages_are_not_built():
    assert [len(deployed(build(out_indices=(i,))).dense_stages) for i in range(3)] == [1, 3, 4]


def test_macs_are_those_of_the_trained_network():
    net, counts = build(), []
    x = image(64, 48).to('meta')
    for each in (net, deployed(net)):
        with FlopCounterMode(display=False) as counter:
            run(each.to('meta'), x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0
