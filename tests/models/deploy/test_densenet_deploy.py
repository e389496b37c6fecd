"""What is peculiar to DenseNet deployed; test_deploy_contract.py has the rest."""

import copy

import pytest
import torch
from test_deploy_contract import (
    CHANNELS_LAST,
    HALF,
    TOLERANCE,
    Operators,
    deployed,
    equal_in_both_precisions,
    image,
    maps_are_the_callers,
    run,
    same,
)
from test_deploy_contract import (
    build as build_network,
)
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from mmdense.models import DenseNet
from mmdense.models.deploy import densenet as _densenet_deploy

SMALL = dict(growth_rate=8, layers=(2, 3, 2))


def build(arch=SMALL, weights='random', **options):
    return build_network('DenseNet', weights, arch=arch, **options)


@pytest.mark.parametrize('tap', ['block', 'activated'])
@pytest.mark.parametrize(('size', 'batch'), [((16, 16), 1), ((33, 47), 2), ((65, 50), 3)])
def test_clamps_on_one_side(tap, size, batch):
    equal_in_both_precisions(build(weights='positive', tap=tap), image(*size, batch))


@pytest.mark.parametrize('stem', ['imagenet', 'deep', 'cifar'])
@pytest.mark.parametrize('bottleneck', [True, False])
@pytest.mark.parametrize('reduction', [0.3, 1.0])
def test_architectures(stem, bottleneck, reduction):
    net = build(stem=stem, bottleneck=bottleneck, reduction=reduction)
    equal_in_both_precisions(net, image(batch=2))


def test_one_block():
    equal_in_both_precisions(build(dict(growth_rate=4, layers=(3,))), image())


def test_norms_without_weights():
    equal_in_both_precisions(
        build(weights='fresh', norm_cfg=dict(type='BN', affine=False)), image()
    )


@pytest.mark.parametrize('bottleneck', [True, False])
def test_norms_by_the_batch_cannot_be_folded(bottleneck):
    cfg = dict(type='BN', track_running_stats=False)
    net = build(stem='cifar', bottleneck=bottleneck, weights='fresh', norm_cfg=cfg)
    with pytest.raises(ValueError, match='no running statistics'):
        net.switch_to_deploy()
    assert net.form == 'trained'
    run(net, image())  # it is as it was


@pytest.mark.parametrize('shift', [-0.5, 0.0, 0.5])
@pytest.mark.parametrize('scale', [1e-44, -1e-44, 1e-12, -1e-12, 1e-6, -1e-6, 0.0])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_channels_that_training_has_switched_off(scale, shift, dtype):
    """Weight decay makes scales tiny: bounds overflow, and must not meet a weight of zero."""
    net = build(weights='positive')
    for norm in net.modules():
        if isinstance(norm, _BatchNorm):
            norm.weight.data[1::3] = scale
            norm.bias.data[1::3] = shift
            norm.running_mean[1::3] = 0
    x = image(33, 48)
    expected = run(net, x)
    maps = run(deployed(net).to(dtype), x.to(dtype))
    assert all(m.isfinite().all() for m in maps)
    same([m.float() for m in maps], expected, {**TOLERANCE, **HALF}[dtype])


@pytest.mark.parametrize(
    ('mean', 'deviation', 'scale', 'shift', 'spread'),
    [
        (1e6, 1e5, 1.0, 0.0, 1e5),
        (0.0, 0.0, 1e-3, 1.5, 10.0),
        (1e5, 1.0, 1e-3, 5.0, 1.0),
        (-1e5, 1.0, 1e-3, -5.0, 1.0),
    ],
    ids=['beyond float16', 'many deviations away', 'on at the mean', 'off at the mean'],
)
def test_bounds_within_reach_are_kept(mean, deviation, scale, shift, spread):
    torch.manual_seed(0)
    norm, conv = nn.BatchNorm2d(4).eval(), nn.Conv2d(4, 4, 1, bias=False)
    state = dict(weight=scale, bias=shift, running_mean=mean, running_var=deviation**2)
    for name, value in state.items():
        getattr(norm, name).data.fill_(value)
    transition = _densenet_deploy.DeployedTransition(norm, conv)
    x = torch.randn(1, 4, 8, 8) * spread + mean
    with torch.no_grad():
        expected = nn.functional.avg_pool2d(conv(norm(x).relu()), 2)
        found = transition(x)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize('weights', ['positive', 'random'])
def test_nothing_is_normed_or_concatenated(weights):
    net = build(weights=weights)
    called = []
    for each in (net, deployed(net)):
        with Operators() as operators:
            run(each, image())
        called.append(operators.names)
    assert {'cat', 'native_batch_norm'} <= set(called[0])
    assert not {'cat', 'native_batch_norm', 'relu'} & set(called[1])
    assert called[1].count('convolution') == called[0].count('convolution') == 1 + 2 * 7 + 2
    clamp = 'maximum' if weights == 'positive' else 'clamp'
    assert called[1].count(clamp) == 7 + 2
    assert called[1].count('addcmul') == 1


def test_transitions_pool_first():
    """A quarter of their multiply-adds, 8 % of the network's."""
    macs = []
    for form in ('trained', 'deployed'):
        with torch.device('meta'):
            net = DenseNet(arch='121').eval()
            if form == 'deployed':
                net.switch_to_deploy()
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            net(torch.empty(1, 3, 224, 224, device='meta'))
        macs.append(counter.get_total_flops() // 2)
    sides = (56, 28, 14)
    saved = sum(c * c // 2 * s * s * 3 // 4 for c, s in zip((256, 512, 1024), sides, strict=True))
    assert macs[0] - macs[1] == saved
    assert 0.07 < saved / macs[0] < 0.09


@pytest.mark.parametrize('stem', ['imagenet', 'cifar'])
@pytest.mark.parametrize('tap', ['block', 'activated'])
@pytest.mark.parametrize('bottleneck', [True, False])
def test_deployed_shares_no_memory_with_what_was_trained(stem, tap, bottleneck):
    net = build(stem=stem, tap=tap, bottleneck=bottleneck)
    parameters = dict(net.named_parameters())
    before = copy.deepcopy(net.state_dict())
    taken = {**net.state_dict(), **parameters}
    net.switch_to_deploy()
    run(net, image())
    for name, value in taken.items():
        assert torch.equal(value, before[name]), name
        assert value.stride() == before[name].stride(), name
    assert all(p.requires_grad for p in parameters.values())
    own = {p.data_ptr() for p in net.state_dict().values()}
    assert not own & {value.data_ptr() for value in taken.values()}


@pytest.mark.parametrize('weights', ['fresh', 'positive', 'random'])
@pytest.mark.parametrize(('first', 'allowed'), [('deployed', 1.1), ('rounded', 1.25)])
def test_half_precision_of_larger_blocks(first, allowed, weights):
    """As precise as the trained network, on average, unless weights are rounded twice."""
    net = build(dict(growth_rate=16, layers=(4, 6, 4)), weights=weights)
    x = image(64, 96, batch=2)
    exact = run(copy.deepcopy(net).double(), x.double())
    half = copy.deepcopy(net).bfloat16()
    fast = deployed(net).bfloat16() if first == 'deployed' else deployed(half)
    assert {p.dtype for p in (*fast.parameters(), *fast.buffers())} == {torch.bfloat16}
    trained, found = run(half, x.bfloat16()), run(fast, x.bfloat16())
    assert all(m.dtype == torch.bfloat16 for m in found)
    errors = [
        sum((a - c).abs().mean() / c.abs().mean() for a, c in zip(maps, exact, strict=True))
        for maps in (found, trained)
    ]
    assert errors[0] <= allowed * errors[1]


@pytest.mark.slow
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_compiled(dtype):
    fast = deployed(build(dict(growth_rate=8, layers=(2, 2)), weights='positive')).to(dtype)
    x = image(64, 96).to(dtype)
    expected = run(fast, x)
    torch.compiler.reset()
    fast.compile()
    same(run(fast, x), expected, 1e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize('weights', ['positive', 'random'])
@pytest.mark.parametrize('others', ['positive', 'random'])
def test_deployed_weights_load(weights, others):
    """Between networks that clamp on one side, and on both."""
    fast, again = deployed(build(weights=weights)), deployed(build(weights=others))
    again.load_state_dict(fast.state_dict())
    same(run(again, image()), run(fast, image()), 0)


@pytest.mark.parametrize('channels', [1, 3])
def test_weights_are_channels_last(channels):
    weights = [p for p in deployed(build(in_channels=channels)).parameters() if p.ndim == 4]
    assert all(p.is_contiguous(memory_format=CHANNELS_LAST) for p in weights)


@pytest.mark.parametrize('given', [torch.contiguous_format, CHANNELS_LAST])
@pytest.mark.parametrize('stem', ['imagenet', 'cifar'])
@pytest.mark.parametrize('tap', ['block', 'activated'])
def test_returned_maps_are_the_callers(given, stem, tap):
    fast = deployed(build(stem=stem, tap=tap, reduction=1.0))
    assert len(fast.features) == 1 + 3 + 2 + (3 if tap == 'activated' else 1)
    maps_are_the_callers(fast, given)


def test_coarsest_stride_is_the_smallest_image():
    with pytest.raises(ValueError, match='at least 16'):
        run(deployed(build()), image(15, 64))
