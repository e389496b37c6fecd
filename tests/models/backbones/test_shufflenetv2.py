"""ShuffleNetV2 equals torchvision's, and what is peculiar to it."""

import pytest
import torch
import torchvision
from torch import nn

from mmdense.models.backbones.shufflenetv2 import ShuffleNetV2

TINY = dict(channels=(8, 16, 32), units=(1, 2, 1), stem=4, last=48)
PARTS = ('conv1', 'maxpool', 'stage2', 'stage3', 'stage4', 'conv5')


def noisy(net):
    """Give norms and biases sizes that let every branch show in the outputs."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, value in net.state_dict().items():
            if value.ndim == 1:  # not the norms' counters
                low = -0.5 if name.endswith(('bias', 'mean')) else 0.5
                value.copy_(torch.rand(value.shape, generator=generator) + low)
    return net


def torchvision_twin(arch):
    torch.manual_seed(0)
    name = f'shufflenet_v2_x{arch.replace(".", "_")}'
    return noisy(torchvision.models.get_model(name, weights=None))


def their_maps(net, x):
    maps = []
    for part in PARTS:
        x = getattr(net, part)(x)
        maps.append(x)
    return maps[1:]


@pytest.mark.parametrize('arch', ['0.5', '1.0', '1.5', '2.0'])
@pytest.mark.parametrize('memory', [torch.contiguous_format, torch.channels_last])
def test_equals_torchvision(arch, memory):
    theirs = torchvision_twin(arch).eval()
    ours = ShuffleNetV2(arch=arch, out_indices=range(5)).eval()
    weights = {k: v for k, v in theirs.state_dict().items() if not k.startswith('fc.')}
    assert list(ours.state_dict()) == list(weights)
    ours.load_state_dict(weights)
    x = torch.randn(2, 3, 45, 70)
    expected = their_maps(theirs, x)
    found = ours.to(memory_format=memory)(x.to(memory_format=memory))
    for a, b in zip(found, expected, strict=True):
        if memory == torch.contiguous_format:
            assert torch.equal(a, b)
        torch.testing.assert_close(a, b)
    assert ours.out_channels == tuple(m.shape[1] for m in expected)


def test_a_training_step_equals_torchvision():
    theirs = torchvision_twin('0.5').train()
    ours = ShuffleNetV2(arch='0.5', out_indices=range(5)).train()
    ours.load_state_dict(theirs.state_dict(), strict=False)
    x = torch.randn(2, 3, 64, 64)
    for run in (ours, lambda x: their_maps(theirs, x)):
        sum(m.square().mean() for m in run(x)).backward()
    gradients = {name: p.grad for name, p in theirs.named_parameters()}
    for name, parameter in ours.named_parameters():
        assert (parameter.grad - gradients[name]).abs().max() < 1e-4 * gradients[name].abs().max()
    for name, buffer in ours.named_buffers():
        torch.testing.assert_close(buffer, theirs.get_buffer(name))


def test_a_classifier_s_checkpoint_loads(tmp_path):
    theirs = torchvision_twin('1.0').state_dict()
    file = str(tmp_path / 'classifier.pth')
    torch.save(theirs, file)
    net = ShuffleNetV2(init_cfg=dict(type='Pretrained', checkpoint=file))
    net.init_weights()
    ours = net.state_dict()
    assert {key.split('.')[0] for key in theirs.keys() - ours.keys()} == {'conv5', 'fc'}
    for key, value in ours.items():
        assert torch.equal(value, theirs[key]), key


def test_maps():
    net = ShuffleNetV2()  # what detectors read
    assert net.out_channels == (24, 116, 232, 464)
    assert net.out_strides == (4, 8, 16, 32)
    last = ShuffleNetV2(arch='2.0', out_indices=(2, -1))
    assert last.out_channels == (488, 2048)
    assert last.out_strides == (16, 32)
    maps = ShuffleNetV2(arch=TINY, out_indices=range(5)).eval()(torch.zeros(1, 3, 33, 70))
    assert [m.shape[1] for m in maps] == [4, 8, 16, 32, 48]
    assert [tuple(m.shape[2:]) for m in maps] == [(9, 18), (5, 9), (3, 5), (2, 3), (2, 3)]


@pytest.mark.parametrize('index', range(5))
def test_what_no_map_needs_is_not_built(index):
    net = ShuffleNetV2(arch=TINY, out_indices=(index,))
    assert [name for name, _ in net.named_children()] == list(PARTS[: index + 2])


def test_arch_fields_show():
    net = ShuffleNetV2(arch=TINY, out_indices=range(5))
    assert [len(net.get_submodule(part)) for part in PARTS[2:5]] == [1, 2, 1]
    assert net.out_channels == (4, 8, 16, 32, 48)


def test_layer_depth():
    net = ShuffleNetV2(out_indices=range(5))
    assert net.layer_depth('conv1.0.weight') == (0, 5)
    assert net.layer_depth('stage2.3.branch2.0.weight') == (1, 5)
    assert net.layer_depth('stage2.3.branch2.0.weight', 'layer') == (4, 18)
    assert net.layer_depth('stage3.0.branch1.0.weight', 'layer') == (5, 18)
    assert net.layer_depth('stage4.3.branch2.7.bias', 'layer') == (16, 18)
    assert net.layer_depth('conv5.1.bias') == (3, 5)
    assert net.layer_depth('conv5.1.bias', 'layer') == (16, 18)


@pytest.mark.parametrize(('stages', 'frozen'), [(-1, 0), (0, 1), (1, 2), (3, 4), (5, 6)])
def test_frozen_stages_end_in_maps(stages, frozen):
    net = ShuffleNetV2(arch=TINY, out_indices=range(5), frozen_stages=stages).train()
    for i, part in enumerate(PARTS):
        module = net.get_submodule(part)
        assert module.training == (i >= frozen)
        assert all(p.requires_grad == (i >= frozen) for p in module.parameters())


def test_recomputing_leaves_everything_as_in_the_plain_step():
    found = []
    for with_cp in (False, True):
        torch.manual_seed(0)
        net = noisy(ShuffleNetV2(arch=TINY, with_cp=with_cp, out_indices=range(5))).train()
        maps = net(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
        sum(m.square().mean() for m in maps).backward()
        found.append([*(p.grad for p in net.parameters()), *net.buffers()])
    for plain, recomputed in zip(*found, strict=True):
        assert torch.equal(plain, recomputed)


def test_activations_survive_synchronised_norms():
    net = noisy(ShuffleNetV2(arch=TINY)).eval()
    x = torch.randn(1, 3, 64, 64)
    expected = net(x)
    net = nn.SyncBatchNorm.convert_sync_batchnorm(net)
    for a, b in zip(net(x), expected, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (dict(arch='3.0'), "unknown arch '3.0'"),
        (dict(arch=dict(TINY, channels=(8, 16))), 'each of three stages'),
        (dict(arch=dict(TINY, units=(1, 2, 1, 1))), 'each of three stages'),
        (dict(arch=dict(TINY, units=(1, 0, 1))), 'must be positive'),
        (dict(arch=dict(TINY, stem=0)), 'must be positive'),
        (dict(arch=dict(TINY, last=-1)), 'must be positive'),
        (dict(arch=dict(TINY, channels=(8, 15, 32))), 'must be even'),
        (dict(out_indices=(5,)), 'there are 5 maps'),
        (dict(frozen_stages=6), 'from -1 to 5'),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        ShuffleNetV2(**options)
