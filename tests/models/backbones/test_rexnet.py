"""ReXNet equals timm's, and what is peculiar to it."""

import pytest
import timm
import torch
from timm.models.rexnet import RexNet
from torch import nn

from mmdense.models.backbones.rexnet import ReXNet

TINY = dict(width=0.25, depth=0.2)
# Of timm's blocks: after the last and after the first of each stride.
STAGES, UNET = (0, 2, 4, 10, 15), (0, 1, 3, 5, 11, 16)


def noisy(net):
    """Give norms and biases sizes that let every branch show in the outputs."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if value.ndim == 1:  # not the norms' counters
                low = -0.5 if name.endswith(('bias', 'mean')) else 0.5
                value.copy_(torch.rand(value.shape, generator=generator) + low)
    return net


def timm_twin(width='1.0', **options):
    torch.manual_seed(0)
    name = f'rexnet_{width.replace(".", "")}0'
    return noisy(timm.create_model(name, num_classes=0, global_pool='', **options))


def their_maps(net, x, taps):
    x, maps = net.stem(x), []
    for i, block in enumerate(net.features):
        x = block(x)
        if i in taps:
            maps.append(x)
    return maps


def step(net, run, size, batch=2):
    """Return maps, gradients and running statistics of a training step."""
    x = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(3)).requires_grad_()
    maps = run(x)
    generator = torch.Generator().manual_seed(4)
    sum((m * torch.randn(m.shape, generator=generator)).mean() for m in maps).backward()
    grads = {n: p.grad for n, p in net.named_parameters()}
    return [m.detach() for m in maps], dict(grads, image=x.grad), dict(net.named_buffers())


def assert_near(a, b, name=''):
    assert a.shape == b.shape
    assert (a - b).abs().max() <= 1e-5 * b.abs().max(), name


@pytest.mark.parametrize(
    ('width', 'taps', 'size', 'training'),
    [
        ('1.0', 'stages', (64, 64), True),
        ('1.0', 'stages', (45, 70), False),
        ('1.0', 'unet', (33, 64), True),
        ('1.3', 'stages', (32, 64), True),
        ('1.5', 'stages', (32, 32), True),
        ('2.0', 'stages', (32, 32), True),
        ('3.0', 'unet', (32, 32), True),
    ],
)
def test_equals_timm(width, taps, size, training):
    theirs = timm_twin(width).train(training)
    ours = ReXNet(arch=width, taps=taps, out_indices=range(5 + (taps == 'unet'))).train(training)
    behind = ours.load_state_dict(theirs.state_dict(), strict=False).unexpected_keys
    assert all(key.startswith('features.16.') for key in behind)
    assert bool(behind) == (taps == 'stages')
    tapped = STAGES if taps == 'stages' else UNET
    found = step(ours, ours, size)
    expected = step(theirs, lambda x: their_maps(theirs, x, tapped), size)
    for a, b in zip(found[0], expected[0], strict=True):
        assert_near(a, b)
    for ours_of, theirs_of in zip(found[1:], expected[1:], strict=True):
        for name, value in ours_of.items():
            assert_near(value, theirs_of[name], name)


@pytest.mark.parametrize(
    ('width', 'channels', 'millions'),
    [
        ('1.0', (16, 38, 61, 128, 185), 4.80),
        ('1.3', (21, 50, 79, 167, 240), 7.56),
        ('1.5', (24, 58, 92, 193, 277), 9.73),
        ('2.0', (32, 77, 122, 257, 370), 16.37),
        ('3.0', (48, 116, 183, 386, 554), 34.71),
    ],
)
def test_sizes_equal_timm(width, channels, millions):
    with torch.device('meta'):
        ours = ReXNet(arch=width, taps='unet')
        stages = ReXNet(arch=width, out_indices=range(5))
        theirs = timm.create_model(f'rexnet_{width.replace(".", "")}0')
    assert stages.out_channels == channels
    assert stages.out_strides == (2, 4, 8, 16, 32)
    body = {k: v.shape for k, v in theirs.state_dict().items() if not k.startswith('head.')}
    assert {k: v.shape for k, v in ours.state_dict().items()} == body
    assert round(sum(p.numel() for p in theirs.parameters()) / 1e6, 2) == millions


@pytest.mark.parametrize('width', [0.3, 0.6, 0.9, 1.0, 1.75, 2.2])
@pytest.mark.parametrize('depth', [0.2, 0.5, 1.0, 1.3, 1.5, 2.0])
def test_other_sizes_equal_timm(width, depth):
    with torch.device('meta'):
        ours = ReXNet(arch=dict(width=width, depth=depth), taps='unet')
        theirs = RexNet(width_mult=width, depth_mult=depth, num_classes=0)
    expected = {k: v.shape for k, v in theirs.state_dict().items()}
    assert {k: v.shape for k, v in ours.state_dict().items()} == expected


def test_arch_fields_show():
    first = ReXNet(arch=dict(TINY, first=8, growth=24), out_indices=(0, 4))
    assert first.out_channels == (8, 13)
    assert len(ReXNet(arch=TINY).features) == 6
    assert len(ReXNet(arch=dict(TINY, depth=0.4)).features) == 9


def test_taps():
    stages = ReXNet()  # what detectors read
    assert stages.out_channels == (38, 61, 128, 185)
    assert stages.out_strides == (4, 8, 16, 32)
    last = ReXNet(out_indices=(3, 5))  # what SSDLite reads
    assert last.out_channels == (128, 1280)
    assert last.out_strides == (16, 32)
    unet = ReXNet(taps='unet')
    assert unet.out_channels == (16, 27, 50, 72, 140, 1280)
    assert unet.out_strides == (2, 4, 8, 16, 32, 32)
    tiny = ReXNet(arch=dict(TINY, depth=0.4), taps='unet').eval()
    maps = tiny(torch.zeros(1, 3, 33, 70))
    assert tuple(m.shape[1] for m in maps) == tiny.out_channels
    sizes = [(17, 35), (9, 18), (5, 9), (3, 5), (2, 3), (2, 3)]
    assert [tuple(m.shape[2:]) for m in maps] == sizes


@pytest.mark.parametrize('taps', ['stages', 'unet'])
def test_what_no_map_needs_is_not_built(taps):
    ends = STAGES if taps == 'stages' else UNET
    full = ReXNet(taps=taps)
    assert len(full.features) == ends[-1] + 1
    for index, end in enumerate(ends):
        with torch.device('meta'):
            net = ReXNet(taps=taps, out_indices=(index,))
        assert len(net.features) == end + 1
        for granularity in ('stage', 'layer'):
            for name, _ in net.named_parameters():
                assert net.layer_depth(name, granularity) == full.layer_depth(name, granularity)


def test_layer_depth():
    net = ReXNet()
    assert net.layer_depth('stem.conv.weight') == (0, 7)
    assert net.layer_depth('features.0.conv_dw.conv.weight') == (1, 7)
    assert net.layer_depth('features.2.conv_pwl.bn.bias') == (2, 7)
    assert net.layer_depth('features.15.se.fc1.bias') == (5, 7)
    assert net.layer_depth('features.15.se.fc1.bias', 'layer') == (16, 18)
    unet = ReXNet(taps='unet')
    assert unet.layer_depth('features.2.conv_pwl.bn.bias') == (3, 8)
    assert unet.layer_depth('features.16.bn.bias') == (6, 8)
    assert unet.layer_depth('features.16.bn.bias', 'layer') == (16, 18)


@pytest.mark.parametrize('taps', ['stages', 'unet'])
def test_every_parameter_has_one_stage(taps):
    maps = 6
    for stages in range(-1, maps + 1):
        net = ReXNet(arch=TINY, taps=taps, frozen_stages=stages).train()
        owned = []
        for stage in range(maps + 1):
            for module in net._stage_modules(stage):
                assert module.training == (stage > stages)
                assert all(p.requires_grad == (stage > stages) for p in module.parameters())
                owned += map(id, module.parameters())
        assert sorted(owned) == sorted(map(id, net.parameters()))


def test_gradients_reach_every_parameter():
    # In eval mode: a norm by the batch takes the effect of the bias before it away.
    net = noisy(ReXNet(arch=dict(TINY, depth=0.4), taps='unet')).eval()
    sum((m * torch.randn_like(m)).sum() for m in net(torch.randn(2, 3, 64, 64))).backward()
    assert not [n for n, p in net.named_parameters() if not p.grad.abs().sum() > 0]


def test_initial_values_equal_timm():
    torch.manual_seed(0)
    theirs = timm.create_model('rexnet_100').state_dict()
    for name, value in ReXNet(taps='unet').state_dict().items():
        if value.ndim < 2:
            assert torch.equal(value, theirs[name]), name
        elif value.numel() > 3000:
            assert value.std().item() == pytest.approx(theirs[name].std().item(), rel=0.1), name
    depthwise = ReXNet().features[15].conv_dw.conv.weight
    assert depthwise.std().item() == pytest.approx((2 / 9) ** 0.5, rel=0.1)


def test_drop_path_rates_equal_timm():
    theirs = timm_twin(drop_path_rate=0.3).features
    ours = ReXNet(drop_path_rate=0.3).features
    assert ours[15].drop_path.drop_prob == pytest.approx(0.3)
    for a, b in zip(ours, theirs, strict=False):
        if a.drop_path is not None:  # timm's blocks without a shortcut don't use theirs
            assert a.drop_path.drop_prob == pytest.approx(b.drop_path.drop_prob)
        assert (a.drop_path is not None) == b.use_shortcut


def test_recomputing_leaves_everything_as_in_the_plain_step():
    found = []
    for with_cp in (False, True):
        torch.manual_seed(0)
        net = noisy(ReXNet(arch=TINY, drop_path_rate=0.5, with_cp=with_cp, out_indices=range(5)))
        torch.manual_seed(1)
        found.append(step(net, net, (64, 64), batch=4))
    assert found[0][2]['features.5.se.bn.num_batches_tracked'].item() == 1
    for plain, recomputed in zip(*found, strict=True):
        plain = plain if isinstance(plain, list) else list(plain.values())
        recomputed = recomputed if isinstance(recomputed, list) else list(recomputed.values())
        for a, b in zip(plain, recomputed, strict=True):
            assert torch.equal(a, b)


def test_one_image_trains_with_norm_eval_alone():
    x = torch.randn(1, 3, 64, 64)
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        ReXNet(arch=TINY).train()(x)
    ReXNet(arch=TINY, norm_eval=True).train()(x)


def test_activations_survive_synchronised_norms():
    net = noisy(ReXNet(arch=TINY, taps='unet')).eval()
    x = torch.randn(1, 3, 64, 64)
    expected = net(x)
    net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    assert isinstance(net.stem.bn, nn.SyncBatchNorm)
    for a, b in zip(net(x), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(taps='nonsense'), "taps is 'nonsense'"),
        (dict(arch='4.0'), "unknown arch '4.0'"),
        (dict(arch=dict(width=0)), 'must be positive'),
        (dict(arch=dict(width=1, depth=-1)), 'must be positive'),
        (dict(arch=dict(width=1, first=0)), 'must be positive'),
        (dict(arch=dict(width=1, growth=-1)), 'not negative'),
        (dict(arch=dict(TINY, nonsense=1)), "unknown field 'nonsense'"),
        (dict(out_indices=(6,)), 'there are 6 maps'),
        (dict(taps='unet', out_indices=(6,)), 'there are 6 maps'),
        (dict(frozen_stages=7), 'from -1 to 6'),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        ReXNet(**options)


def test_image_below_the_coarsest_stride():
    with pytest.raises(ValueError, match='ReXNet needs at least 32'):
        ReXNet(arch=TINY)(torch.zeros(1, 3, 31, 64))
