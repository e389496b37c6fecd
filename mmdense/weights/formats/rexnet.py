"""ReXNet: timm's classifiers and clovaai's."""

from __future__ import annotations

from mmdense.weights.formats.format import AFFINE, NORM, Format, Rule

__all__ = ['BLOCKS', 'CLOVAAI', 'REXNET', 'block_rules']

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
# Numbers in the sequence ``out`` of clovaai's blocks, those between being activations; by kind.
BLOCKS = dict(
    first={'0': 'conv_dw.conv', '1': 'conv_dw.bn', '3': 'conv_pwl.conv', '4': 'conv_pwl.bn'},
    plain={
        '0': 'conv_exp.conv',
        '1': 'conv_exp.bn',
        '3': 'conv_dw.conv',
        '4': 'conv_dw.bn',
        '6': 'conv_pwl.conv',
        '7': 'conv_pwl.bn',
    },
    gated={
        '0': 'conv_exp.conv',
        '1': 'conv_exp.bn',
        '3': 'conv_dw.conv',
        '4': 'conv_dw.bn',
        '5.fc.0': 'se.fc1',
        '5.fc.1': 'se.bn',
        '5.fc.3': 'se.fc2',
        '7': 'conv_pwl.conv',
        '8': 'conv_pwl.bn',
    },
    decoder={
        '0': 'conv_dw.conv',
        '1': 'conv_dw.bn',
        '2.fc.0': 'se.fc1',
        '2.fc.1': 'se.bn',
        '2.fc.3': 'se.fc2',
        '4': 'conv_pwl.conv',
        '5': 'conv_pwl.bn',
    },
)
NUMBERS = range(3, 19)  # of the blocks in clovaai's sequence of modules


def kind(number: int) -> str:
    """Return the kind of a block by its number in clovaai's sequence of modules."""
    return 'first' if number == 3 else 'plain' if number < 6 else 'gated'


def module_rule(theirs: str, ours: str) -> Rule:
    """Return the rule for a convolution or a norm under another name."""
    return rf'{theirs}\.({NORM})', rf'{ours}.\1'


def block_rules(theirs: str, ours: str, kind: str) -> tuple[Rule, ...]:
    """Return the rules for a block under other names; ``theirs`` is a pattern."""
    return tuple(
        module_rule(rf'{theirs}\.out\.{number.replace(".", "[.]")}', f'{ours}.{module}')
        for number, module in BLOCKS[kind].items()
    )


CLOVAAI = Format(
    name='rexnet-clovaai',
    about="ReXNet: the authors' classifiers (clovaai)",
    sign=r'features\.\d+\.out\.\d',
    rules=(
        module_rule(r'features\.0', 'stem.conv'),
        module_rule(r'features\.1', 'stem.bn'),
        *(
            rule
            for number in NUMBERS
            for rule in block_rules(rf'features\.{number}', f'features.{number - 3}', kind(number))
        ),
        module_rule(r'features\.19', 'features.16.conv'),
        module_rule(r'features\.20', 'features.16.bn'),
        (rf'output\.1\.{AFFINE}', None),
    ),
)
