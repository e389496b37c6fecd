"""Weight formats of other projects: one pure map of keys per format.

A map renames the keys of a state dict to mmdense's and keeps the tensors; it lists the keys that it
doesn't know. The format of a file is recognised by its keys. Checkpoints of mmdense's backbones
have the keys of their family's first format, which therefore maps them onto themselves.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mmdense.weights.formats import condensenetv2, densenet, rdnet, rexnet
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
        rexnet.LITE,
        rexnet.UNET,
    )
}
# Entries of checkpoints that hold weights; moving averages first.
ENTRIES = ('state_dict_ema', 'model_ema', 'state_dict', 'model')
LINEAR = 'head.fc.weight'  # of an ImageClassifier
PARALLEL, COMPILED = 'module.', '_orig_mod.'  # added to names by wrappers


def recognise(state_dict: Mapping[str, Any], name: str | None = None) -> Format | None:
    """Return the format of a state dict by its keys, None if it has none, or that of a name.

    ValueError if no format has this name.
    """
    if name is not None:
        if name not in FORMATS:
            raise ValueError(f'no format {name!r} (known: {list(FORMATS)})')
        return FORMATS[name]
    return next((known for known in FORMATS.values() if known.recognises(state_dict)), None)


def convert(checkpoint: Mapping[str, Any], name: str | None = None) -> dict[str, Tensor]:
    """Return a checkpoint's weights with mmdense's keys; the checkpoint stays unchanged.

    ValueError if it has no weights, no known format, or keys that the format doesn't have.
    """
    state_dict = state_dict_of(checkpoint)
    known = recognise(state_dict, name)
    if known is None:
        raise ValueError(
            f'keys such as {list(state_dict)[:3]} are of no known format (known: {list(FORMATS)})'
        )
    return known.map(state_dict, strict=True).weights


def state_dict_of(checkpoint: Any) -> dict[str, Tensor]:
    """Return the state dict in a checkpoint, without the prefixes of wrappers.

    The first of ``ENTRIES`` is taken, or else the checkpoint is a state dict itself. ValueError if
    it holds no weights.
    """
    if not isinstance(checkpoint, Mapping):
        raise ValueError(f'a {type(checkpoint).__name__} is not a checkpoint')
    entries = [checkpoint.get(name) for name in ENTRIES]
    weights = next((e for e in entries if isinstance(e, Mapping) and e), checkpoint)
    for key, value in weights.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise ValueError(f'no state dict: {key!r} is of type {type(value).__name__}')
    if not weights:
        raise ValueError('no state dict: empty')
    state_dict = {key.replace(COMPILED, ''): value for key, value in weights.items()}
    if len(state_dict) < len(weights):
        raise ValueError(f'no state dict: some keys are there with {COMPILED} and without')
    while all(key.startswith(PARALLEL) for key in state_dict):
        state_dict = {key.removeprefix(PARALLEL): v for key, v in state_dict.items()}
    return state_dict
