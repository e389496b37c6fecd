"""Weights of other projects: one pure map of keys per foreign format.

A map takes a state dict and returns one with our keys and the same tensors; what it doesn't know
it names. Which format a file has is read from its keys. Our own checkpoints of backbones have the
keys of the first format of their family, so that they are mapped to themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mmdense.weights.formats import condensenetv2, densenet, rdnet, rexnet, rexunet
from mmdense.weights.formats.format import Format, Mapped

__all__ = ['FORMATS', 'Format', 'Mapped', 'convert', 'recognise', 'state_dict_of']

FORMATS = {
    known.name: known
    for known in (
        rdnet.RDNET,
        rdnet.MMLAB,
        densenet.DENSENET,
        densenet.MMPRETRAIN,
        condensenetv2.CONDENSENETV2,
        rexnet.REXNET,
        rexnet.CLOVAAI,
        rexunet.UNET,
    )
}
# Where weights lie in a checkpoint: a moving average first.
HOLDERS = ('state_dict_ema', 'model_ema', 'state_dict', 'model')
PARALLEL, COMPILED = 'module.', '_orig_mod.'  # what wrappers put into names


def recognise(state_dict: Mapping[str, Any]) -> Format | None:
    """Return the format of a state dict, by its keys; None for names that are no format's."""
    return next((known for known in FORMATS.values() if known.recognises(state_dict)), None)


def convert(checkpoint: Mapping[str, Any], name: str | None = None) -> dict[str, Tensor]:
    """Return a checkpoint's weights with the keys of mmdense.

    Args:
        checkpoint: Of a foreign format; what was given is left as it was.
        name: Of the format, one of ``FORMATS``; recognised by default.

    Raises:
        ValueError: No weights, no known format, or keys that the format doesn't have.
    """
    state_dict = state_dict_of(checkpoint)
    if name is not None and name not in FORMATS:
        raise ValueError(f'no format {name!r} (known: {list(FORMATS)})')
    known = FORMATS[name] if name else recognise(state_dict)
    if known is None:
        raise ValueError(
            f'keys such as {list(state_dict)[:3]} are of no known format (known: {list(FORMATS)})'
        )
    mapped = known.map(state_dict)
    if mapped.unknown:
        raise ValueError(
            f'{len(mapped.unknown)} keys are not of the format {known.name} ({known.about}), such '
            f'as {mapped.unknown[:3]}'
        )
    return mapped.weights


def state_dict_of(checkpoint: Any) -> dict[str, Tensor]:
    """Return the state dict in a checkpoint, without the prefixes of wrappers.

    Args:
        checkpoint: What a file holds: a state dict, or a dict with ``state_dict_ema``,
            ``model_ema``, ``state_dict`` or ``model``; the first of these that is there.

    Raises:
        ValueError: Something that holds no weights.
    """
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f'a {type(checkpoint).__name__} is no checkpoint')
    held = checkpoint
    for holder in HOLDERS:
        if isinstance(checkpoint.get(holder), Mapping) and checkpoint[holder]:
            held = checkpoint[holder]
            break
    for key, value in held.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(f'no state dict: {key!r} is of type {type(value).__name__}')
    if not held:
        raise ValueError('no state dict: empty')
    state_dict = {key.replace(COMPILED, ''): value for key, value in held.items()}
    if len(state_dict) < len(held):
        raise ValueError(f'no state dict: keys with {COMPILED} and the same ones without')
    while all(key.startswith(PARALLEL) for key in state_dict):
        state_dict = {key.removeprefix(PARALLEL): v for key, v in state_dict.items()}
    return state_dict
