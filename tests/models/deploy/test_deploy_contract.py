"""The contract of ``switch_to_deploy()``, for every family that has an inference form."""

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from families import (
    DEVICE,
    FAMILIES,
    TOLERANCE,
    deployed,
    deployed_equals_trained,
    difference,
    image,
    random_options,
    randomise,
    run,
    same,
)
from families import build as build_family
from mmengine.registry import MODELS
from mmengine.runner.checkpoint import load_state_dict
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdense.apis import deploy
from mmdense.errors import UserError

CHANNELS_LAST = torch.channels_last
# A network's name begins with its family's -> options of its variant.
NETWORKS = {name: o for family in FAMILIES.values() for name, o in family.deployed.items()}
# CondenseNetV2's inference form has no gradients, and computes in the precision of its weights,
# which are buffers. RDNet's has the weights of the trained network.
FOLDED = [name for name in NETWORKS if name != 'CondenseNetV2']
OTHERS = [name for name in NETWORKS if 'RDNet' not in name]
HALF = {torch.float16: 0.01, torch.bfloat16: 0.05}
# Mean error in half precision, relative to that of the trained network; the second is allowed if
# weights are rounded twice.
ERROR, TWICE_ROUNDED = 1.15, dict(DenseNet=1.25, CondenseNetV2=1.6)


@pytest.fixture(params=NETWORKS)
def network(request):
    return request.param


def family_of(network):
    return network.split()[0]


def build(network, weights='random', **options):
    """Return a trained network in evaluation, with all feature maps.

    Vectors are 'fresh', 'positive' where they are scales, or 'random': negative and zero too.
    """
    family = family_of(network)
    net = build_family(family, **{'out_indices': None, **NETWORKS[network], **options})
    if weights != 'fresh':
        randomise(net, signed=weights == 'random')
    if family == 'CondenseNetV2':
        net.prune_to(0.5)
    return net.eval()


def test_every_family_that_deploys_is_here():
    able = {name for name in FAMILIES if hasattr(MODELS.get(f'mmdense.{name}'), 'switch_to_deploy')}
    assert {family_of(network) for network in NETWORKS} == able


@pytest.mark.parametrize(
    ('weights', 'size', 'batch'),
    [
        ('fresh', (32, 32), 1),
        ('random', (33, 47), 2),
        pytest.param('fresh', (65, 50), 1, marks=pytest.mark.slow),
        ('random', (97, 130), 3),
    ],
)
def test_outputs_equal_those_of_the_trained_network(network, weights, size, batch):
    deployed_equals_trained(build(network, weights), image(*size, batch))


@pytest.mark.parametrize(
    ('dtype', 'first'),
    [
        (torch.bfloat16, 'deployed'),
        (torch.float16, 'rounded'),
        pytest.param(torch.bfloat16, 'rounded', marks=pytest.mark.slow),
        pytest.param(torch.float16, 'deployed', marks=pytest.mark.slow),
    ],
)
def test_half_precision(network, dtype, first):
    """On average as precise as the trained network, unless weights are rounded twice."""
    net = build(network, 'fresh')
    generator = torch.Generator('cpu').manual_seed(1)
    for name, value in net.state_dict().items():  # scales of norms from 0.1 to 1.6
        if value.ndim == 1 and value.is_floating_point():
            normal = torch.randn(value.shape, generator=generator, device='cpu')
            value.copy_(normal.clamp(-1.5, 1.5))
            if name.endswith(('running_var', 'weight', 'gamma')):
                value.abs_().add_(0.5 if name.endswith('running_var') else 0.1)
    x = image(batch=2)
    exact = run(copy.deepcopy(net).double(), x.double())
    half = copy.deepcopy(net).to(dtype)
    fast = deployed(net).to(dtype) if first == 'deployed' else deployed(half)
    weights = [*fast.parameters(), *fast.buffers()]
    assert {w.dtype for w in weights if w.is_floating_point()} == {dtype}
    trained, outputs = run(half, x.to(dtype)), run(fast, x.to(dtype))
    for a, c in zip(outputs, exact, strict=True):
        assert a.dtype == dtype
        assert difference(a, c) <= HALF[dtype]
    errors = [
        sum((a - c).abs().mean() / c.abs().mean() for a, c in zip(each, exact, strict=True))
        for each in (outputs, trained)
    ]
    allowed = TWICE_ROUNDED.get(family_of(network), ERROR) if first == 'rounded' else ERROR
    assert errors[0] <= allowed * errors[1]


@pytest.mark.parametrize('network', FOLDED, indirect=True)
def test_autocast(network):
    net = build(network, 'positive')
    fast = deployed(net)
    with torch.autocast(DEVICE, torch.bfloat16):
        expected = run(net, image())
        for grad in (False, True):
            outputs = fast(image().requires_grad_(grad))
            assert all(y.dtype == torch.bfloat16 and y.requires_grad == grad for y in outputs)
            same(outputs, expected, 0.05)
    same(outputs, run(deployed(net).bfloat16(), image().bfloat16()), 0.05)


@pytest.mark.parametrize(('layout', 'channels'), [(torch.contiguous_format, 1), (CHANNELS_LAST, 3)])
def test_memory_formats(network, layout, channels):
    net = build(network, in_channels=channels)
    x = image(batch=2, channels=channels).contiguous(memory_format=layout)
    fast = deployed(net)
    outputs = run(fast, x)
    same(outputs, run(net, x))
    expected = CHANNELS_LAST if network in FOLDED else torch.contiguous_format
    assert all(y.is_contiguous(memory_format=expected) for y in outputs)
    weights = [p for p in fast.parameters() if p.ndim == 4 and network in FOLDED]
    assert all(p.is_contiguous(memory_format=CHANNELS_LAST) for p in weights)


@pytest.mark.parametrize('indices', [(0,), (-2,), (1, 3)])
def test_out_indices(network, indices):
    deployed_equals_trained(build(network, out_indices=indices), image(), [torch.float32])


@pytest.mark.parametrize(('stages', 'memory'), [(0, 'plain'), (2, 'lean'), (3, 'recompute')])
def test_training_options_have_no_effect(network, stages, memory):
    options = random_options(family_of(network), 0.9)
    net = build(network, norm_eval=True, frozen_stages=stages, memory=memory, **options)
    expected = run(net, image())
    fast = deployed(net.train())  # some stages train, some are frozen
    same(run(fast, image()), expected)
    fast.train()
    same(fast(image()), expected)  # with gradients enabled


@pytest.mark.parametrize('network', OTHERS, indirect=True)
def test_synchronised_norms(network):
    net = build(network)
    expected = run(net, image())
    norms = sum(isinstance(m, _BatchNorm) for m in net.modules())
    net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in net.modules()) == norms > 0
    same(run(deployed(net), image()), expected)


def test_deployed_stays_in_evaluation(network):
    net = build(network).train()
    assert net.form == ('trained' if network in FOLDED else 'learned')
    fast = deployed(net)
    assert fast.form == 'deployed'
    assert not any(m.training for m in fast.modules())
    assert not any(p.requires_grad for p in fast.parameters())
    modules, expected = list(fast.modules()), run(fast, image())
    state = copy.deepcopy(fast.state_dict())
    fast.switch_to_deploy()  # a second time: nothing changes
    assert all(a is b for a, b in zip(fast.modules(), modules, strict=True))
    assert fast.train() is fast
    same(fast(image()), expected, 0)
    assert all(torch.equal(value, state[name]) for name, value in fast.state_dict().items())


def test_a_state_dict_taken_before_is_not_changed(network):
    """A checkpoint or an average may refer to it."""
    net = build(network)
    state = net.state_dict()
    before = copy.deepcopy(state)
    net.switch_to_deploy()
    run(net, image())
    for name, value in state.items():
        assert torch.equal(value, before[name]), name
        assert value.stride() == before[name].stride(), name


@pytest.mark.parametrize('layout', [torch.contiguous_format, CHANNELS_LAST])
def test_outputs_belong_to_the_caller(network, layout):
    """Neither outputs nor the image are written to later, and outputs are not read again."""
    fast, results = deployed(build(network)), []
    x = image(batch=2).contiguous(memory_format=layout)
    before = x.clone()
    parts = fast.dense_stages if hasattr(fast, 'dense_stages') else fast.features
    parts = parts.values() if isinstance(parts, nn.ModuleDict) else parts
    for part in parts:  # as if each output were returned
        part.register_forward_hook(lambda *args: results.append((args[-1], args[-1].clone())))
    outputs = run(fast, x)
    assert len(results) == len(parts) > 2
    assert all(torch.equal(result, copied) for result, copied in results)
    assert torch.equal(x, before)
    storages = {y.untyped_storage().data_ptr() for y in (x, *(result for result, _ in results))}
    assert len(storages) == len(results) + 1
    before = [y.clone() for y in outputs]
    run(fast, image(batch=2, seed=3))
    same(outputs, before, 0)
    for y in outputs:
        y.fill_(torch.nan)
    same(run(fast, x), before, 0)


def test_grad_modes(network):
    net = build(network)
    fast, expected = deployed(net), run(net, image())
    for mode in (torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode):
        with mode():
            outputs = fast(image())
        assert not any(y.requires_grad for y in outputs)
        same(outputs, expected)
    with torch.inference_mode():  # deployed inside, run outside
        other = deployed(net)
        same(other(image()), expected)
    same(run(other, image()), expected)


@pytest.mark.parametrize('network', FOLDED, indirect=True)
def test_gradients_of_the_image(network):
    net = build(network).double()
    grads = []
    for each in (net, deployed(net)):
        x = image().double().requires_grad_()
        sum(y.square().mean() for y in each(x)).backward()
        grads.append(x.grad)
    same(grads[1:], grads[:1], TOLERANCE[torch.float64])
    assert grads[0].abs().max() > 0


@pytest.mark.parametrize('family', [name for name, family in FAMILIES.items() if family.smallest])
@pytest.mark.parametrize(
    ('mode', 'weights'),
    [
        (torch.inference_mode, 'random'),
        pytest.param(torch.no_grad, 'positive', marks=pytest.mark.slow),
    ],
)
def test_compiles_without_graph_break(family, mode, weights):
    fast = deployed(build(family, weights, **FAMILIES[family].smallest))
    torch.compiler.reset()
    compiled = torch.compile(fast, fullgraph=True, backend='aot_eager')
    with mode():
        for x in (image(), image(33, 47, 2).contiguous(memory_format=CHANNELS_LAST)):
            before = x.clone()
            outputs = compiled(x)
            same(outputs, fast(x))
            assert torch.equal(x, before)
            assert len({y.untyped_storage().data_ptr() for y in outputs}) == len(outputs)


def test_copies_are_independent(network):
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
        for outputs, results in zip(
            pool.map(lambda x: run(fast, x), images), expected, strict=True
        ):
            same(outputs, results, 1e-6)


@pytest.mark.parametrize('network', OTHERS, indirect=True)
def test_weights_of_another_form_are_refused(network):
    net = build(network)
    fast = deployed(net)
    for model, other in ((net, fast), (fast, net)):
        weights = {f'backbone.{name}': value for name, value in other.state_dict().items()}
        message = f'form={other.form!r}, the network is of form={model.form!r}: load weights before'
        model = nn.ModuleDict(dict(backbone=model))
        with pytest.raises(UserError, match=message) as error:
            load_state_dict(model, weights)  # mmengine's, which only warns of keys that don't fit
        assert '\n' not in str(error.value)
    again = deployed(build(network, 'fresh'))
    again.load_state_dict(fast.state_dict())
    same(run(again, image()), run(fast, image()), 0)


@pytest.mark.parametrize('network', FOLDED, indirect=True)
@pytest.mark.parametrize('granularity', ['stage', 'layer'])
def test_layer_depth(network, granularity):
    """Remaining parameters keep the depth that they have in the trained network."""
    depths = []
    net = build(network)
    for each in (net, deployed(net)):
        names = [name for name, _ in each.named_parameters()]
        depths.append({each.layer_depth(name, granularity) for name in names})
    assert depths[0] == depths[1]
    assert len(depths[0]) > 4


def test_empty_batches_and_small_images(network):
    net = build(network)
    shapes = [[y.shape for y in run(each, image(batch=0))] for each in (net, deployed(net))]
    assert shapes[0] == shapes[1]
    with pytest.raises(ValueError, match='at least 32'):
        run(deployed(net), image(31, 64))


def test_deploy_switches_the_backbone_of_a_model(network):
    model = nn.ModuleDict(dict(backbone=build(network), head=nn.Linear(3, 5)))
    expected = run(model.backbone, image())
    deploy(model)
    assert model.backbone.form == 'deployed'
    same(run(model.backbone, image()), expected, TOLERANCE[torch.float32])
    assert model.head.weight.requires_grad
