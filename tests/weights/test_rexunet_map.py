"""The published ReXNet U-Net, rebuilt from its layout, loads into ours and computes the same."""

import pytest
import torch
from torch import nn

pytest.importorskip('mmseg')

from mmdense.models.backbones.rexnet import ReXNet  # noqa: E402
from mmdense.models.heads.rexunet import ReXUNetHead  # noqa: E402
from mmdense.weights.formats import convert
from published import Fork  # noqa: E402


@pytest.fixture(scope='module')
def fork():
    torch.manual_seed(0)
    net = Fork().eval()
    for name, value in net.state_dict().items():
        if value.ndim == 1:
            value.uniform_(-0.5, 0.5) if name.endswith(('bias', 'mean')) else value.uniform_(
                0.5, 1.5
            )
    return net


@pytest.fixture
def ours():
    encoder = ReXNet(taps='unet')
    head = ReXUNetHead(in_channels=encoder.out_channels, num_classes=2, out_channels=1)
    return nn.ModuleDict(dict(backbone=encoder, decode_head=head)).eval()


@pytest.mark.filterwarnings('ignore::UserWarning')
def test_every_key_has_one_of_ours(fork, ours):
    theirs = fork.state_dict()
    assert len(theirs) == 547
    assert sum(p.numel() for p in fork.parameters()) == 4_009_167
    mapped = convert(theirs)
    assert len(mapped) == 547
    expected = ours.state_dict()
    assert {k: v.shape for k, v in mapped.items()} == {k: v.shape for k, v in expected.items()}
    assert list(theirs) == list(fork.state_dict())  # what was given is left as it was


@pytest.mark.filterwarnings('ignore::UserWarning')
def test_the_same_outputs(fork, ours):
    ours.load_state_dict(convert(fork.state_dict()))
    x = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        found = ours['decode_head'](ours['backbone'](x))
        expected = fork(x)
    for a, b in zip(found, expected, strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


def test_leftovers_are_refused(fork):
    with pytest.raises(ValueError, match=r"1 keys .* \['output.1.weight'\]"):
        convert({**fork.state_dict(), 'output.1.weight': torch.zeros(1)})
    with pytest.raises(ValueError, match='547 keys .*net.conv0.0.weight'):
        convert({f'net.{k}': v for k, v in fork.state_dict().items()}, 'rexnet-unet')
