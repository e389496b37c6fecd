"""What ``switch_to_deploy()`` promises, run over every family that has it, with tiny networks."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from mmengine.registry import MODELS
from mmengine.runner.checkpoint import load_state_dict
from test_contract import FAMILIES, random
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from mmdense.apis import deploy
from mmdense.errors import UserError

CHANNELS_LAST = torch.channels_last
# A network's name begins with its family's -> options beside those of FAMILIES.
NETWORKS = {
    'RDNet': {},
    'RDNet one-thread': {},  # products of float32 are other operators there
    'DenseNet': {},
    'DenseNet basic': dict(tap='activated', bottleneck=False, reduction=1.0),
    'CondenseNetV2': {},
    'CondenseNetV2 grouped': dict(dense=()),
    'ReXNet': dict(out_indices=range(6)),
    'ReXNet unet': dict(out_indices=range(6), taps='unet'),
}
# CondenseNetV2 works in memory that it keeps: without gradients, as it is in a compiled model, and
# in the precision of its weights, which become buffers.
FOLDED = [name for name in NETWORKS if not name.startswith('CondenseNetV2')]
NORMED = [name for name in NETWORKS if not name.startswith('RDNet')]  # by the batch
# Networks that compile in little time.
SMALLEST = {
    'RDNet': dict(stem=8, growth=(8, 8), down=(1,), blocks=1, gate_from=1),
    'DenseNet': dict(growth_rate=4, layers=(2, 1)),
    'ReXNet unet': dict(width=0.25, depth=0.2),
}
# Of the largest value of a map; random weights lie below, at and above zero.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
HALF = {torch.float16: 0.01, torch.bfloat16: 0.05}
TWICE_ROUNDED = dict(DenseNet=1.25, CondenseNetV2=1.6)  # times as far from float64 as trained


@pytest.fixture(params=NETWORKS)
def network(request):
    before = torch.get_num_threads()
    torch.set_num_threads(1 if request.param.endswith('one-thread') else 2)
    yield request.param
    torch.set_num_threads(before)


def family_of(network):
    return network.split()[0]


def build(network, weights='random', **options):
    """Return a network in evaluation with all its maps, pruned where that goes before.

    Vectors are 'fresh', 'positive' where they scale, or 'random': then every fifth scale is zero.
    """
    family = family_of(network)
    torch.manual_seed(0)
    options = {**FAMILIES[family], 'out_indices': None, **NETWORKS[network], **options}
    net = MODELS.build(dict(type=f'mmdense.{family}', **options))
    if weights != 'fresh':
        randomise(net, signed=weights == 'random')
    if family == 'CondenseNetV2':
        net.prune_to(0.5)
    return net.eval()


def randomise(module, signed=True):
    generator = torch.Generator().manual_seed(1)
    for name, value in module.state_dict().items():
        if value.ndim != 1 or not value.is_floating_point():
            continue
        value.copy_(torch.randn(value.shape, generator=generator).clamp(-1.5, 1.5))
        if name.endswith('running_var'):
            value.abs_().add_(0.5)
        elif name.endswith(('weight', 'gamma')):
            if signed:
                value[::5] = 0
            else:
                value.abs_().add_(0.1)


def deployed(net):
    net = copy.deepcopy(net)
    net.switch_to_deploy()
    return net


def image(height=64, width=96, batch=1, channels=3, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, height, width, generator=generator)


@torch.no_grad()
def run(net, x):
    return net(x)


def difference(a, b):
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max())


def same(found, expected, tolerance=TOLERANCE[torch.float32]):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert difference(a, b) <= tolerance


def equal_in_both_precisions(net, x):
    for dtype, tolerance in TOLERANCE.items():
        net, x = copy.deepcopy(net).to(dtype), x.to(dtype)
        same(run(deployed(net), x), run(net, x), tolerance)


class Operators(TorchDispatchMode):
    """What is called, by name, and how large the largest result is."""

    def __init__(self):
        super().__init__()
        self.names, self.largest = [], 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.largest = max(self.largest, out.numel())
        return out


def test_every_family_that_deploys_is_here():
    able = {name for name in FAMILIES if hasattr(MODELS.get(f'mmdense.{name}'), 'switch_to_deploy')}
    assert {family_of(network) for network in NETWORKS} == able


@pytest.mark.parametrize('weights', ['fresh', 'random'])
@pytest.mark.parametrize(
    ('size', 'batch'), [((32, 32), 1), ((33, 47), 2), ((65, 50), 1), ((97, 130), 3)]
)
def test_maps_are_those_of_the_evaluation(network, weights, size, batch):
    equal_in_both_precisions(build(network, weights), image(*size, batch))


@pytest.mark.parametrize('first', ['deployed', 'rounded'])
@pytest.mark.parametrize('dtype', HALF)
def test_half_precision(network, dtype, first):
    """No less precise than the trained network, on average, but for weights rounded twice."""
    net = build(network, 'positive')
    x = image(batch=2)
    exact = run(copy.deepcopy(net).double(), x.double())
    half = copy.deepcopy(net).to(dtype)
    fast = deployed(net).to(dtype) if first == 'deployed' else deployed(half)
    weights = [*fast.parameters(), *fast.buffers()]
    assert {w.dtype for w in weights if w.is_floating_point()} == {dtype}
    trained, found = run(half, x.to(dtype)), run(fast, x.to(dtype))
    for a, c in zip(found, exact, strict=True):
        assert a.dtype == dtype
        assert difference(a, c) <= HALF[dtype]
    errors = [
        sum((a - c).abs().mean() / c.abs().mean() for a, c in zip(maps, exact, strict=True))
        for maps in (found, trained)
    ]
    twice = TWICE_ROUNDED.get(family_of(network), 1.15) if first == 'rounded' else 1.15
    assert errors[0] <= twice * errors[1]


@pytest.mark.parametrize('network', FOLDED, indirect=True)
@pytest.mark.parametrize('grad', [False, True])
def test_autocast(network, grad):
    net = build(network, 'positive')
    x = image().requires_grad_(grad)
    with torch.autocast('cpu', torch.bfloat16):
        expected, found = run(net, image()), deployed(net)(x)
    assert all(m.dtype == torch.bfloat16 and m.requires_grad == grad for m in found)
    same(found, expected, 0.05)
    same(found, run(deployed(net).bfloat16(), image().bfloat16()), 0.05)


@pytest.mark.parametrize('given', [torch.contiguous_format, CHANNELS_LAST])
@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('dtype', TOLERANCE)
def test_memory_formats(network, given, channels, dtype):
    net = build(network, in_channels=channels).to(dtype)
    fast = deployed(net)
    x = image(batch=2, channels=channels).to(dtype).contiguous(memory_format=given)
    maps = run(fast, x)
    same(maps, run(net, x), TOLERANCE[dtype])
    own = CHANNELS_LAST if network in FOLDED else torch.contiguous_format
    assert all(m.is_contiguous(memory_format=own) for m in maps)


@pytest.mark.parametrize('indices', [(0,), (1,), (-2,), (-1,), (0, 2), (1, 3)])
def test_out_indices(network, indices):
    equal_in_both_precisions(build(network, out_indices=indices), image())


@pytest.mark.parametrize(('stages', 'memory'), [(0, 'plain'), (2, 'lean'), (3, 'recompute')])
def test_what_only_training_needs_has_no_effect(network, stages, memory):
    options = dict(frozen_stages=stages, memory=memory, **random(family_of(network), 0.9))
    net = build(network, norm_eval=True, **options)
    expected = run(net, image())
    fast = deployed(net.train())  # some of it trains, some is frozen
    same(run(fast, image()), expected)
    fast.train()
    same(fast(image()), expected)  # where gradients are enabled


@pytest.mark.parametrize('network', NORMED, indirect=True)
def test_synchronised_norms(network):
    net = build(network)
    expected = run(net, image())
    norms = sum(isinstance(m, _BatchNorm) for m in net.modules())
    net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in net.modules()) == norms > 0
    same(run(deployed(net), image()), expected)


def test_deploying_twice_changes_nothing(network):
    net = build(network)
    assert net.form == ('trained' if network in FOLDED else 'learned')
    fast = deployed(net)
    assert fast.form == 'deployed'
    modules, expected = list(fast.modules()), run(fast, image())
    fast.switch_to_deploy()
    assert all(a is b for a, b in zip(fast.modules(), modules, strict=True))
    same(run(fast, image()), expected, 0)


def test_deployed_stays_in_evaluation(network):
    fast = deployed(build(network).train())
    assert not any(m.training for m in fast.modules())
    assert not any(p.requires_grad for p in fast.parameters())
    expected = run(fast, image())
    state = copy.deepcopy(fast.state_dict())
    assert fast.train() is fast
    same(fast(image()), expected, 0)
    assert all(torch.equal(value, state[name]) for name, value in fast.state_dict().items())


def test_weights_taken_before_stay_as_they_were(network):
    """What a checkpoint or an average refers to is not folded under its hands."""
    net = build(network)
    taken = net.state_dict()
    before = copy.deepcopy(taken)
    net.switch_to_deploy()
    run(net, image())
    for name, value in taken.items():
        assert torch.equal(value, before[name]), name
        assert value.stride() == before[name].stride(), name


@pytest.mark.parametrize('given', [torch.contiguous_format, CHANNELS_LAST])
def test_returned_maps_are_the_callers(network, given):
    maps_are_the_callers(deployed(build(network)), given)


def maps_are_the_callers(fast, given):
    """Nothing is written to a map once it can be returned, nor to the image, nor read again."""
    x = image(batch=2).contiguous(memory_format=given)
    before, ends = x.clone(), []
    parts = fast.dense_stages if hasattr(fast, 'dense_stages') else fast.features
    parts = parts.values() if isinstance(parts, nn.ModuleDict) else parts
    for part in parts:  # as if each were tapped
        part.register_forward_hook(lambda *args: ends.append((args[-1], args[-1].clone())))
    maps = run(fast, x)
    assert len(ends) == len(parts) > 2
    assert all(torch.equal(end, then) for end, then in ends)
    assert torch.equal(x, before)
    pieces = {m.untyped_storage().data_ptr() for m in (x, *(end for end, _ in ends))}
    assert len(pieces) == len(ends) + 1
    before = [m.clone() for m in maps]
    run(fast, image(batch=2, seed=3))
    same(maps, before, 0)
    for m in maps:
        m.fill_(torch.nan)
    same(run(fast, x), before, 0)


def test_modes(network):
    net = build(network)
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


@pytest.mark.parametrize('network', FOLDED, indirect=True)
@pytest.mark.parametrize(('dtype', 'tolerance'), [(torch.float32, 1e-4), (torch.float64, 1e-10)])
def test_gradients_of_the_image(network, dtype, tolerance):
    net = build(network).to(dtype)
    grads = []
    for each in (net, deployed(net)):
        x = image().to(dtype).requires_grad_()
        sum(m.square().mean() for m in each(x)).backward()
        grads.append(x.grad)
    same(grads[1:], grads[:1], tolerance)
    assert grads[0].abs().max() > 0


@pytest.mark.parametrize('network', SMALLEST, indirect=True)
@pytest.mark.parametrize(
    ('mode', 'weights'), [(torch.no_grad, 'random'), (torch.inference_mode, 'positive')]
)
def test_compiles_without_graph_break(network, mode, weights):
    fast = deployed(build(network, weights, arch=SMALLEST[network]))
    torch.compiler.reset()
    compiled = torch.compile(fast, fullgraph=True, backend='aot_eager')
    with mode():
        for x in (image(), image(33, 47, 2).contiguous(memory_format=CHANNELS_LAST)):
            given = x.clone()
            maps = compiled(x)
            same(maps, fast(x))
            assert torch.equal(x, given)
            assert len({m.untyped_storage().data_ptr() for m in maps}) == len(maps)


def test_copies(network):
    fast = deployed(build(network))
    expected = run(fast, image())
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        same(run(other, image()), expected, 0)
        with torch.no_grad():
            next(other.parameters()).zero_()
        assert difference(run(other, image())[0], expected[0]) > 0.1
        same(run(fast, image()), expected, 0)


def test_two_threads_at_once(network):
    fast = deployed(build(network))
    images = [image(64 + 8 * (i % 3), 98, 1 + i % 2, seed=i) for i in range(12)]
    expected = [run(fast, x) for x in images]
    assert difference(expected[0][0], expected[6][0]) > 0.1
    with ThreadPoolExecutor(2) as pool:
        for found, maps in zip(pool.map(lambda x: run(fast, x), images), expected, strict=True):
            same(found, maps, 1e-6)


def test_weights_of_the_other_form_are_refused(network):
    net = build(network)
    fast = deployed(net)
    forms_are_not_mixed(net, fast)
    again = deployed(build(network, 'fresh'))
    again.load_state_dict(fast.state_dict())
    same(run(again, image()), run(fast, image()), 0)


def forms_are_not_mixed(net, fast):
    for model, other in ((net, fast), (fast, net)):
        weights = {f'backbone.{name}': value for name, value in other.state_dict().items()}
        message = f"form='{other.form}', the network is of form='{model.form}'"
        model = nn.ModuleDict(dict(backbone=model))
        with pytest.raises(UserError, match=message) as raised:
            load_state_dict(model, weights)  # mmengine's, which only warns of keys that don't fit
        assert '\n' not in str(raised.value)


@pytest.mark.parametrize('network', FOLDED, indirect=True)
@pytest.mark.parametrize('granularity', ['stage', 'layer'])
def test_layer_depth(network, granularity):
    """Of what is left as in the trained network."""
    depths = []
    net = build(network)
    for each in (net, deployed(net)):
        names = [name for name, _ in each.named_parameters()]
        depths.append({each.layer_depth(name, granularity) for name in names})
    assert depths[0] == depths[1]
    assert len(depths[0]) > 4


def test_sizes_that_evaluation_takes_or_refuses(network):
    net = build(network)
    shapes = [[m.shape for m in run(each, image(batch=0))] for each in (net, deployed(net))]
    assert shapes[0] == shapes[1]
    with pytest.raises(ValueError, match='at least 32'):
        run(deployed(net), image(31, 64))


def test_deploy_turns_the_backbone_of_a_model(network):
    model = nn.ModuleDict(dict(backbone=build(network), head=nn.Linear(3, 5)))
    expected = run(model.backbone, image())
    deploy(model)
    assert model.backbone.form == 'deployed'
    same(run(model.backbone, image()), expected)
    assert model.head.weight.requires_grad
