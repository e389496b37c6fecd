"""DenseNet deployed is the trained network in evaluation, and faster."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from mmengine.runner.checkpoint import load_state_dict
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mmdense.errors import UserError
from mmdense.models import DenseNet
from mmdense.models.backbones import _densenet_deploy

SMALL = dict(growth_rate=8, layers=(2, 3, 2))
CHANNELS_LAST = torch.channels_last


def build(arch=SMALL, norms='random', **options):
    """Return a network in evaluation; 'random' norms have weights below, at and above zero."""
    torch.manual_seed(0)
    net = DenseNet(arch=arch, **options)
    if norms != 'fresh':
        randomise(net, signed=norms == 'random')
    return net.eval()


@torch.no_grad()
def randomise(module, signed=True):
    generator = torch.Generator().manual_seed(1)
    for norm in module.modules():
        if isinstance(norm, _BatchNorm):
            for value in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                value.copy_(torch.randn(value.shape, generator=generator).clamp(-1.5, 1.5))
            norm.running_var.abs_().add_(0.5)
            if signed:
                norm.weight[::5] = 0
            else:
                norm.weight.abs_().add_(0.1)


def deployed(net):
    net = copy.deepcopy(net)
    net.switch_to_deploy()
    return net


def image(height=33, width=48, batch=1, channels=3, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, height, width, generator=generator)


@torch.no_grad()
def run(net, x):
    return net(x)


def difference(a, b):
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


def same(found, expected, tolerance=1e-5):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert difference(a, b) <= tolerance


def equal_in_both_precisions(net, x):
    same(run(deployed(net), x), run(net, x), 1e-5)
    net, x = copy.deepcopy(net).double(), x.double()
    same(run(deployed(net), x), run(net, x), 1e-10)


@pytest.mark.parametrize('tap', ['block', 'activated'])
@pytest.mark.parametrize('norms', ['fresh', 'positive', 'random'])
@pytest.mark.parametrize(('size', 'batch'), [((16, 16), 1), ((33, 47), 2), ((65, 50), 3)])
def test_maps_are_those_of_the_evaluation(tap, norms, size, batch):
    equal_in_both_precisions(build(norms=norms, tap=tap), image(*size, batch))


@pytest.mark.parametrize('stem', ['imagenet', 'deep', 'cifar'])
@pytest.mark.parametrize('bottleneck', [True, False])
@pytest.mark.parametrize('reduction', [0.3, 1.0])
def test_architectures(stem, bottleneck, reduction):
    net = build(stem=stem, bottleneck=bottleneck, reduction=reduction)
    equal_in_both_precisions(net, image(batch=2))


def test_one_block():
    equal_in_both_precisions(build(dict(growth_rate=4, layers=(3,))), image())


@pytest.mark.parametrize('channels', [1, 5])
def test_in_channels(channels):
    equal_in_both_precisions(build(in_channels=channels), image(channels=channels))


@pytest.mark.parametrize('tap', ['block', 'activated'])
@pytest.mark.parametrize('indices', [(0,), (1,), (-1,), (0, 1), (0, 2)])
def test_out_indices(tap, indices):
    equal_in_both_precisions(build(tap=tap, out_indices=indices), image())


@pytest.mark.parametrize('stages', [0, 3])
@pytest.mark.parametrize('tap', ['block', 'activated'])
def test_what_only_training_needs_has_no_effect(tap, stages):
    net = build(tap=tap, frozen_stages=stages, drop_rate=0.9, norm_eval=True, with_cp=True)
    expected = run(net, image())
    fast = deployed(net.train())  # some of it trains, some is frozen
    same(run(fast, image()), expected)
    fast.train()
    same(fast(image()), expected)  # with_cp: where gradients are enabled


def test_synchronised_norms():
    net = build()
    expected = run(net, image())
    net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in net.modules()) == 1 + 2 * 7 + 2 + 1
    same(run(deployed(net), image()), expected)


def test_norms_without_weights():
    equal_in_both_precisions(build(norms='fresh', norm_cfg=dict(type='BN', affine=False)), image())


@pytest.mark.parametrize('bottleneck', [True, False])
def test_norms_by_the_batch_cannot_be_folded(bottleneck):
    cfg = dict(type='BN', track_running_stats=False)
    net = build(stem='cifar', bottleneck=bottleneck, norms='fresh', norm_cfg=cfg)
    with pytest.raises(ValueError, match='no running statistics'):
        net.switch_to_deploy()
    assert net.form == 'trained'
    run(net, image())  # it is as it was


@pytest.mark.parametrize('shift', [-0.5, 0.0, 0.5])
@pytest.mark.parametrize('scale', [1e-44, -1e-44, 1e-12, -1e-12, 1e-6, -1e-6, 0.0])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16, torch.float16])
def test_channels_that_training_has_switched_off(scale, shift, dtype):
    """Weight decay makes scales tiny: bounds overflow, and must not meet a weight of zero."""
    net = build(norms='positive')
    for norm in net.modules():
        if isinstance(norm, _BatchNorm):
            norm.weight.data[1::3] = scale
            norm.bias.data[1::3] = shift
            norm.running_mean[1::3] = 0
    expected = run(net, image())
    fast = deployed(net).to(dtype)
    maps = run(fast, image().to(dtype))
    assert all(m.isfinite().all() for m in maps)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.05, torch.float16: 0.01}[dtype]
    same([m.float() for m in maps], expected, tolerance)


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


class Operators(TorchDispatchMode):
    """What is called, by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize('norms', ['positive', 'random'])
def test_nothing_is_normed_or_concatenated(norms):
    net = build(norms=norms)
    called = []
    for each in (net, deployed(net)):
        with Operators() as operators:
            run(each, image())
        called.append(operators.names)
    assert {'cat', 'native_batch_norm'} <= set(called[0])
    assert not {'cat', 'native_batch_norm', 'relu'} & set(called[1])
    assert called[1].count('convolution') == called[0].count('convolution') == 1 + 2 * 7 + 2
    clamp = 'maximum' if norms == 'positive' else 'clamp'
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


def test_deploying_twice_changes_nothing():
    net = build()
    assert net.form == 'trained'
    fast = deployed(net)
    assert fast.form == 'deployed'
    modules, expected = list(fast.modules()), run(fast, image())
    fast.switch_to_deploy()
    assert all(a is b for a, b in zip(fast.modules(), modules, strict=True))
    same(run(fast, image()), expected, 0)


@pytest.mark.parametrize('bottleneck', [True, False])
def test_deployed_stays_in_evaluation(bottleneck):
    fast = deployed(build(bottleneck=bottleneck, tap='activated').train())
    assert not any(m.training for m in fast.modules())
    assert not any(p.requires_grad for p in fast.parameters())
    expected = run(fast, image())
    state = copy.deepcopy(fast.state_dict())
    assert fast.train() is fast
    same(fast(image()), expected, 0)
    assert all(torch.equal(value, state[name]) for name, value in fast.state_dict().items())


@pytest.mark.parametrize('stem', ['imagenet', 'cifar'])
@pytest.mark.parametrize('tap', ['block', 'activated'])
@pytest.mark.parametrize('bottleneck', [True, False])
def test_weights_taken_before_stay_as_they_were(stem, tap, bottleneck):
    """What a checkpoint or an average refers to is not folded under its hands."""
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


@pytest.mark.parametrize('given', [torch.contiguous_format, CHANNELS_LAST])
@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_memory_formats(given, channels, dtype):
    net = build(in_channels=channels).to(dtype)
    x = image(batch=2, channels=channels).to(dtype).contiguous(memory_format=given)
    fast = deployed(net)
    maps = run(fast, x)
    same(maps, run(net, x))
    weights = [p for p in fast.parameters() if p.ndim == 4]
    assert all(m.is_contiguous(memory_format=CHANNELS_LAST) for m in weights)
    assert all(m.is_contiguous(memory_format=CHANNELS_LAST) for m in maps)


@pytest.mark.parametrize('given', [torch.contiguous_format, CHANNELS_LAST])
@pytest.mark.parametrize('stem', ['imagenet', 'cifar'])
@pytest.mark.parametrize('tap', ['block', 'activated'])
def test_returned_maps_are_the_callers(given, stem, tap):
    """Nothing is written to a map once it can be returned, nor to the image."""
    fast = deployed(build(stem=stem, tap=tap, reduction=1.0))
    x = image(batch=2).contiguous(memory_format=given)
    before, ends = x.clone(), []
    for module in fast.features.values():  # as if each were tapped
        module.register_forward_hook(lambda *args: ends.append((args[-1], args[-1].clone())))
    maps = run(fast, x)
    assert len(ends) == len(fast.features) == 1 + 3 + 2 + (3 if tap == 'activated' else 1)
    assert all(torch.equal(end, then) for end, then in ends)
    assert torch.equal(x, before)
    pieces = {m.untyped_storage().data_ptr() for m in (x, *(end for end, _ in ends))}
    assert len(pieces) == len(ends) + 1
    before = [m.clone() for m in maps]
    run(fast, image(batch=2, seed=3))
    same(maps, before, 0)


def test_modes():
    net = build()
    fast, expected = deployed(net), run(net, image())
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode():
            maps = fast(image())
        assert not any(m.requires_grad for m in maps)
        same(maps, expected)
    with torch.inference_mode():  # deployed there, run elsewhere
        other = deployed(net)
        same(other(image()), expected)
    same(run(other, image()), expected)


@pytest.mark.parametrize('tap', ['block', 'activated'])
@pytest.mark.parametrize('bottleneck', [True, False])
def test_gradients_of_the_image(tap, bottleneck):
    net = build(tap=tap, bottleneck=bottleneck).double()
    grads = []
    for each in (net, deployed(net)):
        x = image().double().requires_grad_()
        sum(m.square().mean() for m in each(x)).backward()
        grads.append(x.grad)
    same(grads[1:], grads[:1], 1e-10)
    assert grads[0].abs().max() > 0


@pytest.mark.parametrize('norms', ['fresh', 'positive', 'random'])
@pytest.mark.parametrize(('first', 'allowed'), [('deployed', 1.1), ('rounded', 1.25)])
def test_half_precision(first, allowed, norms):
    """As precise as the trained network, on average, unless weights are rounded twice."""
    net = build(dict(growth_rate=16, layers=(4, 6, 4)), norms=norms)
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


@pytest.mark.parametrize('bottleneck', [True, False])
def test_autocast(bottleneck):
    net = build(norms='positive', bottleneck=bottleneck)
    with torch.autocast('cpu', torch.bfloat16):
        expected, found = run(net, image()), run(deployed(net), image())
    assert all(m.dtype == torch.bfloat16 for m in found)
    same(found, expected, 0.05)


@pytest.mark.parametrize(
    ('mode', 'norms'), [(torch.no_grad, 'random'), (torch.inference_mode, 'positive')]
)
def test_compiles_without_graph_break(mode, norms):
    fast = deployed(build(dict(growth_rate=4, layers=(2, 1)), norms=norms))
    torch.compiler.reset()
    compiled = torch.compile(fast, fullgraph=True, backend='aot_eager')
    with mode():
        for x in (image(), image(33, 47, 2).contiguous(memory_format=CHANNELS_LAST)):
            given = x.clone()
            maps = compiled(x)
            same(maps, fast(x))
            assert torch.equal(x, given)
            assert len({m.untyped_storage().data_ptr() for m in maps}) == len(maps)


@pytest.mark.slow
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_compiled(dtype):
    fast = deployed(build(dict(growth_rate=8, layers=(2, 2)), norms='positive')).to(dtype)
    x = image(64, 96).to(dtype)
    expected = run(fast, x)
    torch.compiler.reset()
    fast.compile()
    same(run(fast, x), expected, 1e-5 if dtype == torch.float32 else 0.05)


def test_copies():
    fast = deployed(build())
    expected = run(fast, image())
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        same(run(other, image()), expected, 0)
        with torch.no_grad():
            other.features['stem'].convs[0].weight.zero_()
        same(run(fast, image()), expected, 0)


def test_threads():
    fast = deployed(build())
    images = [image(65, 98, seed=i) for i in range(8)]
    expected = [run(fast, x) for x in images]
    with ThreadPoolExecutor(2) as pool:
        for found, maps in zip(pool.map(lambda x: run(fast, x), images), expected, strict=True):
            same(found, maps, 0)


@pytest.mark.parametrize('bottleneck', [True, False])
def test_weights_of_the_other_form_are_refused(bottleneck):
    net = build(bottleneck=bottleneck)
    fast = deployed(net)
    for model, other in ((net, fast), (fast, net)):
        weights = {f'backbone.{name}': value for name, value in other.state_dict().items()}
        message = f"form='{other.form}', the network is of form='{model.form}'"
        model = nn.ModuleDict(dict(backbone=model))
        with pytest.raises(UserError, match=message):
            load_state_dict(model, weights)  # mmengine's, which only warns of keys that don't fit


@pytest.mark.parametrize('norms', ['positive', 'random'])
@pytest.mark.parametrize('others', ['positive', 'random'])
def test_deployed_weights_load(norms, others):
    """Between networks that clamp on one side, and on both."""
    fast, again = deployed(build(norms=norms)), deployed(build(norms=others))
    again.load_state_dict(fast.state_dict())
    same(run(again, image()), run(fast, image()), 0)


def test_layer_depth():
    fast = deployed(build())
    depths = {fast.layer_depth(name)[0] for name, _ in fast.named_parameters()}
    assert depths == set(range(4))


def test_sizes_that_evaluation_takes_or_refuses():
    net = build()
    shapes = [[m.shape for m in run(each, image(batch=0))] for each in (net, deployed(net))]
    assert shapes[0] == shapes[1]
    with pytest.raises(ValueError, match='at least 16'):
        run(deployed(net), image(15, 64))
