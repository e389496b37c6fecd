"""RDNet equals timm's, and what is peculiar to it."""

import pytest
import timm
import torch

from mmdense.models import RDNet

TINY = dict(stem=16, growth=(8, 16, 8), down=(1, 2), blocks=2, gate_from=1)


def timm_twin(name='rdnet_tiny', **options):
    """Build timm's network with scales that let every branch show in the outputs."""
    torch.manual_seed(0)
    net = timm.create_model(name, num_classes=0, global_pool='', **options)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.ndim == 1:
                parameter.uniform_(0.5, 1.5)
    return net


def body(net):
    return {k: v for k, v in net.state_dict().items() if not k.startswith('head.')}


@pytest.fixture(scope='module')
def pair():
    theirs = timm_twin()
    ours = RDNet(arch='tiny')
    ours.load_state_dict(body(theirs))
    return ours, theirs


@pytest.mark.parametrize('size', [(64, 64), (45, 70), (32, 97)])
def test_equals_timm(pair, size):
    grads = []
    x = torch.randn(1, 3, *size, generator=torch.Generator().manual_seed(3))
    outputs = []
    runs = (pair[0], lambda t: pair[1].forward_intermediates(t, intermediates_only=True))
    for net, run in zip(pair, runs, strict=True):
        net.zero_grad()
        image = x.clone().requires_grad_()
        maps = run(image)
        outputs.append([m.detach() for m in maps])
        generator = torch.Generator().manual_seed(4)
        sum((m * torch.randn(m.shape, generator=generator)).mean() for m in maps).backward()
        named = {n: p.grad for n, p in net.named_parameters() if not n.startswith('head.')}
        grads.append(dict(named, image=image.grad))
    for a, b in zip(*outputs, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()
    assert list(grads[0]) == list(grads[1])
    for name, expected in grads[1].items():
        difference = (grads[0][name] - expected).abs().max()
        assert difference <= 1e-5 * expected.abs().max(), name


@pytest.mark.parametrize(
    ('arch', 'channels', 'millions'),
    [
        ('tiny', (256, 440, 744, 1040), 22.82),
        ('small', (264, 512, 760, 1264), 49.17),
        ('base', (408, 584, 1000, 1760), 85.69),
        ('large', (528, 840, 1528, 2000), 184.26),
    ],
)
def test_sizes_equal_timm(arch, channels, millions):
    with torch.device('meta'):
        ours = RDNet(arch=arch)
        theirs = timm.create_model(f'rdnet_{arch}', num_classes=0, global_pool='')
    assert ours.out_channels == channels
    expected = {k: v.shape for k, v in body(theirs).items()}
    assert {k: v.shape for k, v in ours.state_dict().items()} == expected
    assert round(sum(p.numel() for p in ours.parameters()) / 1e6, 2) == millions


def test_drop_path_rates_equal_timm():
    rates = [
        m.drop_prob for m in timm_twin(drop_path_rate=0.3).modules() if hasattr(m, 'drop_prob')
    ]
    ours = [m.drop_prob for m in RDNet(drop_path_rate=0.3).modules() if hasattr(m, 'drop_prob')]
    assert ours == pytest.approx(rates)
    assert ours[0] == 0
    assert ours[-1] == pytest.approx(0.3)


def test_initial_scale_equals_timm():
    torch.manual_seed(0)
    theirs = timm.create_model('rdnet_tiny').state_dict()
    for name, value in RDNet().state_dict().items():
        if value.ndim == 1 and not name.endswith('bias'):
            assert torch.equal(value, theirs[name]), name
        elif value.ndim > 1 and value.numel() > 10_000:
            assert value.std().item() == pytest.approx(theirs[name].std().item(), rel=0.1), name


def test_output_norm_is_one_group_norm_per_map():
    x = torch.randn(2, 3, 64, 64)
    plain = RDNet(arch=TINY, out_indices=(0, 2)).eval()
    normed = RDNet(arch=TINY, out_indices=(0, 2), output_norm=True).eval()
    keys = normed.load_state_dict(plain.state_dict(), strict=False).missing_keys
    assert keys == [f'output_norms.{i}.{k}' for i in (0, 2) for k in ('weight', 'bias')]
    for raw, m in zip(plain(x), normed(x), strict=True):
        expected = (raw - raw.mean((1, 2, 3), keepdim=True)) / (
            raw.var((1, 2, 3), keepdim=True, unbiased=False) + 1e-5
        ).sqrt()
        torch.testing.assert_close(m, expected, rtol=1e-4, atol=1e-5)
    depth, number = normed.layer_depth('output_norms.2.weight')
    assert depth == number - 1


def test_layer_depth_counts_dense_stages():
    net = RDNet(arch='tiny')
    assert net.layer_depth('stem.0.weight') == (0, 9)
    assert net.layer_depth('dense_stages.0.0.dense_block1.gamma') == (1, 9)
    assert net.layer_depth('dense_stages.6.0.weight') == (7, 9)
    assert net.layer_depth('dense_stages.0.0.dense_block1.gamma', 'layer') == (2, 23)
    assert net.layer_depth('dense_stages.6.0.weight', 'layer') == (19, 23)
    assert net.layer_depth('dense_stages.6.2.dense_block2.gamma', 'layer') == (21, 23)


def test_arch_fields_show():
    net = RDNet(arch=TINY, out_indices=(0, 1, 2))
    assert net.out_channels == (32, 48, 40)
    assert net.stem[0].out_channels == 16
    gates = [n for n, _ in net.named_parameters() if n.endswith('.5.fc.weight')]
    assert len(gates) == 4  # two blocks in each of the stages from 1 on
    assert len(net.dense_stages[0][0]) == 2
    scaled = RDNet(arch=dict(TINY, layer_scale=0.5), out_indices=(0,))
    assert scaled.dense_stages[0][0].dense_block0.gamma.tolist() == [0.5] * 8


def test_features_stay_narrow_under_autocast():
    net = RDNet(arch=TINY, out_indices=(0, 1, 2))
    with torch.autocast('cpu', torch.bfloat16):
        maps = net(torch.randn(1, 3, 32, 32))
    assert [m.dtype for m in maps] == [torch.bfloat16] * 3
    sum(m.sum() for m in maps).backward()
    assert all(p.grad.dtype == torch.float32 for p in net.parameters())


def test_lean_makes_hidden_maps_again_where_there_are_few_channels(monkeypatch):
    grads, kept = [], []
    for memory, below in (('plain', 0), ('lean', 0), ('lean', 1000)):
        monkeypatch.setattr('mmdense.models.backbones.rdnet.REMAKE_BELOW', below)
        torch.manual_seed(0)
        net = RDNet(arch={**TINY, 'layer_scale': 1.0}, memory=memory).double()
        widths = []

        def pack(tensor, widths=widths):
            if tensor.shape[2:] == (8, 8):
                widths.append(tensor.shape[1])
            return tensor

        x = torch.ones(2, 3, 32, 32, dtype=torch.float64).cumsum(3).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            maps = net(x)
        sum(m.square().mean() for m in maps).backward()
        grads.append([x.grad, *(p.grad for p in net.parameters())])
        kept.append(widths.count(4 * TINY['stem']))  # of the first block's hidden map
    assert kept[0] > kept[1] > kept[2] == 0
    for found in grads[1:]:
        for expected, grad in zip(grads[0], found, strict=True):
            torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(growth=()), 'positive'),
        (dict(stem=0), 'positive'),
        (dict(stem=4, growth=(4, 8, 8)), 'fewer than 16 channels'),
        (dict(down=(2, 1)), 'down must increase'),
        (dict(down=(0, 1)), 'down must increase'),
        (dict(down=(1, 3)), 'down must increase'),
    ],
)
def test_impossible_arch(change, message):
    with pytest.raises(ValueError, match=message):
        RDNet(arch={**TINY, **change}, out_indices=(0,))
