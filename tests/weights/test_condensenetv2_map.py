"""Checkpoints of the described keys load into ours, which then computes what they describe."""

import argparse

import pytest
import torch
from mmengine.registry import MODELS
from mmengine.runner import CheckpointLoader
from torch.nn import functional as F

import mmdense  # noqa: F401
from mmdense.errors import UserError
from mmdense.models import CondenseNetV2
from mmdense.weights.formats import convert

# Layers, growth, groups (which are the condense factor too), width of the classifier.
RELEASED = dict(
    a=((1, 1, 4, 6, 8), (8, 8, 16, 32, 64), 8, 828),
    b=((2, 4, 6, 8, 6), (6, 12, 24, 48, 96), 6, 1024),
    c=((4, 6, 8, 10, 8), (8, 16, 32, 64, 128), 8, 1024),
    tiny=((1, 1, 1, 1, 2), (4, 4, 4, 8, 4), 4, 16),
)
TINY = dict(layers=(1, 1, 1, 1, 2), growth=(4, 4, 4, 8, 4), groups=4)


def layers(arch):
    """Return prefix, block from 1, inputs and growth of each layer; then the last channels."""
    blocks, growths, _, _ = RELEASED[arch]
    channels, found = 2 * growths[0], []
    for block, (number, growth) in enumerate(zip(blocks, growths, strict=True), 1):
        for i in range(1, number + 1):
            prefix = f'features.denseblock_{block}.denselayer_{i}.'
            found.append((prefix, block, channels, growth))
            channels += growth
    return found, channels


def released(arch, form, seed=0):
    """Return a state dict as the facts page describes it, with random values."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        fan = max(1, shape[1] if len(shape) > 1 else 1)
        return torch.randn(shape, generator=generator) / fan**0.5

    def norm(channels):
        return dict(
            weight=torch.rand(channels, generator=generator) + 0.5,
            bias=torch.rand(channels, generator=generator) - 0.5,
            running_mean=torch.rand(channels, generator=generator) - 0.5,
            running_var=torch.rand(channels, generator=generator) + 0.5,
            num_batches_tracked=torch.tensor(1000),
        )

    def choice(channels):
        """Return a list of kept channels, ascending, for each group."""
        kept = channels // groups
        orders = [torch.randperm(channels, generator=generator)[:kept] for _ in range(groups)]
        return [order.sort().values for order in orders]

    _, growths, groups, hidden = RELEASED[arch]
    found, last = layers(arch)
    state = {'features.init_conv.weight': random(2 * growths[0], 3, 3, 3)}
    for prefix, block, c, g in found:
        own = {f'conv_2.norm.{k}': v for k, v in norm(4 * g).items()}
        own |= {f'sfr.norm.{k}': v for k, v in norm(g).items()}
        own['conv_2.conv.weight'] = random(g, 4 * g // groups, 3, 3)
        if block >= 4:
            own |= {'se.fc.0.weight': random(g, g), 'se.fc.2.weight': random(g, g)}
        reads, writes = choice(c), choice(c)
        if form == 'learned':
            own |= {f'conv_1.norm.{k}': v for k, v in norm(c).items()}
            own['conv_1.conv.weight'] = random(4 * g, c, 1, 1)
            own['sfr.conv.weight'] = random(c, g, 1, 1)
            for conv in ('conv_1', 'sfr'):
                own[f'{conv}._count'] = torch.tensor([c // groups * (groups - 1.0)])
                own[f'{conv}._stage'] = torch.tensor([groups - 1.0])
                own[f'{conv}._mask'] = torch.zeros_like(own[f'{conv}.conv.weight'])
            for o in range(4 * g):
                own['conv_1._mask'][o, reads[o % groups]] = 1
            for i in range(g):
                own['sfr._mask'][writes[i % groups], i] = 1
        else:
            index = torch.cat(reads)
            own['conv_1.index'] = index
            own |= {f'conv_1.norm.{k}': v[index] if v.ndim else v for k, v in norm(c).items()}
            own['conv_1.conv.weight'] = random(4 * g, c // groups, 1, 1)
            own['sfr.conv.weight'] = random(c, g // groups, 1, 1)
            own['sfr.index'] = torch.zeros(c, c)
            own['sfr.index'][torch.arange(c), torch.cat(writes)] = 1
        state |= {prefix + name: value for name, value in own.items()}
    state |= {f'features.norm_last.{k}': v for k, v in norm(last).items()}
    state['features.se_last.fc.0.weight'] = random(last // 16, last)
    state['features.se_last.fc.2.weight'] = random(last, last // 16)
    state |= {'fc.weight': random(hidden, last), 'fc.bias': random(hidden)}
    state |= {'classifier.weight': random(1000, hidden), 'classifier.bias': random(1000)}
    return state


def reference(state, arch, x):
    """Return the maps of the described network, step by step as the facts page has them."""
    groups = RELEASED[arch][2]
    maps, before = [], 1

    def normed(x, name, act):
        names = ('running_mean', 'running_var', 'weight', 'bias')
        return act(F.batch_norm(x, *(state[f'{name}.{n}'] for n in names), eps=1e-5))

    def shuffled(x, rows):
        n, c, h, w = x.shape
        return x.view(n, rows, c // rows, h, w).transpose(1, 2).reshape(n, c, h, w)

    x = F.conv2d(x, state['features.init_conv.weight'], stride=2, padding=1)
    for prefix, block, _, g in layers(arch)[0]:
        if block > before:
            maps.append(x)
            x, before = F.avg_pool2d(x, 2), block
        act = (lambda x: x * F.relu6(x + 3) / 6) if block >= 3 else F.relu
        weights = [state[f'{prefix}{conv}.conv.weight'] for conv in ('conv_1', 'conv_2', 'sfr')]
        converted = f'{prefix}conv_1.index' in state
        if converted:
            y = normed(x[:, state[f'{prefix}conv_1.index']], f'{prefix}conv_1.norm', act)
            y = shuffled(F.conv2d(y, weights[0], groups=groups), groups)
        else:
            y = normed(x, f'{prefix}conv_1.norm', act)
            y = F.conv2d(y, weights[0] * state[f'{prefix}conv_1._mask'])
        y = normed(y, f'{prefix}conv_2.norm', act)
        y = F.conv2d(y, weights[1], padding=1, groups=groups)
        if block >= 4:
            gate = F.relu(F.linear(y.mean((2, 3)), state[f'{prefix}se.fc.0.weight']))
            gate = torch.sigmoid(F.linear(gate, state[f'{prefix}se.fc.2.weight']))
            y = y * gate[..., None, None]
        z = normed(y, f'{prefix}sfr.norm', act)
        if converted:
            z = F.conv2d(shuffled(z, g // groups), weights[2], groups=groups)
            z = torch.einsum('nihw,io->nohw', z, state[f'{prefix}sfr.index'])
        else:
            z = F.conv2d(z, weights[2] * state[f'{prefix}sfr._mask'])
        x = torch.cat([x + z, y], 1)
    return [*maps, x]


def parallel(state):
    return {f'module.{name}': value for name, value in state.items()}


def averaged(state):
    """Return what a moving average makes of counters: they end just below their value."""
    return {k: v * 0.99996 if k.endswith(('_stage', '_count')) else v for k, v in state.items()}


def pretrained(file, **options):
    init_cfg = dict(type='Pretrained', checkpoint=f'condensenetv2://{file}')
    torch.manual_seed(1)
    net = MODELS.build(
        dict(type='mmdense.CondenseNetV2', init_cfg=init_cfg, out_indices=None, **options)
    )
    net.init_weights()
    return net.eval()


@torch.no_grad()
def check(net, state, arch, size=(64, 47)):
    """Compare in double precision: random weights amplify what is rounded."""
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(3)).double()
    state = {k: v.double() if v.is_floating_point() else v for k, v in state.items()}
    for found, expected in zip(net.double()(x), reference(state, arch, x), strict=True):
        assert (found - expected).abs().max() <= 1e-9 * expected.abs().max()


@pytest.mark.parametrize(
    ('arch', 'form'),
    [('a', 'condensed'), ('b', 'condensed'), ('c', 'condensed'), ('c', 'learned')],
)
def test_released_models_load_and_compute_the_same(arch, form, tmp_path):
    state = released(arch, form)
    held = dict(state_dict=parallel(state), args=argparse.Namespace(lr=0.1, model='x'), epoch=350)
    if form == 'learned':
        worse = {k: torch.zeros_like(v) for k, v in state.items()}
        held |= dict(state_dict=parallel(worse), state_dict_ema=averaged(state))
    mapped = convert(held)
    file = tmp_path / 'released.pth.tar'
    torch.save(held, file)
    net = pretrained(file, arch=arch, form=form)
    file.unlink()  # up to 100 MB
    ours = net.state_dict()
    assert {k: (v.shape, v.dtype) for k, v in mapped.items()} == {
        k: (v.shape, v.dtype) for k, v in ours.items()
    }
    for name, value in mapped.items():
        assert torch.equal(ours[name], value), name
    assert net.stage == net.last_stage
    check(net, state, arch)
    net.switch_to_deploy()
    check(net, state, arch)


@pytest.mark.parametrize('form', ['learned', 'condensed'])
def test_where_the_weights_are(form):
    first, second = released('tiny', form), released('tiny', form, seed=1)
    expected = convert(first)
    assert not any(k.startswith(('module.', 'fc.', 'classifier.')) for k in expected)
    for checkpoint in (
        first,
        parallel(first),
        dict(state_dict=first),
        dict(state_dict=second, state_dict_ema=first),
        dict(state_dict=second, state_dict_ema=parallel(first)),
        dict(state_dict=parallel(first), state_dict_ema=None),
        dict(state_dict=first, state_dict_ema={}, args=argparse.Namespace()),
    ):
        before = {k: id(v) for k, v in checkpoint.items()}
        mapped = convert(checkpoint)
        assert list(mapped) == list(expected)
        assert all(torch.equal(mapped[k], v) for k, v in expected.items())
        assert {k: id(v) for k, v in checkpoint.items()} == before
    net = CondenseNetV2(arch=TINY, form=form, out_indices=None).eval()
    net.load_state_dict(expected)  # nothing is missing, nothing is left
    check(net, first, 'tiny')


def test_masks_are_taken_as_they_are():
    """Also those of a model that is not fully pruned: :meth:`condense` is what refuses it."""
    state = released('tiny', 'learned')
    for name, value in state.items():
        if name.endswith('_mask'):
            value.fill_(1)
        elif name.endswith(('_stage', '_count')):
            value.fill_(0)
    net = CondenseNetV2(arch=TINY, out_indices=None).eval()
    net.load_state_dict(convert(state))
    assert net.stage == 0
    check(net, state, 'tiny')
    with pytest.raises(UserError, match='stage 0 of 3'):
        net.condense()


@pytest.mark.parametrize(
    'name',
    [
        'features.denseblock_1.denselayer_1.conv_1.conv.bias',
        'features.denseblock_1.denselayer_1.sfr.gather',
        'features.denseblock_1.transition.weight',
        'features.denseblock_1.denselayer_1.conv_2.index',
        'features.init_conv.bias',
        'head.weight',
    ],
)
@pytest.mark.parametrize('form', ['learned', 'condensed'])
def test_leftovers_are_refused(name, form):
    state = {**released('tiny', form), name: torch.zeros(1)}
    with pytest.raises(ValueError, match=rf"^1 keys are not .*\['{name}'\]"):
        convert(state)


def test_other_checkpoints_are_refused():
    learned, condensed = (released('tiny', form) for form in ('learned', 'condensed'))
    plain = {k: v for k, v in learned.items() if '._' not in k}
    for checkpoint, message in (
        (learned | condensed, 'has both masks and indices'),
        (plain, 'has no masks and no indices'),
        ({}, 'no state dict: empty'),
        ([1], 'a list is no checkpoint'),
        (dict(epoch=3, optimizer={}), r"no state dict: 'epoch' is of type int"),
        (condensed | {'features.init_conv.weight': 3}, 'init_conv.weight. is of type int'),
    ):
        with pytest.raises(ValueError, match=message):
            convert(checkpoint)


@pytest.mark.parametrize(
    'spoil',
    [
        lambda m: m[0].zero_(),
        lambda m: m[1].fill_(1),
        lambda m: m[2].mul_(0.5),
        lambda m: m[3].add_(1e-3),
        lambda m: m[0].sub_(m[0] * 2),
        lambda m: m.resize_(len(m)),
    ],
)
def test_what_is_no_choice_is_refused(spoil):
    state = released('tiny', 'condensed')
    name = 'features.denseblock_5.denselayer_2.sfr.index'
    spoil(state[name])
    with pytest.raises(ValueError, match=f'^{name} must be a matrix .* single 1 in each row'):
        convert(state)


def test_folders(tmp_path, monkeypatch):
    (tmp_path / 'weights').mkdir()
    torch.save(released('tiny', 'condensed'), tmp_path / 'weights/x.pth')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HOME', str(tmp_path))
    for place in ('weights/x.pth', '~/weights/x.pth', tmp_path / 'weights/x.pth'):
        net = pretrained(place, arch=TINY, form='condensed')
        check(net, released('tiny', 'condensed'), 'tiny')
    held = CheckpointLoader.load_checkpoint('condensenetv2://weights/x.pth', map_location='cpu')
    assert list(held) == ['state_dict']
