"""DenseNet equals timm's and torchvision's; test_contract.py has what all families share."""

import copy
import functools
from unittest import mock

import pytest
import timm
import torch
import torchvision
from families import DEVICE, image, median_error, randomise, run, same_step, step
from torch import distributed as dist
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore

from mmdense.models import DenseNet
from mmdense.models.backbones import densenet
from mmdense.models.backbones._densenet_shared import can_share

SMALL = dict(growth_rate=8, layers=(2, 3, 2))


def same_as(theirs, ours, forward, *, size, train):
    """Compare outputs, gradients and running statistics of one pass, in float64."""
    ours.load_state_dict(theirs.state_dict())
    x = image(*size, batch=2).double()
    results = [
        step(net.double().train(train), x, forward=run)[0]
        for net, run in ((ours, ours), (theirs, forward))
    ]
    same_step(*results)


def timm_outputs(net):
    return lambda x: net.forward_intermediates(x, indices=(1, 2, 3, 4), intermediates_only=True)


def test_equals_timm():
    """test_classifiers.py compares the logits of all archs."""
    torch.manual_seed(0)
    theirs = randomise(timm.create_model('densenet121', num_classes=0))
    same_as(theirs, DenseNet(arch='121'), timm_outputs(theirs), size=(64, 64), train=True)


def test_deep_stem_equals_timm():
    torch.manual_seed(0)
    options = dict(growth_rate=8, block_config=(2, 3, 2, 2), stem_type='deep', num_classes=0)
    theirs = randomise(timm.models.densenet.DenseNet(**options))
    ours = DenseNet(arch=dict(growth_rate=8, layers=(2, 3, 2, 2), stem='deep'))
    same_as(theirs, ours, timm_outputs(theirs), size=(45, 70), train=False)


def test_activated_feature_maps_equal_torchvision():
    """In torchvision's network a block is followed by its transition's norm and ReLU."""
    torch.manual_seed(0)
    theirs = randomise(torchvision.models.densenet121(num_classes=1))
    theirs.classifier = nn.Identity()

    def forward(x):
        outputs = []
        for name, module in theirs.features.named_children():
            if name.startswith('transition'):
                outputs.append(module.relu(module.norm(x)))
                x = module.pool(module.conv(outputs[-1]))
            else:
                x = module(x)
        return [*outputs, F.relu(x)]

    ours = DenseNet(arch='121', tap='activated')
    same_as(theirs, ours, forward, size=(47, 65), train=True)


def test_activated_feature_maps_are_after_the_norm():
    net = randomise(DenseNet(arch=SMALL, tap='activated', out_indices=(0, 1))).eval()
    raw = DenseNet(arch=SMALL, out_indices=(0, 1)).eval()
    unused = raw.load_state_dict(net.state_dict(), strict=False).unexpected_keys
    x = image(32, 32)
    for block, (y, expected) in enumerate(zip(run(net, x), run(raw, x), strict=True), 1):
        expected = F.relu(net.features[f'transition{block}']['norm'](expected))
        torch.testing.assert_close(y, expected)
    assert {name.rpartition('.')[0] for name in unused} == {'features.transition2.norm'}
    assert 'denseblock3' not in net.features


CIFAR = dict(stem='cifar')
PLAIN = dict(**CIFAR, stem_channels=16, bottleneck=False, reduction=1.0)


@pytest.mark.parametrize(
    ('depth', 'growth_rate', 'bottleneck', 'millions'),
    [
        (40, 12, False, '1.0'),
        (100, 24, False, '27.2'),
        (100, 12, True, '0.8'),
        (190, 40, True, '25.6'),
        (40, 60, True, '4.3'),
    ],
)
def test_cifar_shapes_have_the_published_size(depth, growth_rate, bottleneck, millions):
    """Three blocks; depth counts the convolutions and the classifier of ten classes."""
    layers = (depth - 4) // (6 if bottleneck else 3)
    arch = dict(growth_rate=growth_rate, layers=(layers,) * 3, **(CIFAR if bottleneck else PLAIN))
    with torch.device('meta'):
        net = DenseNet(arch=arch)
    classifier = 10 * (net.out_channels[-1] + 1)
    assert net.out_strides == (1, 2, 4)
    total = sum(p.numel() for p in net.parameters()) + classifier
    assert f'{total / 1e6:.1f}' == millions


def test_options_change_the_architecture():
    with torch.device('meta'):
        net = DenseNet(arch=SMALL, growth_rate=4, bottleneck=False, reduction=0.25, stem='deep')
    assert net.out_channels == (8 + 8, 4 + 12, 4 + 8)
    assert list(net.features)[:3] == ['conv0', 'norm0', 'relu0']
    assert net.features['conv2'].out_channels == 8
    assert net.features['denseblock1'][0].conv1.kernel_size == (3, 3)
    assert not hasattr(net.features['denseblock1'][0], 'conv2')


def test_norm_cfg():
    net = DenseNet(arch=SMALL, norm_cfg=dict(type='SyncBN', eps=1e-3, requires_grad=False))
    norms = [m for m in net.modules() if isinstance(m, nn.SyncBatchNorm)]
    assert len(norms) == 1 + 2 * 7 + 2 + 1
    assert all(m.eps == 1e-3 and not m.weight.requires_grad for m in norms)


@pytest.mark.parametrize(
    'options',
    [
        dict(bottleneck=False),
        dict(bottleneck=False, drop_rate=0.3),
        dict(tap='activated'),
        dict(tap='activated', out_indices=(0, 2)),
        dict(out_indices=(1,)),
        dict(stem='deep', drop_rate=0.3),
        dict(stem='cifar', frozen_stages=0),
        dict(norm_cfg=dict(type='BN', momentum=None, affine=False)),
        dict(norm_cfg=dict(type='BN', track_running_stats=False), norm_eval=True),
        dict(norm_cfg=dict(type='BN', requires_grad=False)),
        dict(one_norm='norm1'),
        dict(one_norm='norm2'),
        dict(one_momentum='norm2'),
    ],
)
def test_lean_blocks_equal_plain_ones(options):
    """Also with a single norm in evaluation: the others of its block share statistics."""
    options = dict(options)
    one_norm, one_momentum = options.pop('one_norm', None), options.pop('one_momentum', None)
    results = []
    for memory in ('plain', 'lean'):
        torch.manual_seed(0)
        net = randomise(DenseNet(arch=SMALL, memory=memory, **options)).double().train()
        if one_norm:
            net.features['denseblock2'][1].get_submodule(one_norm).eval()
        if one_momentum:
            net.features['denseblock2'][1].get_submodule(one_momentum).momentum = 0.5
        results.append(step(net, image(32, 48, batch=2).double())[0])
    same_step(*reversed(results))


@pytest.mark.parametrize('options', [{}, dict(norm_cfg=dict(type='BN', affine=False))])
def test_what_lean_blocks_call_on_a_gpu_is_equal(options, monkeypatch):
    """A CPU calls the same, but for the operator that only CUDA has."""

    def elemt(x, weight, bias, mean, inverse, eps):
        return torch.batch_norm(x, weight, bias, mean, inverse.pow(-2), False, 0.0, 0.0, False)

    results, x = [], image(32, 48, batch=2).double().to(memory_format=torch.channels_last)
    for memory in ('plain', 'lean'):
        torch.manual_seed(0)
        net = randomise(DenseNet(arch=SMALL, memory=memory, **options)).double().train()
        if memory == 'lean':
            monkeypatch.setattr(torch.Tensor, 'is_cuda', True, raising=False)
            if DEVICE == 'cpu':
                monkeypatch.setattr(torch, 'batch_norm_elemt', elemt)
        results.append(step(net.to(memory_format=torch.channels_last), x)[0])
    same_step(*reversed(results))


def test_lean_blocks_save_memory_that_is_linear_in_their_depth():
    """They save the features once, and the output of each 1x1 convolution."""
    growth, layers = 8, 6
    net = DenseNet(arch=dict(growth_rate=growth, layers=(layers,)), memory='lean')
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.shape
        return tensor

    x = torch.randn(2, 2 * growth, 8, 8)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        net.features['denseblock1'](x)
    shapes = sorted(shape[1] for shape in saved.values() if shape[2:] == (8, 8))
    assert shapes == sorted([2 * growth + layers * growth, *[4 * growth] * layers])


def test_lean_blocks_with_other_norms_are_plain():
    class Scaled(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    results = []
    for memory in ('plain', 'lean'):
        torch.manual_seed(0)
        net = DenseNet(arch=SMALL, memory=memory)
        net.features['denseblock1'][0].norm1 = Scaled(16)
        net.features['denseblock2'][1].norm2.eps = 0.1
        results.append(step(net.double(), image(32, 32, batch=2).double())[0])
    same_step(*reversed(results))


def test_lean_blocks_need_batch_norms():
    with pytest.raises(ValueError, match="memory='lean' needs batch norms"):
        DenseNet(arch=SMALL, memory='lean', norm_cfg=dict(type='GN', num_groups=4))


@pytest.mark.slow
def test_compiled_recomputing_counts_each_batch_once():
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        net = randomise(DenseNet(arch=SMALL, with_cp=True))
        run = torch.compile(net, backend='aot_eager') if compiled else net
        sum(m.mean() for m in run(torch.ones(2, 3, 32, 32).cumsum(2).to(DEVICE))).backward()
        results.append(list(net.buffers()))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled)


def share(net):
    """Let a compiled network share statistics, as ``compile()`` does on CUDA."""
    for module in net.modules():
        if hasattr(module, 'may_share'):
            module.may_share = True
    return net


def compiled_steps(net, *sizes, shared=True, amp=None):
    """Return the results of compiled training steps."""
    torch._dynamo.reset()
    graphs = CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(share(net) if shared else net, fullgraph=True, backend=graphs)
    results = []
    for size in sizes:
        net.zero_grad()
        x = image(*size, batch=2).to(next(net.parameters()))
        result, _ = step(net, x, forward=lambda x: compiled(x), amp=amp)
        results.append({k: None if v is None else v.clone() for k, v in result.items()})
    assert graphs.frame_count == min(len(sizes), 2)  # static, then dynamic
    return results


SHARED = [
    {},
    dict(tap='activated', frozen_stages=1),
    dict(norm_cfg=dict(type='BN', eps=1e-3, momentum=0.3)),
    dict(norm_cfg=dict(type='SyncBN', requires_grad=False), memory='lean'),
    dict(norm_cfg=dict(type='BN', track_running_stats=False), stem='deep'),
]


@pytest.mark.parametrize('options', [*SHARED, dict(norm_cfg=dict(type='BN', momentum=None))])
def test_shared_statistics_change_nothing(options, monkeypatch):
    results = []
    for shared in (False, True):
        torch.manual_seed(0)
        net = randomise(DenseNet(arch=SMALL, **{**options, 'memory': 'plain'}), signed=True)
        net = share(net) if shared else net
        with monkeypatch.context() as patch:
            patch.setattr(torch.compiler, 'is_compiling', lambda shared=shared: shared)
            results.append(step(net.double().train(), image(32, 48, batch=2).double()))
    (plain, plain_bytes), (result, saved) = results
    same_step(result, plain)
    assert saved < plain_bytes


@pytest.mark.slow
@pytest.mark.parametrize('options', SHARED)
def test_compiled_shared_statistics_change_nothing(options):
    """Compiled for the first image size, then for any."""
    torch.manual_seed(0)
    net = DenseNet(arch=dict(growth_rate=8, layers=(1, 2)), **options)
    net = randomise(net, signed=True).double().train()
    plain, sizes = copy.deepcopy(net), ((32, 48), (48, 64))
    results = compiled_steps(net, *sizes)
    for result, size in zip(results, sizes, strict=True):
        plain.zero_grad()
        same_step(result, step(plain, image(*size, batch=2).double())[0])


@pytest.mark.slow
@pytest.mark.parametrize('amp', [torch.bfloat16, torch.float16, None])
def test_shared_statistics_under_autocast(amp):
    net = randomise(DenseNet(arch=dict(growth_rate=8, layers=(6, 6, 6))))
    exact, _ = step(copy.deepcopy(net).double(), image(64, 96, batch=2).double())
    errors = []
    for shared in (False, True):
        (result,) = compiled_steps(copy.deepcopy(net), (64, 96), shared=shared, amp=amp)
        assert all(result[name].dtype == p.dtype for name, p in net.named_parameters())
        errors.append(median_error(result, exact, 1e-4))
    assert 0 < errors[1] < 1.5 * errors[0]


@pytest.mark.slow
@pytest.mark.parametrize(
    'options',
    [
        dict(bottleneck=False),
        dict(drop_rate=0.3),
        dict(norm_eval=True),
        dict(norm_cfg=dict(type='BN', affine=False)),
        dict(norm_cfg=dict(type='GN', num_groups=4)),
    ],
)
def test_other_blocks_do_not_share(options, monkeypatch):
    monkeypatch.setattr(densenet, 'shared_block', None)
    net = DenseNet(arch=SMALL, **options).to(DEVICE).train()
    compiled_steps(net, (32, 48))


def test_blocks_share_no_statistics_across_processes():
    dist.init_process_group('fake', rank=0, world_size=2, store=FakeStore())
    try:
        for norm, shared in (('SyncBN', False), ('BN', True)):
            block = DenseNet(arch=SMALL, norm_cfg=dict(type=norm)).features['denseblock1']
            assert can_share(block, torch.ones(2, 16, 8, 8)) == shared
    finally:
        dist.destroy_process_group()


def test_only_a_gpu_compiles_for_shared_statistics(monkeypatch):
    calls = []
    monkeypatch.setattr(torch, 'compile', lambda forward, **options: calls.append(options))
    for on_gpu, options in ((False, {}), (True, {}), (True, dict(mode='max-autotune'))):
        net = DenseNet(arch=SMALL)
        monkeypatch.setattr(torch.nn.Parameter, 'is_cuda', on_gpu, raising=False)
        net.compile(**options)
        assert net.features['denseblock1'].may_share == (calls[-1].keys() == {'options'})
    assert [{*options} for options in calls] == [set(), {'options'}, {'mode'}]


def train_one_of_two(rank, store):
    """Compare shared statistics with plain blocks, both in DistributedDataParallel."""
    dist.init_process_group('gloo', f'file://{store}', world_size=2, rank=rank)
    eager = functools.partial(torch.compile, backend='aot_eager')
    results = []
    for shared in (False, True):
        torch.manual_seed(0)
        net = randomise(DenseNet(arch=SMALL), signed=True).double().train()
        with (
            mock.patch.object(nn.Parameter, 'is_cuda', shared, create=True),
            mock.patch.object(torch, 'compile', lambda call, **options: eager(call)),
        ):
            net.compile()
        assert net.features['denseblock1'].may_share == shared
        both = nn.parallel.DistributedDataParallel(net)
        results.append(step(both, image(32, 48, batch=2, seed=rank).double()))
    (plain, _), (result, _) = results
    same_step(result, plain)
    dist.destroy_process_group()


@pytest.mark.slow
def test_shared_statistics_change_nothing_in_two_processes(tmp_path):
    torch.multiprocessing.spawn(train_one_of_two, (tmp_path / 'store',), nprocs=2)


def test_dropout_follows_every_convolution_but_the_first():
    net = DenseNet(arch=dict(growth_rate=32, layers=(1, 1)), drop_rate=0.5)
    zeros = {}

    def record(name):
        def hook(module, inputs, output):
            zeros[name] = (output == 0).float().mean().item()

        return hook

    for block in ('denseblock1', 'denseblock2'):
        layer = net.features[block][0]
        layer.drop.register_forward_hook(record(f'{block} 1x1'))
        layer.register_forward_hook(record(f'{block} 3x3'))
    net.features['transition1']['drop'].register_forward_hook(record('transition'))
    net.features['conv0'].register_forward_hook(record('stem'))
    run(net, torch.randn(2, 3, 64, 64))
    assert zeros.pop('stem') == 0
    assert len(zeros) == 5
    for name, share in zeros.items():
        assert share == pytest.approx(0.5, abs=0.03), name


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(tap='pooled'), "tap is 'pooled'"),
        (dict(stem='vgg'), "stem is 'vgg'"),
        (dict(drop_rate=1.0), 'drop_rate is 1.0'),
        (dict(growth_rate=0), 'must be positive'),
        (dict(reduction=0.0), 'reduction must'),
        (dict(reduction=1.5), 'reduction must'),
        (dict(arch=dict(growth_rate=8, layers=())), 'must be positive'),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(ValueError, match=message):
        DenseNet(**{'arch': SMALL, **options})
