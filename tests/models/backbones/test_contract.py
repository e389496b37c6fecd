"""The contract of mmdense/models/backbones/base.py, run over every family with tiny networks."""

import statistics

import mmengine
import pytest
import torch
from mmengine.registry import MODELS
from torch.nn.modules.batchnorm import _BatchNorm

import mmdense  # noqa: F401

# A family's name -> the smallest network that has all its parts. A new family is a line here, and
# what is peculiar to it in the tables below.
FAMILIES = {
    'RDNet': dict(arch=dict(stem=8, growth=(8, 8, 8, 16, 8), down=(1, 2, 4), blocks=2)),
    'DenseNet': dict(arch=dict(growth_rate=8, layers=(3, 4, 4, 3))),
    'CondenseNetV2': dict(arch=dict(layers=(1, 2, 1, 2, 2), growth=(8, 4, 8, 8, 8), groups=4)),
    'ReXNet': dict(arch=dict(width=0.25, depth=0.4)),
    'ShuffleNetV2': dict(arch=dict(channels=(20, 40, 80), units=(2, 4, 2), stem=4, last=64)),
    'TimmBackbone': dict(model_name='mobilenetv2_035'),
}
# The option that makes training random, where there is one; TimmBackbone's is timm's.
RANDOM = dict(
    RDNet='drop_path_rate',
    DenseNet='drop_rate',
    CondenseNetV2='drop_rate',
    ReXNet='drop_path_rate',
    TimmBackbone='drop_path_rate',
)


# Maps that can be tapped; by default those of strides 4 to 32 are.
NUM_MAPS = dict(RDNet=4, DenseNet=4, CondenseNetV2=5, ReXNet=6, ShuffleNetV2=5, TimmBackbone=5)


def build(family, **options):
    torch.manual_seed(0)
    return MODELS.build(dict(type=f'mmdense.{family}', **FAMILIES[family], **options))


def random(family, rate):
    options = {RANDOM[family]: rate} if family in RANDOM else {}
    return dict(model_kwargs=options) if family == 'TimmBackbone' else options


def image(height=64, width=96, channels=3, batch=2):
    return torch.randn(batch, channels, height, width, generator=torch.Generator().manual_seed(1))


def active(net):
    """Give zero- and nearly-zero-initialised scales a size that shows in the outputs."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim == 1:
                parameter.copy_(torch.rand(parameter.shape, generator=generator) + 0.5)
    return net


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def test_announced_channels_and_strides_are_real(family):
    net = build(family).eval()
    maps = net(image())
    assert isinstance(maps, tuple)
    assert len(maps) == 4
    assert tuple(m.shape[1] for m in maps) == net.out_channels
    assert tuple(64 // m.shape[2] for m in maps) == net.out_strides == (4, 8, 16, 32)
    assert all(torch.isfinite(m).all() for m in maps)


@pytest.mark.parametrize('size', [(33, 47), (65, 50), (97, 130)])
def test_odd_sizes(family, size):
    net = build(family).eval()
    for m, stride in zip(net(image(*size)), net.out_strides, strict=True):
        for got, pixels in zip(m.shape[2:], size, strict=True):
            assert got in (pixels // stride, -(-pixels // stride))


@pytest.mark.parametrize('indices', [(0,), (3,), (1, 3), (0, 1, 2), (-1,), (-3, -1)])
def test_out_indices_return_the_same_maps(family, indices):
    full = active(build(family, out_indices=range(NUM_MAPS[family]))).eval()
    part = build(family, out_indices=indices).eval()
    missing = part.load_state_dict(full.state_dict(), strict=False).missing_keys
    assert not missing
    assert part.out_channels == tuple(full.out_channels[i] for i in indices)
    assert part.out_strides == tuple(full.out_strides[i] for i in indices)
    maps = full(image())
    for got, i in zip(part(image()), indices, strict=True):
        torch.testing.assert_close(got, maps[i])


def test_gradients_reach_every_parameter(family):
    net = active(build(family))
    loss = sum((m * torch.randn_like(m)).sum() for m in net(image()))
    loss.backward()
    without = [n for n, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without


@pytest.mark.parametrize('stages', [-1, 0, 1, 3, 4])
def test_frozen_stages(family, stages):
    net = build(family, frozen_stages=stages, out_indices=range(NUM_MAPS[family]))
    all_stages = range(NUM_MAPS[family] + 1)
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
    owned = [id(p) for s in all_stages for m in net._stage_modules(s) for p in m.parameters()]
    assert sorted(owned) == sorted(id(p) for p in net.parameters())


def test_what_is_frozen_is_not_random(family):
    net = active(build(family, frozen_stages=NUM_MAPS[family], **random(family, 0.5)))
    assert net.train().training
    for a, b in zip(net(image()), net(image()), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize('norm_eval', [False, True])
def test_norm_eval_keeps_statistics(family, norm_eval):
    net = build(family, norm_eval=norm_eval)
    assert net.train() is net
    assert net.training
    for module in net.modules():
        if isinstance(module, _BatchNorm):
            assert module.training is not norm_eval


@pytest.mark.parametrize('granularity', ['stage', 'layer'])
def test_layer_depth_knows_every_parameter(family, granularity):
    net = build(family)
    depths = {}
    for name, _ in net.named_parameters():
        depth, number = net.layer_depth(name, granularity)
        depths.setdefault(depth, name)
        assert 0 <= depth < number
    # Depths follow the data, from 0, without a gap; the last one is for heads.
    assert sorted(depths) == list(range(number - 1))
    stem = _names(net, net._stage_modules(0))
    assert [n for n, _ in net.named_parameters() if not net.layer_depth(n, granularity)[0]] == stem
    # A network that is cut short keeps its depths.
    part = build(family, out_indices=(0,))
    for name, _ in part.named_parameters():
        assert part.layer_depth(name, granularity) == net.layer_depth(name, granularity)
    with pytest.raises(ValueError, match="no parameter 'nonsense.weight'"):
        net.layer_depth('nonsense.weight', granularity)


def test_layer_depth_by_layers_refines_stages(family):
    net = build(family)
    stages, layers = [], []
    for name, _ in net.named_parameters():
        stages.append(net.layer_depth(name))
        layers.append(net.layer_depth(name, 'layer'))
    assert layers[0][1] > stages[0][1]
    stage_of = {}
    for (stage, _), (layer, _) in zip(stages, layers, strict=True):
        assert stage_of.setdefault(layer, stage) == stage
    by_layer = [stage for _, stage in sorted(stage_of.items())]
    assert by_layer == sorted(by_layer)
    with pytest.raises(ValueError, match="granularity is 'nonsense'"):
        net.layer_depth('stem.0.weight', 'nonsense')


def _names(net, modules):
    ids = {id(p) for m in modules for p in m.parameters()}
    return [n for n, p in net.named_parameters() if id(p) in ids]


def held_bytes(net, x, amp=False):
    """Return the maps of a training step, and how many bytes wait for its backward pass."""
    held = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t),
        torch.autocast('cpu', torch.bfloat16, enabled=amp),
    ):
        maps = net(x)
    for parameter in net.parameters():
        held.pop(parameter.data_ptr(), None)
    return maps, sum(held.values())


def train_step(net, x, amp=False):
    """Return what a step leaves behind, by name, and the bytes that waited for its backward."""
    x = x.clone().requires_grad_()
    torch.manual_seed(3)
    maps, size = held_bytes(net, x, amp)
    generator = torch.Generator().manual_seed(4)
    sum((m * torch.randn(m.shape, generator=generator).to(m)).sum() for m in maps).backward()
    left = {f'map {i}': m.detach() for i, m in enumerate(maps)} | {'image': x.grad}
    left |= {name: p.grad for name, p in net.named_parameters()}
    return left | dict(net.named_buffers()), size


def modes():
    for family in FAMILIES:
        baseline = family in ('ShuffleNetV2', 'TimmBackbone')
        for memory in ('recompute',) if baseline else ('recompute', 'lean'):
            yield pytest.param(family, memory, id=f'{family}-{memory}')


@pytest.mark.parametrize(
    ('options', 'layout'),
    [
        ({}, torch.contiguous_format),
        ({}, torch.channels_last),
        (dict(norm_eval=True), torch.channels_last),
        (dict(frozen_stages=2), torch.contiguous_format),
        (dict(random=True), torch.channels_last),
    ],
    ids=['plain', 'channels-last', 'norm_eval', 'frozen', 'random'],
)
@pytest.mark.parametrize(('family', 'memory'), modes())
def test_memory_modes_change_memory_alone(family, memory, options, layout):
    if 'random' in options:
        options = random(family, 0.5)
    found = []
    for mode in ('plain', memory):
        net = active(build(family, memory=mode, **options)).double().to(memory_format=layout)
        found.append(train_step(net.train(), image().double().to(memory_format=layout)))
    (plain, plain_size), (thrifty, size) = found
    for name, expected in plain.items():
        if expected is None:
            assert thrifty[name] is None, name
        else:  # a bias in front of a norm has no gradient but rounding
            torch.testing.assert_close(thrifty[name], expected, rtol=1e-9, atol=1e-9, msg=name)
    assert size < (0.6 if memory == 'recompute' else 0.65) * plain_size


@pytest.mark.parametrize(('family', 'memory'), modes())
def test_memory_modes_under_autocast(family, memory):
    exact, _ = train_step(active(build(family)).double().train(), image(batch=4).double())
    errors = {}
    for mode in ('plain', memory):
        net = active(build(family, memory=mode)).train()
        left, size = train_step(net, image(batch=4), amp=True)
        assert all(p.grad.dtype == torch.float32 for p in net.parameters())
        errors[mode] = statistics.median(
            float((left[name] - value).norm() / value.norm())
            for name, value in exact.items()
            if value.is_floating_point() and value.norm() > 1e-9  # else it is rounding alone
        )
        for name, buffer in net.named_buffers():
            assert left[name] is buffer
    assert 0 < errors[memory] < 1.5 * errors['plain']


def test_memory_of_a_network_in_eval_mode(family):
    nets = [active(build(family, memory=mode)).eval() for mode in ('plain', 'recompute')]
    with torch.no_grad():
        for a, b in zip(*(net(image()) for net in nets), strict=True):
            assert torch.equal(a, b)


def test_with_cp_is_an_old_name(family):
    assert build(family).memory == 'plain'
    assert build(family, with_cp=True).memory == 'recompute'
    assert build(family, with_cp=True, memory='recompute').memory == 'recompute'
    with pytest.raises(ValueError, match="memory is 'none', must be one of"):
        build(family, memory='none')
    if 'lean' in build(family).memory_modes:
        with pytest.raises(ValueError, match="with_cp=True is memory='recompute'"):
            build(family, memory='lean', with_cp=True)
    else:
        with pytest.raises(ValueError, match="memory is 'lean', must be one of"):
            build(family, memory='lean')


def test_in_channels(family):
    net = build(family, in_channels=5)
    assert net(image(channels=5))[0].shape[1] == net.out_channels[0]
    with pytest.raises(RuntimeError, match='channels'):
        net(image(channels=3))


@pytest.mark.parametrize('family', RANDOM)
def test_dropping_is_random_in_training_only(family):
    net = active(build(family, **random(family, 0.9)))
    x = image()
    assert not torch.equal(net(x)[-1], net(x)[-1])
    net.eval()
    torch.testing.assert_close(net(x)[-1], net(x)[-1])


def test_channels_last_in_gives_the_same(family):
    net = active(build(family)).eval()
    expected = net(image())
    net.to(memory_format=torch.channels_last)
    got = net(image().to(memory_format=torch.channels_last))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
        assert a.is_contiguous(memory_format=torch.channels_last)


def test_init_cfg_loads_a_checkpoint(family, tmp_path):
    trained = active(build(family))
    file = str(tmp_path / 'backbone.pth')
    torch.save(dict(state_dict=trained.state_dict()), file)
    net = build(family, init_cfg=dict(type='Pretrained', checkpoint=file))
    net.init_weights()
    for a, b in zip(net.parameters(), trained.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.slow
@pytest.mark.parametrize('memory', ['plain', 'recompute', 'lean'])
def test_compiles_without_graph_break(family, memory):
    if memory == 'lean' and family in ('ShuffleNetV2', 'TimmBackbone'):
        return
    if family == 'TimmBackbone' and torch.__version__ < (2, 5):
        pytest.skip('torch 2.4 compiles no enumerate(start=1), which timm has')
    # Gates that norm two values each are chaotic: in float32 they pass on rounding enlarged.
    net = active(build(family, memory=memory)).double()
    compiled = torch.compile(net, fullgraph=True, backend='aot_eager')
    grads = []
    for run in (net, compiled):
        net.zero_grad()
        maps = run(image().double())
        sum(m.square().mean() for m in maps).backward()
        grads.append([m.detach() for m in maps] + [p.grad.clone() for p in net.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(out_indices=()), 'at least one'),
        (dict(out_indices=(9,)), r'there are \d maps'),
        (dict(out_indices=(-9,)), r'there are \d maps'),
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
    if 'arch' in options and 'arch' not in FAMILIES[family]:
        pytest.skip('no arch: its networks are named otherwise')
    network = {**FAMILIES[family], **options}
    cls = mmengine.registry.MODELS.get(f'mmdense.{family}')
    with pytest.raises(ValueError, match=message):
        cls(**network)


def test_image_below_the_coarsest_stride(family):
    net = build(family)
    with pytest.raises(ValueError, match='at least 32'):
        net(image(31, 64))
