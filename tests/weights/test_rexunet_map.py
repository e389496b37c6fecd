"""The published ReXNet U-Net, rebuilt from its layout, loads into ours and computes the same."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip('mmseg')

from mmdense.models.backbones.rexnet import ReXNet  # noqa: E402
from mmdense.models.heads.rexunet import ReXUNetHead  # noqa: E402
from mmdense.weights import convert  # noqa: E402

# clovaai's ReXNet 1.0: channels of the 16 blocks; those that halve the resolution.
CHANNELS = (16, 27, 38, 50, 61, 72, 84, 95, 106, 117, 128, 140, 151, 162, 174, 185)
HALVING = (1, 3, 5, 11)
TAPS = (16, 27, 50, 72, 140)


class Gate(nn.Module):
    def __init__(self, channels):
        super().__init__()
        few = channels // 12
        self.fc = nn.Sequential(
            nn.Conv2d(channels, few, 1),
            nn.BatchNorm2d(few),
            nn.ReLU(),
            nn.Conv2d(few, channels, 1),
            nn.Sigmoid(),
        )

    def forward(self, x):
        return x * self.fc(F.adaptive_avg_pool2d(x, 1))


class Block(nn.Module):
    def __init__(self, inp, out, *, stride=1, expanded, gated, shortcut):
        super().__init__()
        layers, hidden = [], inp
        if expanded:
            hidden = 6 * inp
            layers += [nn.Conv2d(inp, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.SiLU()]
        layers += [
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
        ]
        if gated:
            layers.append(Gate(hidden))
        layers += [nn.ReLU6(), nn.Conv2d(hidden, out, 1, bias=False), nn.BatchNorm2d(out)]
        self.out = nn.Sequential(*layers)
        self.shortcut = shortcut

    def forward(self, x):
        y = self.out(x)
        if self.shortcut:
            y[:, : x.shape[1]] += x
        return y


class Fork(nn.Module):
    """The network of the facts: slices of the encoder keep the numbers of the whole sequence."""

    def __init__(self):
        super().__init__()
        features = [nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.SiLU()]
        before = 32
        for i, channels in enumerate(CHANNELS):
            features.append(
                Block(
                    before,
                    channels,
                    stride=2 if i in HALVING else 1,
                    expanded=i > 0,
                    gated=i > 2,
                    shortcut=i > 0 and i not in HALVING,
                )
            )
            before = channels
        features += [nn.Conv2d(185, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.SiLU()]
        features = nn.Sequential(*features)
        bounds = (0, 4, 5, 7, 9, 15, 22)
        for k in range(6):
            self.add_module(f'conv{k}', features[bounds[k] : bounds[k + 1]])
        widths = (1280, *reversed(TAPS), 1)
        for k in range(1, 7):
            block = Block(*widths[k - 1 : k + 1], expanded=False, gated=True, shortcut=False)
            self.add_module(f'decode_conv{k}', block)
        for k in range(1, 6):
            self.add_module(f'output_conv{k}', nn.Conv2d(TAPS[k - 1], 1, 3, 1, 1))

    def forward(self, x):
        taps = []
        for k in range(6):
            x = self.get_submodule(f'conv{k}')(x)
            taps.append(x)
        outputs = []
        for k in range(1, 6):
            x = self.get_submodule(f'decode_conv{k}')(x)
            if k > 1:
                x = F.interpolate(x, scale_factor=2, mode='bilinear', align_corners=False)
            x = x + taps[5 - k]
            outputs.append(self.get_submodule(f'output_conv{6 - k}')(x))
        x = F.interpolate(self.decode_conv6(x), scale_factor=2, mode='bilinear')
        return [x, *reversed(outputs)]


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
