"""How strongly each layer of a CondenseNetV2 reads and updates each earlier one."""

import re
from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from mmdense.errors import UserError

LAYER = re.compile(r'(.*features\.denseblock_(\d+)\.denselayer_(\d+)\.)sfr\.norm\.weight')
# The 1x1 convolutions of a layer -> what the layer does.
KINDS = dict(conv_1='layer reads (LGC)', sfr='layer reactivates (SFR)')


def connection_strengths(weights: Mapping[str, Tensor]) -> dict[str, list[np.ndarray]]:
    """Return the strengths of all connections, by kind: an array [L, L] for each block.

    Row i is of layer i + 1: its mean absolute weights for the block's input (column 0) and the
    features of each earlier layer. Pruned connections count as 0, NaN is no connection.
    ``weights`` are of any model with a CondenseNetV2, learned or condensed, else UserError.
    """
    layers = [match for match in map(LAYER.fullmatch, weights) if match]
    if not layers:
        raise UserError('no CondenseNetV2 in its learned or condensed form')
    stem = f'{layers[0][1].partition("denseblock")[0]}init_conv.weight'
    channels, blocks = len(weights[stem]), {kind: [] for kind in KINDS}
    for block in sorted({int(match[2]) for match in layers}):
        members = sorted((int(m[3]), m[1]) for m in layers if int(m[2]) == block)
        growth = len(weights[f'{members[0][1]}sfr.norm.weight'])
        for kind, arrays in blocks.items():
            arrays.append(np.full((len(members), len(members)), np.nan))
            for i, (_, name) in enumerate(members):
                values = _strengths(weights, f'{name}{kind}', channels + i * growth)
                parts = np.split(values, range(channels, len(values), growth))
                arrays[-1][i, : i + 1] = [part.mean() for part in parts]
        channels += len(members) * growth
    return blocks


def _strengths(weights: Mapping[str, Tensor], name: str, channels: int) -> np.ndarray:
    """Return the mean absolute weight of each of the channels that a layer is connected to."""
    weight, reads = weights[f'{name}.conv.weight'].float().abs().flatten(1), 'conv_1' in name
    if (mask := weights.get(f'{name}._mask')) is not None:
        return (weight * mask.flatten(1)).mean(0 if reads else 1).numpy()
    index, outputs = weights[f'{name}.index'], len(weight)
    if reads:  # [G * outputs, K] -> [G * K]
        weight = weight.view(len(index) // weight.shape[1], -1, weight.shape[1]).sum(1).flatten()
    else:  # [G * K, C / G]
        weight, outputs = weight.sum(1), len(weights[f'{name}.norm.weight'])
    return (weight.new_zeros(channels).index_add(0, index, weight) / outputs).numpy()


def draw_connections(blocks: Mapping[str, list[np.ndarray]]) -> Figure:
    """Draw strengths: a row of heat maps for each kind, a column for each block."""
    sizes = [len(strengths) for strengths in blocks['conv_1']]
    size = 0.24 * sum(sizes) + 1.2 * len(sizes) + 1.5, 0.48 * max(sizes) + 2.5
    figure = Figure(figsize=size, layout='constrained', dpi=120)
    axes = figure.subplots(2, len(sizes), squeeze=False, width_ratios=[n + 3 for n in sizes])
    for row, (kind, title) in zip(axes, KINDS.items(), strict=True):
        row[0].set_ylabel(title)
        for number, (axis, strengths) in enumerate(zip(row, blocks[kind], strict=True), 1):
            image = axis.imshow(strengths / (np.nanmax(strengths) or 1), vmin=0, vmax=1)
            ticks = range(0, len(strengths), 1 + len(strengths) // 9)
            axis.set_xticks(ticks, ['in', *map(str, ticks[1:])])
            axis.set_yticks(ticks, [str(i + 1) for i in ticks])
            axis.set_title(f'block {number}')
    figure.supxlabel("the block's input, and earlier layers")
    figure.colorbar(image, ax=axes, label="mean absolute weight, over the block's largest")
    return figure
