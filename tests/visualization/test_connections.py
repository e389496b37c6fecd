"""How strongly the layers of a CondenseNetV2 are connected."""

import numpy as np
import pytest
import torch

from mmdense.errors import UserError
from mmdense.models import CondenseNetV2
from mmdense.visualization.connections import KINDS, connection_strengths

ARCH = dict(layers=(2, 3), growth=(8, 8), groups=4)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return CondenseNetV2(arch=ARCH, out_indices=(0, 1))


def test_strengths_are_mean_absolute_weights(net):
    net.prune_to(0.2)
    layer = net.features.denseblock_2.denselayer_2
    strengths = connection_strengths(net.state_dict())
    assert [a.shape for kind in KINDS for a in strengths[kind]] == 2 * [(2, 2), (3, 3)]
    # 16 channels of the stem and two layers are the input, then come 8 of the first layer.
    weight = layer.conv_1.weight.detach().abs()
    expected = [weight[:, :32].mean(), weight[:, 32:].mean()]
    np.testing.assert_allclose(strengths['conv_1'][1][1, :2], expected, rtol=1e-5)
    weight = layer.sfr.weight.detach().abs()
    expected = [weight[:32].mean(), weight[32:].mean()]
    np.testing.assert_allclose(strengths['sfr'][1][1, :2], expected, rtol=1e-5)
    assert np.isnan(strengths['conv_1'][1][1, 2])


def test_the_condensed_form_has_the_same_strengths(net):
    net.prune_to(1.0)
    learned = connection_strengths({f'backbone.{k}': v for k, v in net.state_dict().items()})
    net.condense()
    condensed = connection_strengths(net.state_dict())
    for kind in KINDS:
        for a, b in zip(learned[kind], condensed[kind], strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)


def test_other_weights_are_refused():
    with pytest.raises(UserError, match='no CondenseNetV2'):
        connection_strengths({'conv.weight': torch.zeros(1)})


@pytest.mark.parametrize('key', ['state_dict', 'state_dict_ema'])
def test_a_checkpoint_is_drawn(net, key, tmp_path, call_tool):
    weights = {f'module.{name}': value for name, value in net.state_dict().items()}
    torch.save({key: weights}, tmp_path / 'net.pth')
    out = tmp_path / 'net.png'
    status, output, _ = call_tool('visualize_connections', tmp_path / 'net.pth', '--out', out)
    assert status == 0
    assert out.read_bytes().startswith(b'\x89PNG')
    status, _, error = call_tool('visualize_connections', tmp_path / 'no.pth')
    assert status == 2
    assert 'no checkpoint' in error
