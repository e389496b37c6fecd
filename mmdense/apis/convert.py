"""Weights of other projects, written with our keys, and checked where their source is installed."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import CheckpointLoader
from torch import Tensor, nn
from torch.nn import functional as F

import mmdense
from mmdense.errors import UserError
from mmdense.files import sha256_of
from mmdense.models import DenseNet, RDNet, ReXNet
from mmdense.models.backbones import Backbone
from mmdense.weights.files import new_file, read_checkpoint, write_checkpoint
from mmdense.weights.formats import FORMATS, recognise, state_dict_of
from mmdense.weights.loading import LoadReport, load_into
from mmdense.weights.sources import fetch

__all__ = ['Conversion', 'convert_weights']

TOLERANCE = 1e-4  # of the largest value of a map, in float32
# Format -> our backbone and timm's networks of that format.
INSTALLED = dict(
    rdnet=(RDNet, 'rdnet_*'), densenet=(DenseNet, 'densenet*'), rexnet=(ReXNet, 'rexnet_*')
)


@dataclass(frozen=True)
class Conversion:
    """What was converted.

    Attributes:
        format: Name of the source's format; 'mmdense' for our own keys.
        tensors: Number of tensors that were written.
        dropped: The source's keys that were left out.
        report: Of the config's model or backbone, if there was a config.
        compared: Name of the source's network that the outputs were compared with, if they were.
        differences: Per map the largest difference, as a share of the map's largest value.
    """

    format: str
    tensors: int
    dropped: tuple[str, ...]
    report: LoadReport | None = None
    compared: str = ''
    differences: tuple[float, ...] = ()


def convert_weights(
    source: str,
    target: str | Path,
    *,
    format_name: str | None = None,
    prefix: str | None = None,
    config: Config | None = None,
    check: bool = False,
) -> Conversion:
    """Write weights of any known format with our keys.

    The source's ``meta`` is kept; ``meta['mmdense']`` records the source, its sha256 (of the file,
    or of the tensors where there is no file), the format and the version of mmdense.

    Args:
        source: A file, a URL, or a scheme such as ``timm://NAME``.
        target: New file, .pth or .safetensors.
        format_name: One of ``mmdense.weights.FORMATS``; recognised by default.
        prefix: Take the source's keys that begin so, without it.
        config: Config of the model that the weights are for: the whole of it, or its backbone
            (without what was never pretrained) must be filled.
        check: Compare the outputs with the source's network.

    Raises:
        UserError: A source that cannot be read, keys that the format doesn't have, a config's
            model that is not filled, outputs that differ, or no network to compare with. Nothing
            is written then.
    """
    new_file(target)  # before the work
    held, digest = _read(source)
    try:
        state_dict = state_dict_of(held)
        if prefix:
            state_dict = _below(prefix, state_dict, source)
        known = FORMATS[format_name] if format_name else recognise(state_dict)
        mapped = known.map(state_dict) if known else None
    except ValueError as error:
        raise UserError(f'{source}: {error}') from error
    if mapped and mapped.unknown:
        raise UserError(
            f'{source}: {len(mapped.unknown)} keys are not of the format {known.name} '
            f'({known.about}), such as {mapped.unknown[:3]}'
        )
    if known is None and config is None:
        raise UserError(
            f'{source}: keys such as {list(state_dict)[:3]} are of no known format; name one of '
            f'{list(FORMATS)} by --from, or, if they are ours, the model by --config'
        )
    weights = mapped.weights if mapped else state_dict
    if not weights:
        raise UserError(f'{source}: nothing is left without {mapped.dropped}')
    report = _fill(config, weights, source) if config is not None else None
    compared, differences = _compare(source, state_dict, weights, known) if check else ('', ())
    record = dict(
        source=source if '://' in source else Path(source).name,
        sha256=digest,
        map=known.name if known else 'mmdense',
        version=mmdense.__version__,
    )
    meta = held.get('meta')  # of a trained model: its classes
    meta = meta if isinstance(meta, Mapping) else {}
    write_checkpoint(target, weights, {**meta, 'mmdense': record})
    return Conversion(
        format=record['map'],
        tensors=len(weights),
        dropped=tuple(mapped.dropped if mapped else ()),
        report=report,
        compared=compared,
        differences=differences,
    )


def _read(source: str) -> tuple[dict[str, Any], str]:
    """Return what a source holds, and its sha256."""
    file = fetch(source) if source.startswith(('http://', 'https://')) else Path(source)
    if '://' in source and not source.startswith('http'):
        held = CheckpointLoader.load_checkpoint(source, 'cpu')
        digest = hashlib.sha256()
        for name, value in sorted(state_dict_of(held).items()):
            digest.update(f'{name} {value.dtype} {tuple(value.shape)}'.encode())
            digest.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        return held, digest.hexdigest()
    return read_checkpoint(file), sha256_of(file)


def _below(prefix: str, state_dict: Mapping[str, Tensor], source: str) -> dict[str, Tensor]:
    prefix = prefix.rstrip('.') + '.'
    below = {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}
    if not below:
        raise UserError(f'{source}: no key begins with {prefix}, such as {list(state_dict)[:3]}')
    return below


def _fill(config: Config, weights: Mapping[str, Tensor], source: str) -> LoadReport:
    init_default_scope(config.get('default_scope', 'mmdet'))
    for name in config.get('custom_imports', {}).get('imports', ()):
        import_module(name)
    model = MODELS.build(config.model)
    whole = any(name.startswith('backbone.') for name in weights)
    net = model if whole else model.backbone
    _, report = load_into(net, weights)
    report.require(1.0, source=source)
    return report


def _compare(
    source: str, state_dict: Mapping[str, Tensor], weights: Mapping[str, Tensor], known: Any
) -> tuple[str, tuple[float, ...]]:
    """Return the name of the source's network, and how far our maps are from its own."""
    name, theirs = _source_network(source, state_dict, known)
    family, _ = INSTALLED[known.name]
    ours = _our_network(family, weights)
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 3, 192, 224, generator=generator)
    with torch.no_grad():
        expected = _maps(theirs.eval(), image)
        found = ours.eval()(image)[-len(expected) :]
    differences = tuple(
        float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, expected, strict=True)
    )
    if not max(differences) < TOLERANCE:
        raise UserError(
            f'{source}: maps differ from those of {name} by up to {max(differences):.1e} of the '
            'largest value, which is more than rounding'
        )
    return name, differences


def _source_network(
    source: str, state_dict: Mapping[str, Tensor], known: Any
) -> tuple[str, nn.Module]:
    """Return the installed network that takes a source's weights, with them, and its name."""
    if known is None or known.name not in INSTALLED:
        raise UserError(
            f'--check: there is no installed network to compare with for {source}; known are '
            f'those of the formats {list(INSTALLED)}'
        )
    scheme, _, name = source.rpartition('://')
    if scheme == 'torchvision' and '.' in name:  # its own loader renames the keys of 2017
        arch, _, tag = name.partition('.')
        weights = torchvision.models.get_model_weights(arch)[tag.upper()]
        return f'torchvision {arch}', torchvision.models.get_model(arch, weights=weights)
    for name, options in _candidates(INSTALLED[known.name][1]):
        with torch.device('meta'):
            candidate = timm.create_model(name, **options).state_dict()
        if state_dict.keys() <= candidate.keys() and _shapes(known.map(candidate).weights) == (
            _shapes(known.map(state_dict).weights)
        ):  # but for the classifier, which may be missing
            net = timm.create_model(name, **options)
            net.load_state_dict(state_dict, strict=False)
            kind = 'features of ' if options.get('features_only') else ''
            return f'timm {kind}{name}', net
    raise UserError(f'--check: no network of timm takes the names and shapes of {source}')


def _candidates(pattern: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for name in timm.list_models(pattern):
        for options in ({}, dict(features_only=True)):
            yield name, options


def _shapes(state_dict: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {k: tuple(v.shape) for k, v in state_dict.items() if 'num_batches_tracked' not in k}


def _our_network(family: type[Backbone], weights: Mapping[str, Tensor]) -> Backbone:
    """Return the family's network of those weights."""
    archs = import_module(family.__module__).ARCHS
    shapes = _shapes(weights)
    for arch in archs:
        with torch.device('meta'):
            net = family(arch=arch)
        wanted = _shapes(net.state_dict())
        if wanted.items() <= shapes.items():
            net = family(arch=arch)
            load_into(net, weights)[1].require(1.0, source='the source')
            return net
    raise UserError(f'--check: {family.__name__} has no arch of these shapes: {list(archs)}')


def _maps(net: nn.Module, image: Tensor) -> list[Tensor]:
    """Return a network's maps at strides 4 to 32, or the last alone where it gives no others."""
    if hasattr(net, 'forward_intermediates'):
        strides = [info['reduction'] for info in net.feature_info]
        indices = [i for i, stride in enumerate(strides) if stride >= 4]
        return net.forward_intermediates(image, indices=indices, intermediates_only=True)
    if hasattr(net, 'feature_info'):
        maps = zip(net(image), net.feature_info.reduction(), strict=True)
        return [x for x, stride in maps if stride >= 4]
    return [F.relu(net.features(image))]
