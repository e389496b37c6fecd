"""ReXNet's inference form; test_deploy_contract.py has what all families share."""

import operator

import pytest
import torch
from families import deployed, deployed_equals_trained, image, operators_of, randomise, run, same

from mmdense.models import ReXNet

TINY = dict(width=0.25, depth=0.4)


def build(arch=TINY, **options):
    torch.manual_seed(0)
    return randomise(ReXNet(arch=arch, **{'out_indices': range(6), **options}), signed=True).eval()


@pytest.mark.parametrize(
    ('arch', 'taps'),
    [
        (dict(width=0.5), 'unet'),
        (dict(width=1.3), 'stages'),
        (dict(width=0.5, depth=0.4, lite=True), 'stages'),
        (dict(width=0.25, depth=0.2), 'stages'),
        # At depth 1.5 a second block of stride 2 has a shortcut, and no expansion; without growth a
        # block's input is as large as its output.
        (dict(width=0.25, depth=1.5), 'unet'),
        (dict(width=0.25, depth=1.5, growth=0), 'unet'),
    ],
)
def test_archs(arch, taps):
    deployed_equals_trained(build(arch, taps=taps), image(45, 70, batch=2))


def test_no_norm_is_called():
    net = build()
    trained, fast = (operators_of(each, image()).names for each in (net, deployed(net)))
    assert {'native_batch_norm', 'mul'} <= set(trained)
    assert not {'native_batch_norm', 'mul', 'add', 'silu', 'hardtanh'} & set(fast)
    assert trained.count('add_') == fast.count('add_') == 4  # shortcuts
    # The gates' convolutions become linear layers.
    gates = sum(block.se is not None for block in net.features[:-1])
    assert fast.count('convolution') == trained.count('convolution') - 2 * gates
    assert fast.count('addmm') == 2 * gates > 0


def test_unneeded_blocks_are_not_built():
    assert [len(deployed(build(out_indices=(i,))).features) for i in (0, 4, 5)] == [1, 9, 10]


def test_compiled_shortcuts_are_not_written_in_place():
    """With frozen weights torch 2.15's inductor fails on them."""
    targets = []

    def backend(graph, inputs):
        targets.extend(node.target for node in graph.graph.nodes)
        return graph.forward

    torch.compiler.reset()
    fast = deployed(build(dict(width=0.25, depth=0.2)))
    same(run(torch.compile(fast, fullgraph=True, backend=backend), image()), run(fast, image()))
    pads = sum('pad' in str(target) for target in targets)
    assert pads == sum(block.shortcut for block in fast.features[:-1]) > 0
    assert not {operator.iadd, operator.setitem} & set(targets)
