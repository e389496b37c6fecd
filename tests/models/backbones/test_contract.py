"""The contract of mmdense/models/backbones/base.py, for every family."""

import itertools

import pytest
import torch
from families import (
    DEVICE,
    FAMILIES,
    TOLERANCE,
    Operators,
    build,
    image,
    median_error,
    random_options,
    randomise,
    run,
    same,
    same_step,
    step,
)
from mmengine.registry import MODELS
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdense.models.backbones import FAMILIES as LISTED

MODES = [
    pytest.param(family, memory, id=f'{family}-{memory}')
    for family, options in FAMILIES.items()
    for memory in (['lean'] if options.lean else []) + ['recompute']
]


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def all_maps(family):
    return range(FAMILIES[family].num_maps)


def test_every_listed_family_is_tested():
    assert {cls.__name__ for cls in LISTED.values()} <= FAMILIES.keys()
    for cls in LISTED.values():
        assert cls.archs
        assert cls.weights.keys() <= cls.archs.keys()


def test_announced_channels_and_strides_are_real(family):
    net = build(family).eval()
    outputs = run(net, image())
    assert isinstance(outputs, tuple)
    assert len(outputs) == 4
    assert tuple(y.shape[1] for y in outputs) == net.out_channels
    assert tuple(64 // y.shape[2] for y in outputs) == net.out_strides == (4, 8, 16, 32)
    assert all(torch.isfinite(y).all() for y in outputs)


@pytest.mark.parametrize('size', [(33, 47), (65, 130)])
def test_odd_sizes(family, size):
    net = build(family).eval()
    for y, stride in zip(run(net, image(*size)), net.out_strides, strict=True):
        for side, pixels in zip(y.shape[2:], size, strict=True):
            assert side in (pixels // stride, -(-pixels // stride))


@pytest.mark.parametrize('indices', [(0,), (1, 3), (-3, -1), -1])
def test_out_indices_return_the_same_feature_maps(family, indices):
    full = randomise(build(family, out_indices=all_maps(family))).eval()
    part = build(family, out_indices=indices).eval()
    indices = (indices,) if isinstance(indices, int) else indices
    missing = part.load_state_dict(full.state_dict(), strict=False).missing_keys
    assert not missing
    assert part.out_channels == tuple(full.out_channels[i] for i in indices)
    assert part.out_strides == tuple(full.out_strides[i] for i in indices)
    outputs = run(full, image())
    same(run(part, image()), [outputs[i] for i in indices])


def test_gradients_reach_every_parameter(family):
    gradients, _ = step(net := randomise(build(family)), image(batch=2))
    for name, _ in net.named_parameters():
        assert gradients[name].abs().sum() > 0, name


@pytest.mark.parametrize('stages', [-1, 0, 1, 4])
def test_frozen_stages(family, stages):
    net = build(family, frozen_stages=stages, out_indices=all_maps(family))
    all_stages = range(FAMILIES[family].num_maps + 1)
    for _ in range(2):  # as built, and after train() has been called
        for stage in all_stages:
            modules = net._stage_modules(stage)
            assert modules
            for module in modules:
                assert all(p.requires_grad == (stage > stages) for p in module.parameters())
                assert module.training == (stage > stages)
        net.eval()
        assert net.train() is net
    # Every parameter belongs to exactly one stage.
    ids = [id(p) for s in all_stages for m in net._stage_modules(s) for p in m.parameters()]
    assert sorted(ids) == sorted(id(p) for p in net.parameters())


def test_frozen_stages_are_not_random(family):
    options = random_options(family, 0.5)
    net = randomise(build(family, frozen_stages=FAMILIES[family].num_maps, **options))
    assert net.train().training
    same(net(image()), net(image()), 0)


@pytest.mark.parametrize('norm_eval', [False, True])
def test_norm_eval_keeps_statistics(family, norm_eval):
    net = build(family, norm_eval=norm_eval)
    assert net.train() is net
    assert net.training
    for module in net.modules():
        if isinstance(module, _BatchNorm):
            assert module.training is not norm_eval


@pytest.mark.parametrize('granularity', ['stage', 'layer'])
def test_layer_depth_of_every_parameter(family, granularity):
    net = build(family)
    depths = {name: net.layer_depth(name, granularity) for name, _ in net.named_parameters()}
    number = depths[next(iter(depths))][1]
    # Depths follow the data, from 0, without a gap; the last one is for heads.
    assert list(dict.fromkeys(depth for depth, _ in depths.values())) == list(range(number - 1))
    ids = {id(p) for module in net._stage_modules(0) for p in module.parameters()}
    stem = [name for name, p in net.named_parameters() if id(p) in ids]
    assert [name for name, (depth, _) in depths.items() if depth == 0] == stem
    # A network that is cut short keeps its depths.
    part = build(family, out_indices=(0,))
    for name, _ in part.named_parameters():
        assert part.layer_depth(name, granularity) == depths[name]


def test_layer_depth_by_layers_refines_stages(family):
    net = build(family)
    names = [name for name, _ in net.named_parameters()]
    stages, layers = ([net.layer_depth(n, g) for n in names] for g in ('stage', 'layer'))
    assert layers[0][1] > stages[0][1]
    stage_of = {}
    for (stage, _), (layer, _) in zip(stages, layers, strict=True):
        assert stage_of.setdefault(layer, stage) == stage
    by_layer = [stage for _, stage in sorted(stage_of.items())]
    assert by_layer == sorted(by_layer)
    with pytest.raises(ValueError, match="no parameter 'nonsense.weight'"):
        net.layer_depth('nonsense.weight')
    with pytest.raises(ValueError, match="granularity is 'nonsense'"):
        net.layer_depth(names[0], 'nonsense')


@pytest.mark.parametrize(
    ('options', 'layout'),
    [
        ({}, torch.contiguous_format),
        (dict(norm_eval=True), torch.channels_last),
        (dict(frozen_stages=2), torch.contiguous_format),
        (dict(random=True), torch.channels_last),
    ],
    ids=['plain', 'norm_eval', 'frozen', 'random'],
)
@pytest.mark.parametrize(('family', 'memory'), MODES)
def test_memory_modes_change_memory_only(family, memory, options, layout):
    if 'random' in options:
        options = random_options(family, 0.5)
    results = []
    for mode in ('plain', memory):
        net = randomise(build(family, memory=mode, **options)).double()
        x = image(batch=2).double().to(memory_format=layout)
        results.append(step(net.to(memory_format=layout).train(), x))
    (plain, plain_size), (result, size) = results
    same_step(result, plain)
    assert size < (0.6 if memory == 'recompute' else 0.65) * plain_size


@pytest.mark.parametrize(('family', 'memory'), MODES)
def test_memory_modes_under_autocast(family, memory):
    exact, _ = step(randomise(build(family)).double(), image(batch=4).double())
    errors = {}
    for mode in ('plain', memory):
        net = randomise(build(family, memory=mode))
        result, _ = step(net, image(batch=4), amp=torch.bfloat16)
        assert all(p.grad.dtype == torch.float32 for p in net.parameters())
        errors[mode] = median_error(result, exact)
        for name, buffer in net.named_buffers():
            assert result[name] is buffer
    assert 0 < errors[memory] < 1.5 * errors['plain']


@pytest.mark.parametrize('family', [family for family in FAMILIES if family != 'TimmBackbone'])
def test_no_activation_overwrites_what_autograd_saves(family):
    """It would be copied first; timm's activations are timm's."""
    with Operators() as operators:
        build(family).train()(image(batch=2))
    assert operators.names
    assert 'clone' not in operators.names


def test_memory_of_a_network_in_eval_mode(family):
    nets = [randomise(build(family, memory=mode)).eval() for mode in ('plain', 'recompute')]
    same(*(run(net, image()) for net in nets), 0)


def test_memory_options(family):
    assert build(family).memory == 'plain'
    assert build(family, with_cp=True).memory == 'recompute'
    assert build(family, with_cp=True, memory='recompute').memory == 'recompute'
    with pytest.raises(ValueError, match="memory is 'none', must be one of"):
        build(family, memory='none')
    lean = FAMILIES[family].lean
    message = "with_cp=True is memory='recompute'" if lean else "memory is 'lean', must be one of"
    with pytest.raises(ValueError, match=message):
        build(family, memory='lean', with_cp=True)


def test_in_channels(family):
    net = build(family, in_channels=5).eval()
    assert run(net, image(channels=5))[0].shape[1] == net.out_channels[0]
    with pytest.raises(RuntimeError, match='channels'):
        net(image(channels=3))


@pytest.mark.parametrize('family', [name for name, f in FAMILIES.items() if f.random])
def test_dropping_is_random_in_training_only(family):
    net = randomise(build(family, **random_options(family, 0.9)))
    x = image(batch=2)
    assert not torch.equal(net(x)[-1], net(x)[-1])
    net.eval()
    same(run(net, x), run(net, x))


def test_channels_last(family):
    # cuDNN has no channels-last in float64.
    dtype = torch.float64 if DEVICE == 'cpu' else torch.float32
    net = randomise(build(family)).to(dtype).eval()
    expected = run(net, image().to(dtype))
    net.to(memory_format=torch.channels_last)
    outputs = run(net, image().to(dtype, memory_format=torch.channels_last))
    same(outputs, expected, TOLERANCE[dtype])
    assert all(y.is_contiguous(memory_format=torch.channels_last) for y in outputs)


@pytest.mark.parametrize('family', [name for name in FAMILIES if name != 'TimmBackbone'])
def test_synchronised_norms(family):
    net = randomise(build(family)).eval()
    expected = run(net, image())
    same(run(nn.SyncBatchNorm.convert_sync_batchnorm(net), image()), expected)


@pytest.mark.parametrize(
    ('family', 'memory'),
    [
        *(pytest.param(name, 'plain', id=name) for name in FAMILIES),
        *(pytest.param(*mode.values, id=mode.id, marks=pytest.mark.slow) for mode in MODES),
    ],
)
def test_compiles_without_graph_break(family, memory):
    if family == 'TimmBackbone' and torch.__version__ < (2, 5):
        pytest.skip('torch 2.4 compiles no enumerate(start=1), which timm has')
    # In float64: gates that normalize two values each amplify rounding.
    net = randomise(build(family, memory=memory)).double()
    compiled = torch.compile(net, fullgraph=True, backend='aot_eager')
    results = []
    for forward in (net, compiled):
        net.zero_grad()
        outputs = forward(image(batch=2).double())
        sum(y.square().mean() for y in outputs).backward()
        results.append([y.detach() for y in outputs] + [p.grad.clone() for p in net.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize('norm_eval', [False, True])
@pytest.mark.parametrize('family', ['CondenseNetV2', 'DenseNet', 'RDNet', 'ReXNet'])
def test_what_compile_does_on_a_gpu_changes_nothing(family, norm_eval, monkeypatch):
    """The partitioner recomputes more, with the same random numbers and running statistics."""
    compiled, results = torch.compile, []
    backend = dict(fullgraph=True, backend='aot_eager_decomp_partition')
    monkeypatch.setattr(torch, 'compile', lambda call, **options: compiled(call, **backend))
    for memory in ('plain', 'lean'):
        torch._dynamo.reset()
        options = dict(memory=memory, frozen_stages=1, norm_eval=norm_eval)
        net = randomise(build(family, **options, **random_options(family, 0.3))).double()
        with monkeypatch.context() as patch:
            patch.setattr(nn.Parameter, 'is_cuda', memory == 'lean', raising=False)
            net.compile()
            results.append(step(net, image(64, 96, batch=2).double()))
    (plain, plain_bytes), (lean, lean_bytes) = results
    same_step(lean, plain)
    assert lean_bytes < 0.9 * plain_bytes


def test_a_bias_is_added_after_a_compiled_convolution(monkeypatch):
    steps = {None: [], torch.bfloat16: [], torch.float16: []}
    for amp, on_gpu in itertools.product(steps, (False, True)):
        net = randomise(build('RDNet')).to(torch.float32 if amp else torch.float64)
        with monkeypatch.context() as patch:
            patch.setattr(nn.Parameter, 'is_cuda', on_gpu, raising=False)
            patch.setattr(torch.compiler, 'is_compiling', lambda on_gpu=on_gpu: on_gpu)
            with Operators() as operators:
                x = image(batch=2).to(net.stem[0].weight.dtype)
                steps[amp].append((step(net, x, amp=amp)[0], operators.names.count('add')))
    (exact, adds), (result, adds_on_gpu) = steps.pop(None)
    same_step(result, exact)
    assert adds_on_gpu > adds
    for (plain, _), (result, _) in steps.values():
        assert 0 < median_error(result, exact) < 1.5 * median_error(plain, exact)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(out_indices=()), 'at least one'),
        (dict(out_indices=(9,)), r'there are \d feature maps'),
        (dict(out_indices=(-9,)), r'there are \d feature maps'),
        (dict(out_indices=(1, 0)), 'increasing'),
        (dict(out_indices=(-1, -1)), 'unique'),
        (dict(frozen_stages=9), r'from -1 to \d'),
        (dict(frozen_stages=-2), r'from -1 to \d'),
        (dict(arch='nonsense'), "unknown arch 'nonsense'"),
        (dict(arch=dict(nonsense=1)), "unknown field 'nonsense'"),
        (dict(arch={}), 'arch lacks'),
        (dict(arch=3), 'arch must be one of'),
    ],
)
def test_wrong_arguments(family, options, message):
    network = FAMILIES[family].network
    if 'arch' in options and 'arch' not in network:
        pytest.skip('networks without an arch')
    with pytest.raises(ValueError, match=message):
        MODELS.get(f'mmdense.{family}')(**{**network, **options})


def test_image_below_the_coarsest_stride(family):
    with pytest.raises(ValueError, match=f'{family} needs at least 32'):
        build(family)(image(31, 64))
