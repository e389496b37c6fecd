"""ReXNet: timm's classifiers, clovaai's, and the ReXNet U-Net."""

from typing import Any

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
    ),
    classifier=((rf'head\.fc\.{AFFINE}', r'\g<0>'),),
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


def _encoder(sequence: str, target: str, *, gated_from: int = 3) -> list[Rule]:
    """Return the rules for clovaai's sequence: stem, activation, 16 blocks, last convolution."""
    numbers = {0: 'stem.conv', 1: 'stem.bn', 19: 'features.16.conv', 20: 'features.16.bn'}
    rules = [_module(rf'{sequence}\.{k}', target + module) for k, module in numbers.items()]
    for i in range(16):
        block = rf'{sequence}\.{i + 3}'
        rules += _block(block, f'{target}features.{i}', expanded=i > 0, gated=i >= gated_from)
    return rules


def _as_linear(weights: dict[str, Any]) -> dict[str, Any]:
    """Make linear layers of clovaai's 1x1 convolutions of pooled features."""
    linear = ('neck.fc.weight', 'head.fc.weight')
    return {key: value.flatten(1) if key in linear else value for key, value in weights.items()}


CLOVAAI = Format(
    name='rexnet-clovaai',
    about="ReXNet: clovaai's (the authors') classifiers",
    sign=r'features\.\d+\.out\.5\.fc\.',
    rules=tuple(_encoder('features', '')),
    classifier=((rf'output\.1\.({AFFINE})', r'head.fc.\1'),),
    values=_as_linear,
)
LITE = Format(
    name='rexnet-lite',
    about="ReXNet-lite: clovaai's classifiers",
    sign=r'features\.(?:[6-9]|1\d)\.out\.6\.',
    rules=tuple(_encoder('features', '', gated_from=16)),
    classifier=(
        (rf'output\.0\.({AFFINE})', r'neck.fc.\1'),
        (rf'output\.1\.({NORM})', r'neck.bn.\1'),
        (rf'output\.4\.({AFFINE})', r'head.fc.\1'),
    ),
    values=_as_linear,
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
