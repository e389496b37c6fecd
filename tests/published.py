"""Networks whose source isn't installed, rebuilt from their description."""

import torch.nn.functional as F
from torch import nn

# clovaai's ReXNet 1.0: channels of the 16 blocks; those that halve the resolution.
CHANNELS = (16, 27, 38, 50, 61, 72, 84, 95, 106, 117, 128, 140, 151, 162, 174, 185)
HALVING = (1, 3, 5, 11)
STRIDE_ENDS = (3, 5, 7, 13, 18, 21)  # modules that strides 2 to 32 end with; the last activation


class Gate(nn.Module):
    def __init__(self, channels):
        super().__init__()
        few = max(channels // 12, 1)
        layers = [nn.Conv2d(channels, few, 1), nn.BatchNorm2d(few), nn.ReLU()]
        self.fc = nn.Sequential(*layers, nn.Conv2d(few, channels, 1), nn.Sigmoid())

    def forward(self, x):
        return x * self.fc(x.mean((2, 3), keepdim=True))


class Bottleneck(nn.Module):
    def __init__(self, inp, out, *, stride=1, expansion=1, gated=True, shortcut=False):
        super().__init__()
        wide, layers = expansion * inp, []
        if expansion > 1:
            layers = [nn.Conv2d(inp, wide, 1, bias=False), nn.BatchNorm2d(wide), nn.SiLU()]
        layers += [nn.Conv2d(wide, wide, 3, stride, 1, groups=wide, bias=False)]
        layers += [nn.BatchNorm2d(wide), *([Gate(wide)] if gated else []), nn.ReLU6()]
        layers += [nn.Conv2d(wide, out, 1, bias=False), nn.BatchNorm2d(out)]
        self.out = nn.Sequential(*layers)
        self.shortcut = shortcut

    def forward(self, x):
        y = self.out(x)
        if self.shortcut:
            y[:, : x.shape[1]] += x
        return y


class ClovaaiReXNet(nn.Module):
    def __init__(self):
        super().__init__()
        modules = [nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.SiLU()]
        for i, (inp, out) in enumerate(zip((32, *CHANNELS), CHANNELS, strict=False)):
            modules.append(
                Bottleneck(
                    inp,
                    out,
                    stride=2 if i in HALVING else 1,
                    expansion=6 if i else 1,
                    gated=i > 2,
                    shortcut=i > 0 and i not in HALVING,
                )
            )
        modules += [nn.Conv2d(185, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.SiLU()]
        self.features = nn.Sequential(*modules)
        self.output = nn.Sequential(nn.Dropout(0.2), nn.Conv2d(1280, 1000, 1))

    def forward(self, x):
        maps = []
        for number, module in enumerate(self.features):
            x = module(x)
            if number in STRIDE_ENDS:
                maps.append(x.clone())
        return maps


class Fork(nn.Module):
    """The ReXNet U-Net: slices of the encoder keep the numbers of the whole sequence."""

    def __init__(self):
        super().__init__()
        features = ClovaaiReXNet().features
        bounds = (0, 4, 5, 7, 9, 15, 22)
        for k in range(6):
            self.add_module(f'conv{k}', features[bounds[k] : bounds[k + 1]])
        widths = (1280, 140, 72, 50, 27, 16, 1)
        for k in range(6):
            self.add_module(f'decode_conv{k + 1}', Bottleneck(*widths[k : k + 2]))
        for k in range(1, 6):
            self.add_module(f'output_conv{k}', nn.Conv2d(widths[6 - k], 1, 3, 1, 1))

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
