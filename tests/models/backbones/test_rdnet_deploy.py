"""RDNet deployed is the trained network in evaluation, and faster."""

import copy
import pickle
import threading

import pytest
import torch
from mmengine.runner.checkpoint import load_state_dict
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mmdense.apis import deploy
from mmdense.errors import UserError
from mmdense.models import RDNet
from mmdense.models.backbones import _rdnet_deploy

# Blocks with a gate and without, transitions with a stride and without.
TINY = dict(stem=8, growth=(8, 4, 12, 16), down=(1, 3), blocks=2)
CHANNELS_LAST = torch.channels_last


@pytest.fixture(params=[1, 2])
def threads(request):
    """Products of float32 are other operators with one thread than with more."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def build(arch=TINY, weights='random', **options):
    """Return a network in evaluation; 'random' ones have scales below, at and above zero."""
    torch.manual_seed(0)
    net = RDNet(arch=arch, **options)
    if weights == 'random':
        randomise(net)
    return net.eval()


@torch.no_grad()
def randomise(net):
    generator = torch.Generator().manual_seed(1)
    for name, value in net.named_parameters():
        if value.ndim == 1:
            value.copy_(torch.randn(value.shape, generator=generator).clamp(-1.5, 1.5))
            if name.endswith(('gamma', '.1.weight')):
                value[::5] = 0


def deployed(net):
    net = copy.deepcopy(net)
    net.switch_to_deploy()
    return net


def image(height=64, width=48, batch=1, channels=3, seed=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, channels, height, width, generator=generator)


@torch.no_grad()
def run(net, x):
    return net(x)


def difference(a, b):
    a, b = a.detach().double(), b.detach().double()
    return float((a - b).abs().max() / b.abs().max())


def same(found, expected, tolerance=2e-5):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert difference(a, b) <= tolerance


def equal_in_both_precisions(net, x):
    same(run(deployed(net), x), run(net, x))
    net, x = copy.deepcopy(net).double(), x.double()
    same(run(deployed(net), x), run(net, x), 1e-10)


@pytest.mark.parametrize('weights', ['fresh', 'random'])
@pytest.mark.parametrize(
    ('size', 'batch'), [((16, 16), 1), ((33, 47), 2), ((65, 50), 1), ((97, 130), 3)]
)
def test_maps_are_those_of_the_evaluation(weights, size, batch, threads):
    equal_in_both_precisions(build(weights=weights), image(*size, batch))


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


@pytest.mark.parametrize('channels', [1, 5])
def test_in_channels(channels):
    equal_in_both_precisions(build(in_channels=channels), image(channels=channels))


@pytest.mark.parametrize('indices', [(0,), (1,), (-1,), (0, 2), (1, 2)])
def test_out_indices(indices):
    equal_in_both_precisions(build(out_indices=indices), image())


def test_output_norms():
    net = build(output_norm=True, out_indices=(0, 2))
    assert len(net.output_norms) == 2
    equal_in_both_precisions(net, image(batch=2))


@pytest.mark.parametrize('memory', ['plain', 'lean', 'recompute'])
def test_what_only_training_needs_has_no_effect(memory):
    net = build(frozen_stages=2, drop_path_rate=0.9, memory=memory)
    expected = run(net, image())
    fast = deployed(net.train())  # some of it trains, some is frozen
    same(run(fast, image()), expected)
    fast.train()
    same(fast(image()), expected)  # where gradients are enabled


@pytest.mark.parametrize('size', [1, 1000, 10**9])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_strips_of_any_size(size, dtype, threads, monkeypatch):
    """Of one row of products, of some, with a rest, and all at once."""
    net, x = build().to(dtype), image(32, 48, 2).to(dtype)
    monkeypatch.setattr(_rdnet_deploy, 'STRIP', size)
    same(run(deployed(net), x), run(net, x), 1e-10 if dtype == torch.float64 else 2e-5)


def test_products_by_convolutions(threads):
    with Operators() as operators:
        run(deployed(build()), image())
    products, gates = 2 * 8, 4
    assert operators.names.count('addmm') == gates + (products if threads == 1 else 0)
    # The stem's, the depthwise ones, and three between dense stages.
    assert operators.names.count('convolution') == 12 + (0 if threads == 1 else products)


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


def test_deploying_twice_changes_nothing():
    net = build()
    assert net.form == 'trained'
    fast = deployed(net)
    assert fast.form == 'deployed'
    modules, expected = list(fast.modules()), run(fast, image())
    fast.switch_to_deploy()
    assert all(a is b for a, b in zip(fast.modules(), modules, strict=True))
    same(run(fast, image()), expected, 0)


def test_deployed_stays_in_evaluation():
    fast = deployed(build().train())
    assert not any(m.training for m in fast.modules())
    assert not any(p.requires_grad for p in fast.parameters())
    expected = run(fast, image())
    state = copy.deepcopy(fast.state_dict())
    assert fast.train() is fast
    same(fast(image()), expected, 0)
    assert all(torch.equal(value, state[name]) for name, value in fast.state_dict().items())


def test_weights_taken_before_stay_as_they_were():
    """What a checkpoint or an average refers to is not folded under its hands."""
    net = build()
    taken = net.state_dict()
    before = copy.deepcopy(taken)
    net.switch_to_deploy()
    run(net, image())
    for name, value in taken.items():
        assert torch.equal(value, before[name]), name
        assert value.stride() == before[name].stride(), name
    folded = ('fc1.weight', 'fc2.weight', 'scale', 'gate.weight', 'gate.bias')
    own = [p for name, p in net.named_parameters() if name.endswith(folded)]
    # Of eight blocks, four of them with a gate: two weights and a scale, and the gates'.
    assert len(own) == 8 * 3 + 4 * 2
    pieces = {value.untyped_storage().data_ptr() for value in taken.values()}
    assert not pieces & {p.untyped_storage().data_ptr() for p in own}


@pytest.mark.parametrize('given', [torch.contiguous_format, CHANNELS_LAST])
@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_memory_formats(given, channels, dtype, threads):
    net = build(in_channels=channels).to(dtype)
    fast = deployed(net)
    x = image(batch=2, channels=channels).to(dtype).contiguous(memory_format=given)
    maps = run(fast, x)
    same(maps, run(net, x))
    assert all(m.is_contiguous(memory_format=CHANNELS_LAST) for m in maps)


@pytest.mark.parametrize('given', [torch.contiguous_format, CHANNELS_LAST])
def test_returned_maps_are_the_callers(given):
    """Nothing is written to a map once it can be returned, nor to the image."""
    fast = deployed(build())
    x = image(batch=2).contiguous(memory_format=given)
    before, ends = x.clone(), []
    for stage in fast.dense_stages:  # as if each were tapped
        stage.register_forward_hook(lambda *args: ends.append((args[-1], args[-1].clone())))
    maps = run(fast, x)
    assert len(ends) == len(fast.dense_stages) == 4
    assert all(torch.equal(end, then) for end, then in ends)
    assert torch.equal(x, before)
    pieces = {m.untyped_storage().data_ptr() for m in (x, *(end for end, _ in ends))}
    assert len(pieces) == len(ends) + 1
    before = [m.clone() for m in maps]
    run(fast, image(batch=2, seed=3))
    same(maps, before, 0)


def test_modes(threads):
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


def test_gradients_of_the_image(threads):
    net = build()
    grads = []
    for each in (net, deployed(net)):
        x = image().requires_grad_()
        sum(m.square().mean() for m in each(x)).backward()
        grads.append(x.grad)
    same(grads[1:], grads[:1], 1e-4)
    assert grads[0].abs().max() > 0


@pytest.mark.parametrize('first', ['deployed', 'rounded'])
def test_half_precision(first):
    """No less precise than the trained network, on average, whatever is done first."""
    net = build(dict(TINY, layer_scale=1.0), weights='fresh')
    x = image(batch=2)
    exact = run(copy.deepcopy(net).double(), x.double())
    half = copy.deepcopy(net).bfloat16()
    fast = deployed(net).bfloat16() if first == 'deployed' else deployed(half)
    assert {p.dtype for p in fast.parameters()} == {torch.bfloat16}
    trained, found = run(half, x.bfloat16()), run(fast, x.bfloat16())
    for a, b, c in zip(found, trained, exact, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a - c).abs().mean() <= 1.1 * (b - c).abs().mean()


@pytest.mark.parametrize('grad', [False, True])
def test_autocast(grad):
    net = build(dict(TINY, layer_scale=1.0), weights='fresh')
    x = image().requires_grad_(grad)
    with torch.autocast('cpu', torch.bfloat16):
        expected, found = run(net, image()), deployed(net)(x)
    assert all(m.dtype == torch.bfloat16 and m.requires_grad == grad for m in found)
    same(found, expected, 0.05)
    same(found, run(deployed(net).bfloat16(), image().bfloat16()), 0.05)


@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode])
def test_compiles_without_graph_break(mode):
    fast = deployed(build(dict(stem=8, growth=(8, 8), down=(1,), blocks=1, gate_from=1)))
    torch.compiler.reset()
    compiled = torch.compile(fast, fullgraph=True, backend='aot_eager')
    with mode():
        for x in (image(), image(33, 47, 2).contiguous(memory_format=CHANNELS_LAST)):
            given = x.clone()
            maps = compiled(x)
            same(maps, fast(x))
            assert torch.equal(x, given)
            assert len({m.untyped_storage().data_ptr() for m in maps}) == len(maps)


def test_multiply_adds_are_counted_without_memory():
    """All that remain are the trained network's."""
    net, counts = build(), []
    x = image().to('meta')
    for each in (net, deployed(net)):
        with FlopCounterMode(display=False) as counter:
            run(each.to('meta'), x)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


def test_copies():
    fast = deployed(build())
    expected = run(fast, image())
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        same(run(other, image()), expected, 0)
        with torch.no_grad():
            other.stem[0].weight.zero_()
        same(run(fast, image()), expected, 0)


def test_two_threads_at_once():
    fast = deployed(build())
    images = [image(seed=seed) for seed in (3, 4)]
    expected = [run(fast, x) for x in images]
    wrong, start = [], threading.Barrier(2)

    def work(i):
        start.wait()
        for _ in range(20):
            maps = run(fast, images[i])
            if any(difference(a, b) > 1e-6 for a, b in zip(maps, expected[i], strict=True)):
                wrong.append(i)

    workers = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert difference(expected[0][0], expected[1][0]) > 0.1
    assert not wrong


def test_weights_of_the_other_form_are_refused():
    net = build()
    fast = deployed(net)
    for model, other in ((net, fast), (fast, net)):
        weights = {f'backbone.{name}': value for name, value in other.state_dict().items()}
        message = f"form='{other.form}', the network is of form='{model.form}'"
        model = nn.ModuleDict(dict(backbone=model))
        with pytest.raises(UserError, match=message):
            load_state_dict(model, weights)  # mmengine's, which only warns of keys that don't fit
    again = deployed(build(weights='fresh'))
    again.load_state_dict(fast.state_dict())
    same(run(again, image()), run(fast, image()), 0)


@pytest.mark.parametrize('granularity', ['stage', 'layer'])
def test_layer_depth(granularity):
    """Of the blocks and of what lies between them as in the trained network."""
    net = build(output_norm=True)
    depths = []
    for each in (net, deployed(net)):
        names = [name for name, _ in each.named_parameters()]
        depths.append({each.layer_depth(name, granularity) for name in names})
    assert depths[0] == depths[1]
    assert len(depths[0]) == (10 if granularity == 'layer' else 6)


def test_sizes_that_evaluation_takes_or_refuses():
    with pytest.raises(ValueError, match='at least 16'):
        run(deployed(build()), image(15, 64))


def test_no_images(threads):
    shapes = [[m.shape for m in run(each, image(batch=0))] for each in (build(), deployed(build()))]
    assert shapes[0] == shapes[1]


def test_deploy_turns_the_backbone_of_a_model():
    model = nn.ModuleDict(dict(backbone=build(), head=nn.Linear(3, 5)))
    expected = run(model.backbone, image())
    deploy(model)
    assert model.backbone.form == 'deployed'
    same(run(model.backbone, image()), expected)
    assert model.head.weight.requires_grad
