"""The published ReXNet U-Net (width 1.0, one output channel) as an mmseg segmentor.

Its encoder is clovaai's sequence of modules, cut in slices that keep the modules' numbers: 0 and 1
are the stem, 3 to 18 the blocks, 19 and 20 the last convolution. Ours is an ``EncoderDecoder`` or
``DepthEstimator`` of ``ReXNet(taps='unet')`` and ``ReXUNetHead`` or ``ReXUNetDepthHead``. The
published sigmoids are disparities: depths by ``ReXUNetDepthHead`` take fine-tuning, its
``disparities`` don't.
"""

from __future__ import annotations

from mmdense.weights.formats.format import Format
from mmdense.weights.formats.rexnet import block_rules, kind, module_rule

__all__ = ['UNET']

# Slice of the encoder -> numbers of its blocks.
SLICES = dict(
    conv0=range(3, 4),
    conv1=range(4, 5),
    conv2=range(5, 7),
    conv3=range(7, 9),
    conv4=range(9, 15),
    conv5=range(15, 19),
)
UNET = Format(
    name='rexnet-unet',
    about='the ReXNet U-Net (encoder and decoder)',
    sign=r'decode_conv\d\.out\.',
    rules=(
        module_rule(r'conv0\.0', 'backbone.stem.conv'),
        module_rule(r'conv0\.1', 'backbone.stem.bn'),
        *(
            rule
            for piece, numbers in SLICES.items()
            for number in numbers
            for rule in block_rules(
                rf'{piece}\.{number}', f'backbone.features.{number - 3}', kind(number)
            )
        ),
        module_rule(r'conv5\.19', 'backbone.features.16.conv'),
        module_rule(r'conv5\.20', 'backbone.features.16.bn'),
        *(
            rule
            for k in range(1, 7)
            for rule in block_rules(f'decode_conv{k}', f'decode_head.decode_conv{k}', 'decoder')
        ),
        *(module_rule(f'output_conv{k}', f'decode_head.output_conv{k}') for k in range(1, 6)),
    ),
)
