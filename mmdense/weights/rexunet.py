"""The published ReXNet U-Net (width 1.0, one output channel) as an mmseg segmentor.

Its encoder is clovaai's sequence of modules, cut in slices that keep the modules' numbers: 0 and 1
are the stem, 3 to 18 the blocks, 19 and 20 the last convolution.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

__all__ = ['from_rexunet_fork']

ValueT = TypeVar('ValueT')

# Numbers in a block's sequence ``out``; those between are activations.
FIRST_BLOCK = {
    '0': 'conv_dw.conv',
    '1': 'conv_dw.bn',
    '3': 'conv_pwl.conv',
    '4': 'conv_pwl.bn',
}
PLAIN_BLOCK = {
    '0': 'conv_exp.conv',
    '1': 'conv_exp.bn',
    '3': 'conv_dw.conv',
    '4': 'conv_dw.bn',
    '6': 'conv_pwl.conv',
    '7': 'conv_pwl.bn',
}
GATED_BLOCK = {
    '0': 'conv_exp.conv',
    '1': 'conv_exp.bn',
    '3': 'conv_dw.conv',
    '4': 'conv_dw.bn',
    '5.fc.0': 'se.fc1',
    '5.fc.1': 'se.bn',
    '5.fc.3': 'se.fc2',
    '7': 'conv_pwl.conv',
    '8': 'conv_pwl.bn',
}
DECODER_BLOCK = {
    '0': 'conv_dw.conv',
    '1': 'conv_dw.bn',
    '2.fc.0': 'se.fc1',
    '2.fc.1': 'se.bn',
    '2.fc.3': 'se.fc2',
    '4': 'conv_pwl.conv',
    '5': 'conv_pwl.bn',
}
# Slice of the encoder -> numbers of its blocks.
SLICES = dict(
    conv0=range(3, 4),
    conv1=range(4, 5),
    conv2=range(5, 7),
    conv3=range(7, 9),
    conv4=range(9, 15),
    conv5=range(15, 19),
)


def _layout(number: int) -> Mapping[str, str]:
    if number == 3:
        return FIRST_BLOCK
    return PLAIN_BLOCK if number < 6 else GATED_BLOCK


# Their module -> ours.
MODULES = {
    'conv0.0': 'backbone.stem.conv',
    'conv0.1': 'backbone.stem.bn',
    **{
        f'{piece}.{number}.out.{theirs}': f'backbone.features.{number - 3}.{ours}'
        for piece, numbers in SLICES.items()
        for number in numbers
        for theirs, ours in _layout(number).items()
    },
    'conv5.19': 'backbone.features.16.conv',
    'conv5.20': 'backbone.features.16.bn',
    **{
        f'decode_conv{k}.out.{theirs}': f'decode_head.decode_conv{k}.{ours}'
        for k in range(1, 7)
        for theirs, ours in DECODER_BLOCK.items()
    },
    **{f'output_conv{k}': f'decode_head.output_conv{k}' for k in range(1, 6)},
}


def from_rexunet_fork(state_dict: Mapping[str, ValueT]) -> dict[str, ValueT]:
    """Return the published U-Net's weights with the keys of an mmseg segmentor.

    That is an ``EncoderDecoder`` or ``DepthEstimator`` of ``ReXNet(taps='unet')`` and
    ``ReXUNetHead`` or ``ReXUNetDepthHead``. The published sigmoids are disparities: depths by
    ``ReXUNetDepthHead`` take fine-tuning, its ``disparities`` don't.

    Raises:
        ValueError: Keys that the published network doesn't have.
    """
    mapped, unknown = {}, []
    for key, value in state_dict.items():
        module, _, leaf = key.rpartition('.')
        if module in MODULES:
            mapped[f'{MODULES[module]}.{leaf}'] = value
        else:
            unknown.append(key)
    if unknown:
        raise ValueError(f'{len(unknown)} keys are not of the ReXNet U-Net, such as {unknown[:3]}')
    return mapped
