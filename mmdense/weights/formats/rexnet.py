"""ReXNet: timm's classifiers, clovaai's, and the ReXNet U-Net."""

from __future__ import annotations

from mmdense.weights.formats.format import AFFINE, NORM, Format, Rule

GATE = rf'(?:fc[12]\.{AFFINE}|bn\.{NORM})'
CONV_NORM = rf'(?:conv\.weight|bn\.{NORM})'
REXNET = Format(
    name='rexnet',
    about="ReXNet: timm's classifiers and feature extractors",
    sign=r'features[._]\d+\.conv_dw\.',
    rules=(
        (rf'stem[._]({CONV_NORM})', r'stem.\1'),
        (
            rf'features[._](\d+\.(?:(?:conv_(?:exp|dw|pwl)\.)?{CONV_NORM}|se\.{GATE}))',
            r'features.\1',
        ),
        (rf'head\.fc\.{AFFINE}', None),
    ),
)


def _module(source: str, target: str) -> Rule:
    """Return the rule for a convolution or a norm; ``source`` is a pattern."""
    return rf'{source}\.({NORM})', rf'{target}.\1'


def _block(source: str, target: str, *, expanded: bool = True, gated: bool = True) -> list[Rule]:
    """Return the rules for a block, whose modules clovaai numbers in a sequence ``out``."""
    # None is an activation.
    modules = ['conv_exp.conv', 'conv_exp.bn', None] if expanded else []
    modules += ['conv_dw.conv', 'conv_dw.bn', *(['se'] if gated else []), None]
    modules += ['conv_pwl.conv', 'conv_pwl.bn']
    rules = []
    for number, module in enumerate(modules):
        at = rf'{source}\.out\.{number}'
        if module == 'se':
            gate = {0: 'fc1', 1: 'bn', 3: 'fc2'}
            rules += [_module(rf'{at}\.fc\.{k}', f'{target}.se.{v}') for k, v in gate.items()]
        elif module:
            rules.append(_module(at, f'{target}.{module}'))
    return rules


def _encoder(sequence: str, target: str) -> list[Rule]:
    """Return the rules for clovaai's sequence: stem, activation, 16 blocks, last convolution."""
    numbers = {0: 'stem.conv', 1: 'stem.bn', 19: 'features.16.conv', 20: 'features.16.bn'}
    rules = [_module(rf'{sequence}\.{k}', target + module) for k, module in numbers.items()]
    for i in range(16):
        block = rf'{sequence}\.{i + 3}'
        rules += _block(block, f'{target}features.{i}', expanded=i > 0, gated=i > 2)
    return rules


CLOVAAI = Format(
    name='rexnet-clovaai',
    about="ReXNet: clovaai's (the authors') classifiers",
    sign=r'features\.\d+\.out\.\d',
    rules=(*_encoder('features', ''), (rf'output\.1\.{AFFINE}', None)),
)
# The U-Net's encoder is the same sequence, cut into slices that keep the numbers. In mmdense it is
# an EncoderDecoder or DepthEstimator of ReXNet(taps='unet') and ReXUNetHead or ReXUNetDepthHead,
# width 1.0, one output channel. The published sigmoids are disparities: ReXUNetDepthHead's depths
# take fine-tuning, its ``disparities`` don't.
UNET = Format(
    name='rexnet-unet',
    about='ReXNet U-Net: encoder and decoder',
    sign=r'decode_conv\d\.out\.',
    rules=(
        *_encoder('conv[0-5]', 'backbone.'),
        *(
            rule
            for k in range(1, 7)
            for rule in _block(f'decode_conv{k}', f'decode_head.decode_conv{k}', expanded=False)
        ),
        *(_module(f'output_conv{k}', f'decode_head.output_conv{k}') for k in range(1, 6)),
    ),
)
