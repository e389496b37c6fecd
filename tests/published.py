"""Published networks that cannot be installed, rebuilt from their descriptions.

Either as a module, or as the names and shapes of its tensors.
"""

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from torch import nn
from torch.nn import functional as F

# clovaai's ReXNet 1.0: channels of the 16 blocks; those that halve the resolution.
CHANNELS = (16, 27, 38, 50, 61, 72, 84, 95, 106, 117, 128, 140, 151, 162, 174, 185)
HALVING = (1, 3, 5, 11)
# ReXNet-lite: width -> channels of the stem, the 16 blocks and the last convolution.
LITE = {
    '1.0': (32, (16, 32, 40, 48, 64, 72, 80, 96, 104, 112, 128, 136, 144, 160, 168, 184), 1280),
    '1.3': (40, (24, 32, 48, 64, 80, 96, 104, 120, 136, 152, 160, 176, 192, 208, 224, 232), 1664),
    '1.5': (48, (24, 40, 56, 72, 88, 104, 120, 136, 152, 176, 192, 208, 224, 240, 256, 272), 1920),
    '2.0': (64, (32, 56, 80, 96, 120, 144, 160, 184, 208, 232, 248, 272, 296, 320, 336, 360), 2560),
}
STRIDE_ENDS = (3, 5, 7, 13, 18, 21)  # the last modules of strides 2 to 32; the last activation


class Gate(nn.Module):
    def __init__(self, channels):
        super().__init__()
        few = max(channels // 12, 1)
        layers = [nn.Conv2d(channels, few, 1), nn.BatchNorm2d(few), nn.ReLU()]
        self.fc = nn.Sequential(*layers, nn.Conv2d(few, channels, 1), nn.Sigmoid())

    def forward(self, x):
        return x * self.fc(x.mean((2, 3), keepdim=True))


class Bottleneck(nn.Module):
    def __init__(self, inp, out, *, stride=1, expansion=1, gated=True, shortcut=False, act=nn.SiLU):
        super().__init__()
        wide, layers = expansion * inp, []
        if expansion > 1:
            layers = [nn.Conv2d(inp, wide, 1, bias=False), nn.BatchNorm2d(wide), act()]
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
    def __init__(self, lite=None):
        super().__init__()
        stem, channels, last = LITE[lite] if lite else (32, CHANNELS, 1280)
        act = nn.ReLU6 if lite else nn.SiLU
        modules = [nn.Conv2d(3, stem, 3, 2, 1, bias=False), nn.BatchNorm2d(stem), act()]
        for i, (inp, out) in enumerate(zip((stem, *channels), channels, strict=False)):
            modules.append(
                Bottleneck(
                    inp,
                    out,
                    stride=2 if i in HALVING else 1,
                    expansion=6 if i else 1,
                    gated=i > 2 and not lite,
                    shortcut=i > 0 and i not in HALVING,
                    act=act,
                )
            )
        modules += [nn.Conv2d(channels[-1], last, 1, bias=False), nn.BatchNorm2d(last), act()]
        self.features = nn.Sequential(*modules)
        head = [nn.Conv2d(last, 1024, 1), nn.BatchNorm2d(1024), nn.ReLU6()] if lite else []
        linear = nn.Conv2d(1024 if lite else last, 1000, 1)
        self.output = nn.Sequential(*head, nn.Dropout(0.2), linear)

    def logits(self, x):
        return self.output(self(x)[-1].mean((2, 3), keepdim=True)).flatten(1)

    def forward(self, x):
        maps = []
        for number, module in enumerate(self.features):
            x = module(x)
            if number in STRIDE_ENDS:
                maps.append(x.clone())
        return maps


class ReXUNet(nn.Module):
    """The ReXNet U-Net: slices of the encoder keep the modules' numbers in the sequence."""

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


def mmpretrain_densenet():
    """Return mmpretrain's own DenseNet-121, a classifier."""
    pytest.importorskip('mmpretrain')
    backbone = dict(type='DenseNet', arch='121')
    head = dict(type='LinearClsHead', num_classes=1000, in_channels=1024)
    config = dict(backbone=backbone, neck=dict(type='GlobalAveragePooling'), head=head)
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        return MODELS.build(dict(type='ImageClassifier', **config))


# The released RDNet detectors and segmentors: names and shapes in mmdet 2.25 and mmseg 0.22.

WIDTHS = (256, 440, 744, 1040)


def affine(name, *shape):
    return {f'{name}.weight': shape, f'{name}.bias': shape[:1]}


def conv_bn(name, out, inp, size):
    statistics = {f'{name}.bn.{k}': (out,) for k in ('running_mean', 'running_var')}
    return {
        f'{name}.conv.weight': (out, inp, size, size),
        **affine(f'{name}.bn', out),
        **statistics,
        f'{name}.bn.num_batches_tracked': (),
    }


def rdnet_tiny(stem, stage, head=False):
    """Return names and shapes of RDNet-T, given how its outer modules are called."""
    channels = 64
    shapes = {**affine(f'{stem}.0', channels, 3, 4, 4), **affine(f'{stem}.1', channels)}
    for i, growth in enumerate((64, 104, 128, 128, 128, 128, 224)):
        at = stage.format(i)
        if i:
            size = 2 if i in (1, 2, 6) else 1
            half = channels // 2 // 8 * 8
            shapes |= affine(f'{at}.0', channels) | affine(f'{at}.1', half, channels, size, size)
            channels = half
        for b in range(3):
            block = f'{at}.{2 if i else 0}.dense_block{b}'
            layer = f'{block}.layers.layers'
            shapes[f'{block}.gamma'] = (growth,)
            shapes |= affine(f'{layer}.0', channels, 1, 7, 7) | affine(f'{layer}.1', channels)
            shapes |= affine(f'{layer}.2', 4 * channels, channels, 1, 1)
            shapes |= affine(f'{layer}.4', growth, 4 * channels, 1, 1)
            if i >= 2:
                shapes |= affine(f'{layer}.5.fc', growth, growth, 1, 1)
            channels += growth
    if head:
        shapes |= affine('head.norm', channels) | affine('head.fc', 1000, channels)
    return shapes


EXTRACTOR = rdnet_tiny('backbone.timm_model.stem.stem', 'backbone.timm_model.dense_stages_{}')


def cascade():
    shapes = dict(EXTRACTOR)
    for i, channels in enumerate(WIDTHS):
        shapes |= affine(f'backbone.norm_modules.{i}', channels)
        shapes |= conv_bn(f'neck.lateral_convs.{i}', 256, channels, 1)
        shapes |= conv_bn(f'neck.fpn_convs.{i}', 256, 256, 3)
    shapes |= affine('rpn_head.rpn_conv', 256, 256, 3, 3)
    shapes |= affine('rpn_head.rpn_cls', 3, 256, 1, 1) | affine('rpn_head.rpn_reg', 12, 256, 1, 1)
    for stage in range(3):
        box, mask = (f'roi_head.{head}.{stage}' for head in ('bbox_head', 'mask_head'))
        shapes |= affine(f'{box}.fc_cls', 81, 1024) | affine(f'{box}.fc_reg', 320, 1024)
        for i in range(4):
            shapes |= conv_bn(f'{box}.shared_convs.{i}', 256, 256, 3)
            shapes |= affine(f'{mask}.convs.{i}.conv', 256, 256, 3, 3)
        shapes |= affine(f'{box}.shared_fcs.0', 1024, 256 * 7 * 7)
        shapes |= affine(f'{mask}.upsample', 256, 256, 2, 2)
        shapes |= affine(f'{mask}.conv_logits', 80, 256, 1, 1)
    return shapes


def upernet():
    shapes = dict(EXTRACTOR)
    shapes |= affine('decode_head.conv_seg', 150, 512, 1, 1)
    for i in range(4):
        shapes |= conv_bn(f'decode_head.psp_modules.{i}.1', 512, WIDTHS[-1], 1)
    shapes |= conv_bn('decode_head.bottleneck', 512, WIDTHS[-1] + 4 * 512, 3)
    for i in range(3):
        shapes |= conv_bn(f'decode_head.lateral_convs.{i}', 512, WIDTHS[i], 1)
        shapes |= conv_bn(f'decode_head.fpn_convs.{i}', 512, 512, 3)
    shapes |= conv_bn('decode_head.fpn_bottleneck', 512, 4 * 512, 3)
    shapes |= affine('auxiliary_head.conv_seg', 150, 256, 1, 1)
    return shapes | conv_bn('auxiliary_head.convs.0', 256, WIDTHS[2], 3)


RELEASED = dict(mmdet=cascade, mmseg=upernet)


# Layers, growth, groups (which are the condense factor too), width of the classifier.
CONDENSENETV2 = dict(
    a=((1, 1, 4, 6, 8), (8, 8, 16, 32, 64), 8, 828),
    b=((2, 4, 6, 8, 6), (6, 12, 24, 48, 96), 6, 1024),
    c=((4, 6, 8, 10, 8), (8, 16, 32, 64, 128), 8, 1024),
    tiny=((1, 1, 1, 1, 2), (4, 4, 4, 8, 4), 4, 16),
)


def condensenetv2_layers(arch):
    """Return prefix, block from 1, inputs and growth of each layer; then the last channels."""
    blocks, growths, _, _ = CONDENSENETV2[arch]
    channels, layers = 2 * growths[0], []
    for block, (number, growth) in enumerate(zip(blocks, growths, strict=True), 1):
        for i in range(1, number + 1):
            prefix = f'features.denseblock_{block}.denselayer_{i}.'
            layers.append((prefix, block, channels, growth))
            channels += growth
    return layers, channels


def condensenetv2(arch, form, seed=0):
    """Return the state dict of a released model, with random values."""
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
        """Return the kept channels of each group, ascending."""
        kept = channels // groups
        orders = [torch.randperm(channels, generator=generator)[:kept] for _ in range(groups)]
        return [order.sort().values for order in orders]

    _, growths, groups, hidden = CONDENSENETV2[arch]
    layers, last = condensenetv2_layers(arch)
    state = {'features.init_conv.weight': random(2 * growths[0], 3, 3, 3)}
    for prefix, block, c, g in layers:
        layer = {f'conv_2.norm.{k}': v for k, v in norm(4 * g).items()}
        layer |= {f'sfr.norm.{k}': v for k, v in norm(g).items()}
        layer['conv_2.conv.weight'] = random(g, 4 * g // groups, 3, 3)
        if block >= 4:
            layer |= {'se.fc.0.weight': random(g, g), 'se.fc.2.weight': random(g, g)}
        reads, writes = choice(c), choice(c)
        if form == 'learned':
            layer |= {f'conv_1.norm.{k}': v for k, v in norm(c).items()}
            layer['conv_1.conv.weight'] = random(4 * g, c, 1, 1)
            layer['sfr.conv.weight'] = random(c, g, 1, 1)
            for conv in ('conv_1', 'sfr'):
                layer[f'{conv}._count'] = torch.tensor([c // groups * (groups - 1.0)])
                layer[f'{conv}._stage'] = torch.tensor([groups - 1.0])
                layer[f'{conv}._mask'] = torch.zeros_like(layer[f'{conv}.conv.weight'])
            for o in range(4 * g):
                layer['conv_1._mask'][o, reads[o % groups]] = 1
            for i in range(g):
                layer['sfr._mask'][writes[i % groups], i] = 1
        else:
            index = torch.cat(reads)
            layer['conv_1.index'] = index
            layer |= {f'conv_1.norm.{k}': v[index] if v.ndim else v for k, v in norm(c).items()}
            layer['conv_1.conv.weight'] = random(4 * g, c // groups, 1, 1)
            layer['sfr.conv.weight'] = random(c, g // groups, 1, 1)
            layer['sfr.index'] = torch.zeros(c, c)
            layer['sfr.index'][torch.arange(c), torch.cat(writes)] = 1
        state |= {prefix + name: value for name, value in layer.items()}
    state |= {f'features.norm_last.{k}': v for k, v in norm(last).items()}
    state['features.se_last.fc.0.weight'] = random(last // 16, last)
    state['features.se_last.fc.2.weight'] = random(last, last // 16)
    state |= {'fc.weight': random(hidden, last), 'fc.bias': random(hidden)}
    state |= {'classifier.weight': random(1000, hidden), 'classifier.bias': random(1000)}
    return state


class CondenseNetV2:
    """A released CondenseNetV2; its arguments are those of :func:`condensenetv2`."""

    def __init__(self, arch='tiny', form='condensed', seed=0):
        self.arch, self.state = arch, condensenetv2(arch, form, seed)

    def state_dict(self):
        return self.state

    def logits(self, x):
        x = self._normed(self(x)[-1], 'features.norm_last', F.relu).mean((2, 3))
        state = self._state(x)
        gate = F.relu(F.linear(x, state['features.se_last.fc.0.weight']))
        x = x * torch.sigmoid(F.linear(gate, state['features.se_last.fc.2.weight']))
        x = F.linear(x, state['fc.weight'], state['fc.bias'])
        x = x * F.relu6(x + 3) / 6
        return F.linear(x, state['classifier.weight'], state['classifier.bias'])

    def _state(self, x):
        return {k: v.to(x.dtype) if v.is_floating_point() else v for k, v in self.state.items()}

    def _normed(self, x, name, act):
        names = ('running_mean', 'running_var', 'weight', 'bias')
        values = (self.state[f'{name}.{n}'].to(x.dtype) for n in names)
        return act(F.batch_norm(x, *values, eps=1e-5))

    def __call__(self, x):
        """Return the feature maps, step by step."""
        groups = CONDENSENETV2[self.arch][2]
        state, normed = self._state(x), self._normed
        maps, before = [], 1

        def shuffled(x, rows):
            n, c, h, w = x.shape
            return x.view(n, rows, c // rows, h, w).transpose(1, 2).reshape(n, c, h, w)

        x = F.conv2d(x, state['features.init_conv.weight'], stride=2, padding=1)
        for prefix, block, _, g in condensenetv2_layers(self.arch)[0]:
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
