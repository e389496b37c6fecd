"""DenseNet: timm's and torchvision's classifiers, and mmpretrain's."""

from mmdense.weights.formats.format import AFFINE, NORM, Format

LAYER = r'(?:norm|conv)'
DENSENET = Format(
    name='densenet',
    about="DenseNet: torchvision's and timm's classifiers, timm's feature extractors",
    sign=r'features[._]denseblock\d+\.denselayer\d',
    rules=(
        (rf'features[._](conv\d\.weight|norm\d\.{NORM})', r'features.\1'),
        (rf'features\.norm_final\.({NORM})', r'features.norm5.\1'),  # gpleiss's
        # torchvision's files of 2017 name the layers norm.1, conv.1, norm.2, conv.2.
        (
            rf'features[._](denseblock\d+\.denselayer\d+)\.({LAYER})\.?([12]\.{NORM})',
            r'features.\1.\2\3',
        ),
        (rf'features[._](transition\d+\.{LAYER}\.{NORM})', r'features.\1'),
    ),
    classifier=((rf'classifier\.({AFFINE})', r'head.fc.\1'),),
)
BACKBONE = r'(?:backbone\.)?'


MMPRETRAIN = Format(
    name='densenet-mmpretrain',
    about="DenseNet: mmpretrain's (mmcls's) classifiers",
    sign=rf'{BACKBONE}stages\.\d+\.block\.\d+\.norm1\.',
    rules=(
        (rf'{BACKBONE}stem\.0\.weight', 'features.conv0.weight'),
        (rf'{BACKBONE}stem\.1\.({NORM})', r'features.norm0.\1'),
        # Blocks, layers and transitions are numbered from 1.
        (
            rf'{BACKBONE}stages\.(\d+)\.block\.(\d+)\.({LAYER}[12]\.{NORM})',
            lambda m: f'features.denseblock{int(m[1]) + 1}.denselayer{int(m[2]) + 1}.{m[3]}',
        ),
        (
            rf'{BACKBONE}transitions\.(\d+)\.({LAYER}\.{NORM})',
            lambda m: f'features.transition{int(m[1]) + 1}.{m[2]}',
        ),
        # The fourth is the network's last norm, with an activation and no convolution.
        (rf'{BACKBONE}transitions\.3\.0\.({NORM})', r'features.norm5.\1'),
    ),
    classifier=((rf'head\.fc\.{AFFINE}', r'\g<0>'),),
)
