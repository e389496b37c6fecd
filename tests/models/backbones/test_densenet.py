"""DenseNet equals timm's and torchvision's, and what is peculiar to it."""

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from mmdense.models import DenseNet

SMALL = dict(growth_rate=8, layers=(2, 3, 2))
REFERENCES = {
    '121': dict(timm='densenet121'),
    '161': dict(timm='densenet161'),
    '169': dict(timm='densenet169'),
    '201': dict(timm='densenet201'),
    '264': dict(growth_rate=32, block_config=(6, 12, 64, 48)),
    '232-k48': dict(growth_rate=48, block_config=(6, 12, 48, 48)),
    '264-k48': dict(growth_rate=48, block_config=(6, 12, 64, 48)),
}


def randomised(net):
    """Give norms scales, shifts and statistics that show in the outputs."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, tensor in [*net.named_parameters(), *net.named_buffers()]:
            if tensor.ndim == 1:
                shift = -0.5 if name.endswith(('bias', 'mean')) else 0.5
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + shift)
    return net


def body(net):
    return {k: v for k, v in net.state_dict().items() if not k.startswith('classifier.')}


def compare(ours, theirs, run, *, size=(64, 96), train=False):
    """Compare maps, gradients and running statistics of one pass."""
    ours.train(train)
    theirs.train(train)
    results = []
    for net, forward in ((ours, ours), (theirs, run)):
        image = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(3))
        image.requires_grad_()
        maps = forward(image)
        generator = torch.Generator().manual_seed(4)
        sum((m * torch.randn(m.shape, generator=generator)).mean() for m in maps).backward()
        grads = {n: p.grad for n, p in net.named_parameters() if 'classifier' not in n}
        results.append(
            dict(enumerate(maps)) | grads | {'image': image.grad} | dict(net.named_buffers())
        )
    assert list(results[0]) == list(results[1])
    for name, expected in results[1].items():
        difference = (results[0][name] - expected).abs().max()
        assert difference <= 1e-5 * expected.abs().max(), name


def timm_twin(options, stem=''):
    torch.manual_seed(0)
    if 'timm' in options:
        return randomised(timm.create_model(options['timm'], num_classes=0))
    return randomised(timm.models.densenet.DenseNet(num_classes=0, stem_type=stem, **options))


def timm_maps(net):
    return lambda x: net.forward_intermediates(x, indices=(1, 2, 3, 4), intermediates_only=True)


@pytest.mark.parametrize('arch', REFERENCES)
@pytest.mark.parametrize('train', [False, True], ids=['eval', 'train'])
def test_equals_timm(arch, train):
    theirs = timm_twin(REFERENCES[arch])
    ours = DenseNet(arch=arch)
    ours.load_state_dict(body(theirs))
    compare(ours, theirs, timm_maps(theirs), train=train, size=(64, 64))


def test_deep_stem_equals_timm():
    options = dict(growth_rate=8, block_config=(2, 3, 2, 2))
    theirs = timm_twin(options, stem='deep')
    ours = DenseNet(arch=dict(growth_rate=8, layers=(2, 3, 2, 2), stem='deep'))
    ours.load_state_dict(body(theirs))
    compare(ours, theirs, timm_maps(theirs), size=(45, 70))


@pytest.mark.parametrize('train', [False, True], ids=['eval', 'train'])
def test_activated_maps_equal_torchvision(train):
    """What follows a block in torchvision's network is its transition's norm and ReLU."""
    torch.manual_seed(0)
    theirs = randomised(torchvision.models.densenet121(num_classes=1))
    ours = DenseNet(arch='121', tap='activated')
    ours.load_state_dict(body(theirs))

    def run(x):
        maps = []
        for name, module in theirs.features.named_children():
            if name.startswith('transition'):
                maps.append(module.relu(module.norm(x)))
                x = module.pool(module.conv(maps[-1]))
            else:
                x = module(x)
        return [*maps, F.relu(x)]

    compare(ours, theirs, run, train=train, size=(47, 65))


@pytest.mark.parametrize('tap', ['block', 'activated'])
def test_taps_are_before_and_behind_the_norm(tap):
    net = randomised(DenseNet(arch=SMALL, tap=tap, out_indices=(0, 1))).eval()
    raw = DenseNet(arch=SMALL, out_indices=(0, 1)).eval()
    left = raw.load_state_dict(net.state_dict(), strict=False).unexpected_keys
    image = torch.randn(1, 3, 32, 32)
    for block, (m, x) in enumerate(zip(net(image), raw(image), strict=True), 1):
        if tap == 'activated':
            x = F.relu(net.features[f'transition{block}']['norm'](x))
        torch.testing.assert_close(m, x)
    assert {name.rpartition('.')[0] for name in left} == (
        {'features.transition2.norm'} if tap == 'activated' else set()
    )
    assert 'denseblock3' not in net.features


CIFAR = dict(stem='cifar')
PLAIN = dict(**CIFAR, stem_channels=16, bottleneck=False, reduction=1.0)


@pytest.mark.parametrize(
    ('depth', 'growth_rate', 'bottleneck', 'millions'),
    [
        (40, 12, False, '1.0'),
        (100, 12, False, '7.0'),
        (100, 24, False, '27.2'),
        (100, 12, True, '0.8'),
        (250, 24, True, '15.3'),
        (190, 40, True, '25.6'),
        (40, 36, True, '1.5'),
        (40, 48, True, '2.7'),
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
    ],
)
def test_lean_blocks_equal_plain_ones(options):
    """One norm alone in evaluation, too: the others of its block share statistics without it."""
    options = dict(options)
    one_norm = options.pop('one_norm', None)
    found = []
    for memory in ('plain', 'lean'):
        torch.manual_seed(0)
        net = randomised(DenseNet(arch=SMALL, memory=memory, **options)).double().train()
        if one_norm:
            net.features['denseblock2'][1].get_submodule(one_norm).eval()
        x = torch.randn(2, 3, 32, 48, dtype=torch.float64, requires_grad=True)
        maps = net(x)
        sum((m * torch.randn_like(m)).sum() for m in maps).backward()
        grads = [p.grad for p in net.parameters()]
        found.append([*(m.detach() for m in maps), x.grad, *grads, *net.buffers()])
    for plain, lean in zip(*found, strict=True):
        if plain is None:
            assert lean is None
        else:
            torch.testing.assert_close(lean, plain, rtol=1e-9, atol=1e-9)


def test_lean_blocks_keep_what_is_linear_in_their_depth():
    """The features, once, and what each 1x1 convolution puts out."""
    growth, layers = 8, 6
    net = DenseNet(arch=dict(growth_rate=growth, layers=(layers,)), memory='lean')
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.shape
        return tensor

    x = torch.randn(2, 2 * growth, 8, 8)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        net.features['denseblock1'](x)
    shapes = sorted(shape[1] for shape in kept.values() if shape[2:] == (8, 8))
    assert shapes == sorted([2 * growth + layers * growth, *[4 * growth] * layers])


def test_lean_blocks_with_norms_of_others_are_plain():
    class Scaled(nn.BatchNorm2d):
        def forward(self, x):
            return 2 * super().forward(x)

    found = []
    for memory in ('plain', 'lean'):
        torch.manual_seed(0)
        net = DenseNet(arch=SMALL, memory=memory)
        net.features['denseblock1'][0].norm1 = Scaled(16)
        net.features['denseblock2'][1].norm2.eps = 0.1
        sum(m.square().mean() for m in net(torch.randn(2, 3, 32, 32))).backward()
        found.append([p.grad for p in net.parameters()] + list(net.buffers()))
    for plain, lean in zip(*found, strict=True):
        torch.testing.assert_close(lean, plain, rtol=1e-3, atol=1e-5)


def test_lean_blocks_need_batch_norms():
    with pytest.raises(ValueError, match="memory='lean' needs batch norms"):
        DenseNet(arch=SMALL, memory='lean', norm_cfg=dict(type='GN', num_groups=4))


@pytest.mark.parametrize('options', [{}, dict(tap='activated'), dict(drop_rate=0.3)])
def test_recomputing_counts_each_batch_once(options):
    """Bit for bit on a CPU, where torchvision's memory_efficient counts twice."""
    results = []
    for memory in ('plain', 'recompute'):
        torch.manual_seed(0)
        net = randomised(DenseNet(arch=SMALL, memory=memory, **options))
        for i in range(2):
            torch.manual_seed(i)
            sum(m.square().mean() for m in net(torch.randn(2, 3, 32, 32))).backward()
        results.append([p.grad for p in net.parameters()] + list(net.buffers()))
        assert net.features['denseblock1'][1].norm1.num_batches_tracked == 2
    for plain, recomputed in zip(*results, strict=True):
        assert torch.equal(plain, recomputed)


@pytest.mark.slow
def test_compiled_recomputing_counts_each_batch_once():
    results = []
    for compiled in (False, True):
        torch.manual_seed(0)
        net = randomised(DenseNet(arch=SMALL, with_cp=True))
        run = torch.compile(net, backend='aot_eager') if compiled else net
        sum(m.mean() for m in run(torch.ones(2, 3, 32, 32).cumsum(2))).backward()
        results.append(list(net.buffers()))
    for eager, compiled in zip(*results, strict=True):
        torch.testing.assert_close(eager, compiled)


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
    net(torch.randn(2, 3, 64, 64))
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
