"""ShuffleNetV2 equals torchvision's; test_contract.py has what all families share."""

import pytest
import torch
import torchvision
from families import image, randomise, run, same, same_step, step

from mmdense.models import ShuffleNetV2

TINY = dict(channels=(8, 16, 32), units=(1, 2, 1), stem=4, last=48)
PARTS = ('conv1', 'maxpool', 'stage2', 'stage3', 'stage4', 'conv5')


def torchvision_twin(arch):
    torch.manual_seed(0)
    name = f'shufflenet_v2_x{arch.replace(".", "_")}'
    return randomise(torchvision.models.get_model(name, weights=None))


def their_outputs(net, x):
    outputs = []
    for part in PARTS:
        x = getattr(net, part)(x)
        outputs.append(x)
    return outputs[1:]


@pytest.mark.parametrize(
    ('arch', 'layout'),
    [
        ('0.5', torch.contiguous_format),
        ('1.0', torch.channels_last),
        ('1.5', torch.contiguous_format),
        ('2.0', torch.channels_last),
    ],
)
def test_equals_torchvision(arch, layout):
    theirs = torchvision_twin(arch).eval()
    ours = ShuffleNetV2(arch=arch, out_indices=range(5)).eval()
    weights = {k: v for k, v in theirs.state_dict().items() if not k.startswith('fc.')}
    assert list(ours.state_dict()) == list(weights)
    ours.load_state_dict(weights)
    x = image(45, 70, batch=2)
    expected = run(lambda y: their_outputs(theirs, y), x)
    outputs = run(ours.to(memory_format=layout), x.to(memory_format=layout))
    same(outputs, expected, 0 if layout == torch.contiguous_format else 1e-4)
    assert ours.out_channels == tuple(y.shape[1] for y in expected)


def test_a_training_step_equals_torchvision():
    theirs = torchvision_twin('0.5').double().train()
    ours = ShuffleNetV2(arch='0.5', out_indices=range(5)).double().train()
    ours.load_state_dict(theirs.state_dict(), strict=False)
    x = image(64, 64, batch=2).double()
    expected, _ = step(theirs, x, lambda y: their_outputs(theirs, y))
    result, _ = step(ours, x)
    same_step(result, {name: expected[name] for name in result})


def test_feature_maps():
    net = ShuffleNetV2()  # as detectors read them
    assert net.out_channels == (24, 116, 232, 464)
    assert net.out_strides == (4, 8, 16, 32)
    last = ShuffleNetV2(arch='2.0', out_indices=(2, -1))
    assert last.out_channels == (488, 2048)
    assert last.out_strides == (16, 32)
    tiny = ShuffleNetV2(arch=TINY, out_indices=range(5)).eval()
    assert [len(tiny.get_submodule(part)) for part in PARTS[2:5]] == [1, 2, 1]
    outputs = run(tiny, torch.zeros(1, 3, 33, 70))
    assert [y.shape[1] for y in outputs] == [4, 8, 16, 32, 48]
    assert [tuple(y.shape[2:]) for y in outputs] == [(9, 18), (5, 9), (3, 5), (2, 3), (2, 3)]


@pytest.mark.parametrize('index', range(5))
def test_unneeded_stages_are_not_built(index):
    net = ShuffleNetV2(arch=TINY, out_indices=(index,))
    assert [name for name, _ in net.named_children()] == list(PARTS[: index + 2])


def test_layer_depth():
    net = ShuffleNetV2(out_indices=range(5))
    assert net.layer_depth('conv1.0.weight') == (0, 5)
    assert net.layer_depth('stage2.3.branch2.0.weight') == (1, 5)
    assert net.layer_depth('stage2.3.branch2.0.weight', 'layer') == (4, 18)
    assert net.layer_depth('stage3.0.branch1.0.weight', 'layer') == (5, 18)
    assert net.layer_depth('stage4.3.branch2.7.bias', 'layer') == (16, 18)
    assert net.layer_depth('conv5.1.bias') == (3, 5)
    assert net.layer_depth('conv5.1.bias', 'layer') == (16, 18)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (dict(channels=(8, 16)), 'each of three stages'),
        (dict(units=(1, 2, 1, 1)), 'each of three stages'),
        (dict(units=(1, 0, 1)), 'must be positive'),
        (dict(stem=0), 'must be positive'),
        (dict(last=-1), 'must be positive'),
        (dict(channels=(8, 15, 32)), 'must be even'),
    ],
)
def test_impossible_arch(change, message):
    with pytest.raises(ValueError, match=message):
        ShuffleNetV2(arch={**TINY, **change})
