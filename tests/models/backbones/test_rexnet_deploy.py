"""ReXNet deployed is the trained network in evaluation, and faster."""

import copy
import operator
import pickle

import pytest
import torch
from mmengine.runner.checkpoint import load_state_dict
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from mmdense.apis import deploy
from mmdense.errors import UserError
from mmdense.models import ReXNet
from mmdense.models.layers.fold import fold_norm

TINY = dict(width=0.25, depth=0.4)
ALL = range(6)
CHANNELS_LAST = torch.channels_last


def build(arch=TINY, norms='random', **options):
    """Return a network in evaluation; 'random' norms have weights below, at and above zero."""
    torch.manual_seed(0)
    net = ReXNet(arch=arch, **dict(dict(out_indices=ALL), **options))
    if norms == 'random':
        randomise(net)
    return net.eval()


@torch.no_grad()
def randomise(module):
    generator = torch.Generator().manual_seed(1)
    for norm in module.modules():
        if isinstance(norm, _BatchNorm):
            for value in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
                value.copy_(torch.randn(value.shape, generator=generator).clamp(-1.5, 1.5))
            norm.weight[::5] = 0
            norm.running_var.abs_().add_(0.5)


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


@pytest.mark.parametrize('taps', ['stages', 'unet'])
@pytest.mark.parametrize('norms', ['fresh', 'random'])
@pytest.mark.parametrize(
    ('size', 'batch'), [((32, 32), 1), ((33, 47), 2), ((65, 50), 1), ((97, 130), 3)]
)
def test_maps_are_those_of_the_evaluation(taps, norms, size, batch):
    equal_in_both_precisions(build(norms=norms, taps=taps), image(*size, batch))


@pytest.mark.parametrize('taps', ['stages', 'unet'])
@pytest.mark.parametrize('width', [0.5, 1.0, 1.3])
def test_widths(width, taps):
    equal_in_both_precisions(build(dict(width=width), taps=taps), image(45, 70))


@pytest.mark.parametrize('depth', [0.2, 1.5])
def test_depths(depth):
    """At 1.5 a second block of stride 2 has a shortcut, and no expansion."""
    equal_in_both_precisions(build(dict(width=0.25, depth=depth)), image(batch=2))


@pytest.mark.parametrize('channels', [1, 5])
def test_in_channels(channels):
    equal_in_both_precisions(build(in_channels=channels), image(channels=channels))


@pytest.mark.parametrize('taps', ['stages', 'unet'])
@pytest.mark.parametrize('indices', [(0,), (2,), (5,), (-2,), (1, 3), (0, 4), None])
def test_out_indices(taps, indices):
    equal_in_both_precisions(build(taps=taps, out_indices=indices), image())


def test_what_only_training_needs_has_no_effect():
    net = build(frozen_stages=3, drop_path_rate=0.9, norm_eval=True, with_cp=True)
    expected = run(net, image())
    fast = deployed(net.train())  # some of it trains, some is frozen
    same(run(fast, image()), expected)
    fast.train()
    same(fast(image()), expected)  # with_cp: where gradients are enabled


def test_synchronised_norms():
    net = build()
    expected = run(net, image())
    net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    assert sum(isinstance(m, nn.SyncBatchNorm) for m in net.modules()) > 20
    same(run(deployed(net), image()), expected)


class Operators(TorchDispatchMode):
    """What is called, by name."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def test_nothing_is_normed_or_concatenated():
    net = build()
    fast = deployed(net)
    called = []
    for each in (net, fast):
        with Operators() as operators:
            run(each, image())
        called.append(operators.names)
    assert {'cat', 'native_batch_norm', 'mul', 'add'} <= set(called[0])
    assert not {'cat', 'native_batch_norm', 'mul', 'add', 'silu', 'hardtanh'} & set(called[1])
    shortcuts = called[0].count('cat')
    assert shortcuts == called[1].count('add_') == 4
    # The gates' are linear layers.
    gates = sum(block.se is not None for block in net.features[:-1])
    assert called[1].count('convolution') == called[0].count('convolution') - 2 * gates
    assert called[1].count('addmm') == 2 * gates > 0


def test_what_no_map_needs_is_not_there():
    assert [len(deployed(build(out_indices=(i,))).features) for i in (0, 4, 5)] == [1, 9, 10]


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


@pytest.mark.parametrize('given', [torch.contiguous_format, CHANNELS_LAST])
@pytest.mark.parametrize('channels', [1, 3])
@pytest.mark.parametrize('dtype', [torch.float32, torch.float64])
def test_memory_formats(given, channels, dtype):
    net = build(taps='unet', in_channels=channels).to(dtype)
    fast = deployed(net)
    x = image(batch=2, channels=channels).to(dtype).contiguous(memory_format=given)
    maps = run(fast, x)
    same(maps, run(net, x))
    assert all(m.is_contiguous(memory_format=CHANNELS_LAST) for m in maps)


@pytest.mark.parametrize('given', [torch.contiguous_format, CHANNELS_LAST])
@pytest.mark.parametrize('growth', [180, 0])
def test_returned_maps_are_the_callers(given, growth):
    """Nothing is written to a map once it can be returned, nor to the image.

    Without growth a block's input is as large as its output.
    """
    fast = deployed(build(dict(width=0.25, depth=1.5, growth=growth), taps='unet'))
    x = image(batch=2).contiguous(memory_format=given)
    before, ends = x.clone(), []
    for block in fast.features:  # as if each were tapped
        block.register_forward_hook(lambda *args: ends.append((args[-1], args[-1].clone())))
    maps = run(fast, x)
    assert len(ends) == len(fast.features) > 16
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


def test_gradients_of_the_image():
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
    net = build(dict(width=0.25), norms='fresh')
    x = image(batch=2)
    exact = run(copy.deepcopy(net).double(), x.double())
    half = copy.deepcopy(net).bfloat16()
    fast = deployed(net).bfloat16() if first == 'deployed' else deployed(half)
    assert {p.dtype for p in fast.parameters()} == {torch.bfloat16}
    trained, found = run(half, x.bfloat16()), run(fast, x.bfloat16())
    for a, b, c in zip(found, trained, exact, strict=True):
        assert a.dtype == torch.bfloat16
        assert (a - c).abs().mean() <= 1.1 * (b - c).abs().mean()


def test_autocast():
    net = build(norms='fresh')
    with torch.autocast('cpu', torch.bfloat16):
        expected, found = run(net, image()), run(deployed(net), image())
    assert all(m.dtype == torch.bfloat16 for m in found)
    same(found, expected, 0.05)
    same(found, run(deployed(net).bfloat16(), image().bfloat16()), 0.02)


@pytest.mark.parametrize('mode', [torch.no_grad, torch.inference_mode])
def test_compiles_without_graph_break(mode):
    fast = deployed(build(dict(width=0.25, depth=0.2), taps='unet'))
    torch.compiler.reset()
    compiled = torch.compile(fast, fullgraph=True, backend='aot_eager')
    with mode():
        for x in (image(), image(33, 47, 2).contiguous(memory_format=CHANNELS_LAST)):
            given = x.clone()
            maps = compiled(x)
            same(maps, fast(x))
            assert torch.equal(x, given)
            assert len({m.untyped_storage().data_ptr() for m in maps}) == len(maps)


def test_compiled_shortcuts_write_to_no_part_of_a_map():
    """With frozen weights torch 2.15's inductor fails on them."""
    seen = []

    def backend(graph, inputs):
        seen.extend(node.target for node in graph.graph.nodes)
        return graph.forward

    torch.compiler.reset()
    fast = deployed(build(dict(width=0.25, depth=0.2)))
    same(run(torch.compile(fast, fullgraph=True, backend=backend), image()), run(fast, image()))
    pads = sum('pad' in str(target) for target in seen)
    assert pads == sum(block.shortcut for block in fast.features[:-1]) > 0
    assert not {operator.iadd, operator.setitem} & set(seen)


def test_copies():
    fast = deployed(build())
    expected = run(fast, image())
    for other in (copy.deepcopy(fast), pickle.loads(pickle.dumps(fast))):
        same(run(other, image()), expected, 0)
        with torch.no_grad():
            other.stem.conv.weight.zero_()
        same(run(fast, image()), expected, 0)


def test_weights_of_the_other_form_are_refused():
    net = build()
    fast = deployed(net)
    for model, other in ((net, fast), (fast, net)):
        weights = {f'backbone.{name}': value for name, value in other.state_dict().items()}
        message = f"form='{other.form}', the network is of form='{model.form}'"
        model = nn.ModuleDict(dict(backbone=model))
        with pytest.raises(UserError, match=message):
            load_state_dict(model, weights)  # mmengine's, which only warns of keys that don't fit
    again = deployed(build(norms='fresh'))
    again.load_state_dict(fast.state_dict())
    same(run(again, image()), run(fast, image()), 0)


def test_layer_depth():
    fast = deployed(build())
    depths = {fast.layer_depth(name)[0] for name, _ in fast.named_parameters()}
    assert depths == set(range(6))


def test_sizes_that_evaluation_takes_or_refuses():
    net = build()
    shapes = [[m.shape for m in run(each, image(batch=0))] for each in (net, deployed(net))]
    assert shapes[0] == shapes[1]
    with pytest.raises(ValueError, match='at least 32'):
        run(deployed(net), image(31, 64))


def test_deploy_turns_the_backbone_of_a_model():
    model = nn.ModuleDict(dict(backbone=build(), head=nn.Linear(3, 5)))
    expected = run(model.backbone, image())
    deploy(model)
    assert model.backbone.form == 'deployed'
    same(run(model.backbone, image()), expected)
    assert model.head.weight.requires_grad


@pytest.mark.parametrize('bias', [False, True])
@pytest.mark.parametrize('affine', [False, True])
@pytest.mark.parametrize('groups', [1, 4])
def test_fold_norm(bias, affine, groups):
    torch.manual_seed(0)
    conv = nn.Conv2d(4, 8, 3, 2, 1, groups=groups, bias=bias)
    norm = nn.BatchNorm2d(8, eps=0.1, affine=affine)
    norm(torch.randn(4, 8, 5, 5) * 3 + 1)
    if affine:
        randomise(norm)
    state = copy.deepcopy([*conv.state_dict().values(), *norm.state_dict().values()])
    folded = fold_norm(conv, norm)
    after = [*conv.state_dict().values(), *norm.state_dict().values()]
    assert all(torch.equal(a, b) for a, b in zip(after, state, strict=True))
    assert norm.training
    assert not folded.training
    x = torch.randn(2, 4, 9, 7)
    with torch.no_grad():
        same([folded(x)], [norm.eval()(conv(x))])
    assert not any(p.requires_grad for p in folded.parameters())


def test_fold_norm_is_rounded_once():
    torch.manual_seed(0)
    conv, norm = nn.Conv2d(64, 64, 1).bfloat16(), nn.BatchNorm2d(64).bfloat16()
    randomise(norm)
    folded = fold_norm(conv, norm)
    exact = fold_norm(conv.double(), norm.double())
    assert torch.equal(folded.weight, exact.weight.float().bfloat16())
    assert torch.equal(folded.bias, exact.bias.float().bfloat16())


def test_norms_by_the_batch_cannot_be_folded():
    norm = nn.BatchNorm2d(8, track_running_stats=False)
    with pytest.raises(ValueError, match='no running statistics'):
        fold_norm(nn.Conv2d(4, 8, 1), norm)
