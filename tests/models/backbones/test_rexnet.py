"""ReXNet equals timm's; test_contract.py has what all families share."""

import pytest
import timm
import torch
from families import image, randomise, run, same_step, step
from timm.models.rexnet import RexNet

import published
from mmdense.models import ReXNet
from mmdense.weights.formats import FORMATS, convert
from mmdense.weights.loading import load_into

TINY = dict(width=0.25, depth=0.2)
# Of timm's blocks: the last and the first of each stride.
STAGES, UNET = (0, 2, 4, 10, 15), (0, 1, 3, 5, 11, 16)


def timm_twin(width='1.0', **options):
    torch.manual_seed(0)
    name = f'rexnet_{width.replace(".", "")}0'
    return randomise(timm.create_model(name, num_classes=0, global_pool='', **options))


def their_outputs(net, x, ends):
    x, outputs = net.stem(x), []
    for i, block in enumerate(net.features):
        x = block(x)
        if i in ends:
            outputs.append(x)
    return outputs


@pytest.mark.parametrize(
    ('width', 'taps', 'size', 'training'),
    [
        ('1.0', 'stages', (45, 70), False),
        ('1.0', 'unet', (33, 64), True),
        ('1.3', 'stages', (32, 64), True),
    ],
)
def test_equals_timm(width, taps, size, training):
    theirs = timm_twin(width).double().train(training)
    ours = ReXNet(arch=width, taps=taps, out_indices=range(5 + (taps == 'unet'))).double()
    unused = ours.train(training).load_state_dict(theirs.state_dict(), strict=False).unexpected_keys
    assert all(key.startswith('features.16.') for key in unused)
    assert bool(unused) == (taps == 'stages')
    ends = STAGES if taps == 'stages' else UNET
    x = image(*size, batch=2).double()
    expected, _ = step(theirs, x, lambda y: their_outputs(theirs, y, ends))
    result, _ = step(ours, x)
    same_step(result, {name: expected[name] for name in result})


@pytest.mark.parametrize('memory', ['plain', 'lean'])
def test_lite_equals_the_published_network(memory):
    torch.manual_seed(0)
    theirs = randomise(published.ClovaaiReXNet('1.0')).double()
    ours = ReXNet(arch='lite-1.0', out_indices=range(6), memory=memory).double()
    _, report = load_into(ours, theirs.state_dict())
    assert (report.format.name, report.share(), report.unexpected) == ('rexnet-lite', 1, ())
    x = image(45, 70, batch=2).double()
    expected, _ = step(theirs, x)
    result, _ = step(ours, x)
    named = FORMATS['rexnet-lite'].map(expected).weights
    same_step(result, {name: named[name] for name in result})


@pytest.mark.parametrize(
    ('width', 'millions'), [('1.0', 4.740), ('1.3', 6.748), ('1.5', 8.332), ('2.0', 12.966)]
)
def test_sizes_of_lite(width, millions):
    with torch.device('meta'):
        ours = ReXNet(arch=f'lite-{width}', out_indices=range(6))
        theirs = published.ClovaaiReXNet(width)
    shapes = {k: v.shape for k, v in ours.state_dict().items()}
    assert shapes == {k: v.shape for k, v in convert(theirs.state_dict()).items()}
    assert round(sum(p.numel() for p in theirs.parameters()) / 1e6, 3) == millions


@pytest.mark.parametrize(
    ('width', 'depth'),
    [
        *((width, 1.0) for width in (0.9, 1.0, 1.3, 1.5, 2.0, 2.2, 3.0)),
        *((0.3, 2.0), (0.6, 0.2), (0.9, 1.3), (1.0, 0.5), (1.75, 1.5)),
    ],
)
def test_sizes_equal_timm(width, depth):
    arch = str(width) if depth == 1 else dict(width=width, depth=depth)
    with torch.device('meta'):
        ours = ReXNet(arch=arch, taps='unet')
        theirs = RexNet(width_mult=width, depth_mult=depth, num_classes=0)
    expected = {k: v.shape for k, v in theirs.state_dict().items()}
    assert {k: v.shape for k, v in ours.state_dict().items()} == expected


def test_arch_fields_have_an_effect():
    first = ReXNet(arch=dict(TINY, first=8, growth=24), out_indices=(0, 4))
    assert first.out_channels == (8, 13)
    assert len(ReXNet(arch=TINY).features) == 6
    assert len(ReXNet(arch=dict(TINY, depth=0.4)).features) == 9


def test_feature_maps():
    stages = ReXNet()  # as detectors read them
    assert stages.out_channels == (38, 61, 128, 185)
    assert stages.out_strides == (4, 8, 16, 32)
    last = ReXNet(out_indices=(3, 5))  # as SSDLite reads them
    assert last.out_channels == (128, 1280)
    assert last.out_strides == (16, 32)
    unet = ReXNet(taps='unet')
    assert unet.out_channels == (16, 27, 50, 72, 140, 1280)
    assert unet.out_strides == (2, 4, 8, 16, 32, 32)
    tiny = ReXNet(arch=dict(TINY, depth=0.4), taps='unet').eval()
    outputs = run(tiny, torch.zeros(1, 3, 33, 70))
    assert tuple(y.shape[1] for y in outputs) == tiny.out_channels
    sizes = [(17, 35), (9, 18), (5, 9), (3, 5), (2, 3), (2, 3)]
    assert [tuple(y.shape[2:]) for y in outputs] == sizes


@pytest.mark.parametrize('taps', ['stages', 'unet'])
def test_unneeded_blocks_are_not_built(taps):
    ends = STAGES if taps == 'stages' else UNET
    with torch.device('meta'):
        for index, end in enumerate(ends):
            assert len(ReXNet(taps=taps, out_indices=(index,)).features) == end + 1


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


def test_every_parameter_of_the_unet_has_one_stage():
    for stages in range(-1, 7):
        net = ReXNet(arch=TINY, taps='unet', frozen_stages=stages).train()
        ids = []
        for stage in range(7):
            for module in net._stage_modules(stage):
                assert module.training == (stage > stages)
                assert all(p.requires_grad == (stage > stages) for p in module.parameters())
                ids += map(id, module.parameters())
        assert sorted(ids) == sorted(map(id, net.parameters()))


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


def test_a_single_image_trains_with_norm_eval_only():
    with pytest.raises(ValueError, match='more than 1 value per channel'):
        run(ReXNet(arch=TINY).train(), image(64, 64))
    run(ReXNet(arch=TINY, norm_eval=True).train(), image(64, 64))


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(taps='nonsense'), "taps is 'nonsense'"),
        (dict(arch=dict(width=0)), 'must be positive'),
        (dict(arch=dict(width=1, depth=-1)), 'must be positive'),
        (dict(arch=dict(width=1, first=0)), 'must be positive'),
        (dict(arch=dict(width=1, growth=-1)), 'not negative'),
        (dict(taps='unet', out_indices=(6,)), 'there are 6 feature maps'),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        ReXNet(**options)
