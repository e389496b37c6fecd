"""DenseNet's inference form; test_deploy_contract.py has what all families share."""

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
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from mmdense.models import DenseNet
from mmdense.models.deploy.densenet import DeployedTransition

SMALL = dict(growth_rate=8, layers=(2, 3, 2))
HALF = {torch.float16: 0.01, torch.bfloat16: 0.05}


def build(arch=SMALL, weights='random', **options):
    torch.manual_seed(0)
    net = DenseNet(arch=arch, **options)
    return (net if weights == 'fresh' else randomise(net, signed=weights == 'random')).eval()


@pytest.mark.parametrize(
    ('options', 'size'),
    [
        (dict(weights='positive'), (16, 16)),  # clamps on one side
        (dict(weights='positive', tap='activated'), (65, 50)),
        (dict(stem='imagenet', reduction=0.3), (48, 64)),
        (dict(stem='deep', reduction=1.0), (48, 64)),
        (dict(stem='deep', bottleneck=False, reduction=0.3), (48, 64)),
        (dict(stem='cifar', bottleneck=False, reduction=1.0), (48, 64)),
        (dict(arch=dict(growth_rate=4, layers=(3,))), (64, 96)),
        (dict(weights='fresh', norm_cfg=dict(type='BN', affine=False)), (64, 96)),
    ],
)
def test_architectures(options, size):
    deployed_equals_trained(build(**options), image(*size, batch=2))


@pytest.mark.parametrize('bottleneck', [True, False])
def test_norms_without_running_statistics_cannot_be_folded(bottleneck):
    cfg = dict(type='BN', track_running_stats=False)
    net = build(stem='cifar', bottleneck=bottleneck, weights='fresh', norm_cfg=cfg)
    with pytest.raises(ValueError, match='no running statistics'):
        net.switch_to_deploy()
    assert net.form == 'trained'
    run(net, image())  # it is not changed


@pytest.mark.parametrize(
    ('scale', 'shift', 'dtype'),
    [
        (1e-44, -0.5, torch.float16),
        (-1e-44, 0.5, torch.float32),
        (1e-12, 0.0, torch.bfloat16),
        (-1e-12, -0.5, torch.float16),
        (1e-6, 0.5, torch.float16),
        (-1e-6, 0.0, torch.float32),
        (0.0, 0.5, torch.bfloat16),
        (0.0, -0.5, torch.float16),
    ],
)
def test_tiny_scales(scale, shift, dtype):
    """Weight decay makes scales tiny: bounds overflow, and must not meet a weight of zero."""
    net = build(weights='positive')
    for norm in net.modules():
        if isinstance(norm, _BatchNorm):
            norm.weight.data[1::3] = scale
            norm.bias.data[1::3] = shift
            norm.running_mean[1::3] = 0
    x = image(33, 48)
    expected = run(net, x)
    outputs = run(deployed(net).to(dtype), x.to(dtype))
    assert all(y.isfinite().all() for y in outputs)
    same([y.float() for y in outputs], expected, {**TOLERANCE, **HALF}[dtype])


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
    x = torch.randn(1, 4, 8, 8) * spread + mean
    expected = run(lambda y: nn.functional.avg_pool2d(conv(norm(y).relu()), 2), x)
    atol = 1e-4 * float(expected.abs().max())
    torch.testing.assert_close(
        run(DeployedTransition(norm, conv), x), expected, rtol=1e-4, atol=atol
    )


@pytest.mark.parametrize('weights', ['positive', 'random'])
def test_no_norm_or_concatenation_is_called(weights):
    net = build(weights=weights)
    trained, fast = (operators_of(each, image()).names for each in (net, deployed(net)))
    assert {'cat', 'native_batch_norm'} <= set(trained)
    assert not {'cat', 'native_batch_norm', 'relu'} & set(fast)
    assert fast.count('convolution') == trained.count('convolution') == 1 + 2 * 7 + 2
    assert fast.count('maximum' if weights == 'positive' else 'clamp') == 7 + 2
    assert fast.count('addcmul') == 1


def test_transitions_pool_first():
    """This saves three quarters of their MACs, 8 % of the network's."""
    macs = []
    for form in ('trained', 'deployed'):
        with torch.device('meta'):
            net = DenseNet(arch='121').eval()
            if form == 'deployed':
                net.switch_to_deploy()
        with FlopCounterMode(display=False) as counter:
            run(net, torch.empty(1, 3, 224, 224, device='meta'))
        macs.append(counter.get_total_flops() // 2)
    sides = (56, 28, 14)
    saved = sum(c * c // 2 * s * s * 3 // 4 for c, s in zip((256, 512, 1024), sides, strict=True))
    assert macs[0] - macs[1] == saved
    assert 0.07 < saved / macs[0] < 0.09


@pytest.mark.slow
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_compiled(dtype):
    fast = deployed(build(dict(growth_rate=8, layers=(2, 2)), weights='positive')).to(dtype)
    x = image().to(dtype)
    expected = run(fast, x)
    torch.compiler.reset()
    fast.compile()
    same(run(fast, x), expected, 1e-5 if dtype == torch.float32 else 0.05)


@pytest.mark.parametrize(('weights', 'others'), [('positive', 'random'), ('random', 'positive')])
def test_deployed_weights_load(weights, others):
    """Between networks that clamp on one side and on both."""
    fast, again = deployed(build(weights=weights)), deployed(build(weights=others))
    again.load_state_dict(fast.state_dict())
    same(run(again, image()), run(fast, image()), 0)
