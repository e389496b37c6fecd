"""Loading checkpoints: a report of each load, and an error where too little of a model is loaded.

mmengine only warns about tensors that don't fit, and continues with random weights.
:class:`PretrainedInit` replaces mmengine's ``Pretrained``
(:func:`mmdense.patches.apply_patches`); :class:`~mmdense.engine.LoadReportHook`, which the tools
register, checks what a runner loads.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mmengine.logging import print_log
from mmengine.model import PretrainedInit as MMEnginePretrainedInit
from mmengine.model.weight_init import update_init_info
from mmengine.runner import CheckpointLoader
from timm.models import adapt_input_conv
from torch import Tensor, nn

from mmdense.errors import UserError
from mmdense.weights.formats import Format, recognise, state_dict_of

__all__ = ['LoadReport', 'PretrainedInit', 'load_checked', 'load_into']

SHOWN = 3  # names in a message
RGB = 3
COUNTER = 'num_batches_tracked'  # files from before torch 0.4.1 have none; none is needed
SCRATCH = '(To train from scratch: --cfg-options model.backbone.init_cfg=None)'


@dataclass(frozen=True)
class LoadReport:
    """What became of a model's tensors, and of a checkpoint's, in a load.

    Attributes:
        model: The model's class.
        format: What the checkpoint's keys were recognised as.
        buffers: Names of the model that are buffers, all others being parameters.
        loaded: Names of the model that the checkpoint filled.
        missing: Names of the model that it has not, those aside that no checkpoint is expected to
            have.
        wrong_shape: Names of the model -> what doesn't fit.
        unexpected: Keys of the checkpoint that the model has not.
        dropped: Keys of the checkpoint that no dense prediction needs, such as a classifier's.
        hint: What would have matched more, if something would.
    """

    model: str
    format: Format | None
    buffers: frozenset[str]
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    wrong_shape: Mapping[str, str]
    unexpected: tuple[str, ...]
    dropped: tuple[str, ...]
    hint: str = ''

    def share(self, prefix: str = '') -> float:
        """Return the share of the model's tensors below a prefix that were loaded, from 0 to 1."""
        loaded, wanted = self._count(prefix)
        return loaded / wanted if wanted else 1.0

    def _count(self, prefix: str) -> tuple[int, int]:
        loaded, *others = (
            sum(name.startswith(prefix) for name in names)
            for names in (self.loaded, self.missing, self.wrong_shape)
        )
        return loaded, loaded + sum(others)

    def table(self) -> str:
        """Return the report, a line per fate, with the first names of what was not loaded."""
        lines = [f'{"":13}{"parameters":>10}{"buffers":>9}']
        for fate in ('loaded', 'missing', 'wrong_shape'):
            names = getattr(self, fate)
            buffers = sum(name in self.buffers for name in names)
            line = f'{fate.replace("_", " "):13}{len(names) - buffers:10}{buffers:9}'
            lines.append(line if fate == 'loaded' else f'{line}{_shown(names, "  ")}')
        for fate in ('unexpected', 'dropped'):
            names = getattr(self, fate)
            lines.append(f'{fate:13}{len(names):10}{"":9}{_shown(names, "  ")}')
        return '\n'.join(lines)

    def require(self, min_loaded: float | None, *, source: str, prefix: str = '') -> None:
        """Raise if too little was loaded.

        Args:
            min_loaded: Least share that must have been loaded; None asks for anything at all.
            source: Of the checkpoint, for the message.
            prefix: Of the model's names that count.

        Raises:
            UserError: Less than that was loaded: with the first names and what would have matched.
        """
        loaded, wanted = self._count(prefix)
        enough = loaded > 0 if min_loaded is None else self.share(prefix) >= min_loaded
        if enough or not wanted:
            return
        part = f'{prefix.rstrip(".")} of {self.model}' if prefix else self.model
        faults = []
        for what, names in (('missing:', self.missing), ('wrong shape:', self.wrong_shape)):
            if here := [name for name in names if name.startswith(prefix)]:
                shapes = {n: names[n] for n in here} if isinstance(names, Mapping) else here
                faults.append(what + _shown(shapes, ' '))
        if self.unexpected:
            faults.append(f'in the file instead:{_shown(self.unexpected, " ")}')
        if self.format:
            faults.append(f'its keys are those of {self.format.about}')
        if self.hint:
            faults.append(self.hint)
        raise UserError(
            f'{source} fills {loaded} of {wanted} tensors of {part}: ' + '; '.join(faults)
        )


def _shown(names: Iterable[str] | Mapping[str, str], before: str) -> str:
    names = [f'{n} {names[n]}' if isinstance(names, Mapping) else n for n in names]
    more = ', ...' if len(names) > SHOWN else ''
    return before + ', '.join(names[:SHOWN]) + more if names else ''


def to_our_keys(
    state_dict: Mapping[str, Tensor], wanted: Iterable[str]
) -> tuple[dict[str, Tensor], list[str], Format | None]:
    """Map a state dict of a known format to our keys, unless its own fit the model better.

    Args:
        state_dict: Of any known format, or of none.
        wanted: The model's names.

    Returns:
        The state dict, the keys that the map dropped, and the format, if it was mapped.

    Raises:
        ValueError: Tensors that the format cannot hold.
    """
    known = recognise(state_dict)
    if known is not None:
        mapped, wanted = known.map(state_dict), set(wanted)
        if len(wanted & mapped.weights.keys()) >= len(wanted & state_dict.keys()):
            return mapped.weights, mapped.dropped, known
    return dict(state_dict), [], None


def load_into(
    module: nn.Module,
    checkpoint: Any,
    *,
    prefix: str | None = None,
    way_out: str = 'tools/convert_weights.py --prefix {prefix} takes it off',
) -> tuple[dict[str, Tensor], LoadReport]:
    """Load a checkpoint of any known format into a model, as far as it fits.

    The first convolution of a backbone of ours is adapted if the image has other than three
    channels: for one channel the weights of three are summed, for more they are repeated and
    scaled, as timm does.

    Args:
        module: A backbone, or a whole model.
        checkpoint: What a file held.
        prefix: Take the checkpoint's keys that begin so, without it.
        way_out: What the hint says of a prefix that is too much.

    Returns:
        The weights with the model's keys, what it has not included, and what became of them.

    Raises:
        UserError: No weights, tensors that the format or the network cannot hold.
    """
    wanted = module.state_dict()
    backbones = [
        (f'{name}.' if name else '', net)
        for name, net in module.named_modules()
        if _is_backbone(net)
    ]
    try:
        state_dict = state_dict_of(checkpoint)
        weights, dropped, known = _taken(state_dict, wanted, prefix)
    except ValueError as error:
        raise UserError(str(error)) from error
    for name, net in backbones:
        _adapt_first_conv(net, weights, name)
    taken, missing, unexpected, errors = _load(module, weights)
    if not weights:  # behind that prefix
        unexpected = list(state_dict)
    wrong_shape = {}
    for error in errors:
        if match := re.match(r'size mismatch for (\S+): .*?\((.*?)\).*\((.*?)\)\.$', error):
            wrong_shape[match[1]] = f'(file: {match[2]}; model: {match[3]})'
        else:
            raise UserError(error.splitlines()[0])
    if _is_backbone(module):  # a whole model was trained with them
        missing = [name for name in missing if not name.startswith(module.not_pretrained)]
    absent = {*missing, *wrong_shape}
    loaded = [
        name
        for name in wanted
        if name in taken and name not in absent and (name in weights or not name.endswith(COUNTER))
    ]
    report = LoadReport(
        model=type(module).__name__,
        format=known,
        buffers=frozenset(wanted.keys() - {name for name, _ in module.named_parameters()}),
        loaded=tuple(loaded),
        missing=tuple(missing),
        wrong_shape=wrong_shape,
        unexpected=tuple(unexpected),
        dropped=tuple(dropped),
        hint=_hint(state_dict, wanted, len(loaded), way_out) if absent else '',
    )
    return weights, report


def _taken(
    state_dict: Mapping[str, Tensor], wanted: Iterable[str], prefix: str | None
) -> tuple[dict[str, Tensor], list[str], Format | None]:
    if not prefix:
        return to_our_keys(state_dict, wanted)
    prefix = prefix.rstrip('.') + '.'
    if below := _below(prefix, state_dict):
        return to_our_keys(below, wanted)
    weights, dropped, known = to_our_keys(state_dict, [prefix + name for name in wanted])
    return _below(prefix, weights), dropped, known  # our names may have it


def _below(prefix: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}


def _adapt_first_conv(net: nn.Module, weights: dict[str, Tensor], prefix: str) -> None:
    convs = [(n, m) for n, m in net.named_modules() if isinstance(m, nn.Conv2d)]
    channels = convs[0][1].in_channels if convs else RGB
    for name, conv in convs:  # a stem may have several that read the image
        key = f'{prefix}{name}.weight'
        shape = weights[key].shape if key in weights else ()
        if len(shape) == 4 and shape[1] == RGB != channels == conv.in_channels:
            weights[key] = adapt_input_conv(channels, weights[key])
            print_log(f'{key}: adapted from {RGB} to {channels} channels of the image', 'current')


def _load(module: nn.Module, weights: Mapping[str, Tensor]) -> tuple[dict, list, list, list]:
    """Load what fits as torch does, and return (what was taken, missing, unexpected, errors).

    torch's own load_state_dict raises on shapes, mmengine's only logs what it found. Models may
    rename what they take.
    """
    state_dict, missing, unexpected, errors = dict(weights), [], [], []

    def load(part: nn.Module, prefix: str) -> None:
        part._load_from_state_dict(state_dict, prefix, {}, True, missing, unexpected, errors)
        for name, child in part._modules.items():
            if child is not None:
                load(child, f'{prefix}{name}.')

    load(module, '')
    return state_dict, missing, list(dict.fromkeys(unexpected)), errors


def _hint(
    state_dict: Mapping[str, Tensor], wanted: Mapping[str, Any], loaded: int, way_out: str
) -> str:
    """Return how more of the file would have fitted, if a prefix is all that is wrong."""
    best, hint = loaded, ''
    wanted = {name: None for name in wanted if not name.endswith(COUNTER)}
    for prefix, number in [('', len(state_dict)), *_prefixes(state_dict)]:
        if number <= best:
            break
        try:
            below = to_our_keys(_below(prefix, state_dict), wanted)[0]
        except ValueError:
            continue
        fitting = len(below.keys() & wanted.keys())
        if fitting > best:
            best, hint = fitting, f'{fitting} would fit without a prefix'
            if prefix:
                way = way_out.format(prefix=prefix)
                hint = f'{fitting} would fit without {prefix!r} in front: {way}'
    ours = to_our_keys(state_dict, ())[0]
    for prefix, number in _prefixes(wanted):
        if number <= best:
            break
        fitting = len({prefix + name for name in ours} & wanted.keys())
        if fitting > best:
            best, hint = fitting, f'{fitting} would fit with {prefix!r} in front'
            if prefix == 'backbone.':
                hint += ': name the file in model.backbone.init_cfg.checkpoint'
    return hint


def _prefixes(names: Iterable[str]) -> list[tuple[str, int]]:
    """Return the heads of names, up to three words, with how many names begin so, most first."""
    heads: Counter[str] = Counter()
    for name in names:
        words = name.split('.')
        heads.update('.'.join(words[:n]) + '.' for n in range(1, min(4, len(words))))
    return heads.most_common()


class PretrainedInit(MMEnginePretrainedInit):
    """mmengine's ``Pretrained``, but it never goes on with random weights.

    Weights of any known format are taken. What was loaded is reported in the log.

    Args:
        checkpoint: A file (.pth, .safetensors), a URL, or a scheme such as ``timm://NAME``.
        prefix: Take the keys that begin so, without it.
        map_location: Device that the tensors are read to.
        min_loaded: Least share of the module's tensors, from 0 to 1, that must be loaded. By
            default all of a backbone of ours (what was never pretrained aside, such as RDNet's
            output norms), also in a whole model, and of any other module anything at all.
        min_coverage: Deprecated alias of ``min_loaded``.

    Raises:
        UserError: No such weights, or too few: raised when the module is initialised.
    """

    def __init__(
        self,
        checkpoint: str,
        prefix: str | None = None,
        map_location: str = 'cpu',
        min_loaded: float | None = None,
        min_coverage: float | None = None,
    ) -> None:
        super().__init__(checkpoint, prefix, map_location)
        self.min_loaded = check_min_loaded(min_loaded, min_coverage)

    def __call__(self, module: nn.Module) -> None:
        """Load the weights into a module."""
        ours = _is_backbone(module)
        try:
            checkpoint = CheckpointLoader.load_checkpoint(self.checkpoint, self.map_location)
            _, report = load_into(
                module,
                checkpoint,
                prefix=self.prefix,
                way_out="add prefix='{prefix}' to init_cfg",
            )
            _log(report, self.checkpoint)
            least = 1.0 if ours and self.min_loaded is None else self.min_loaded
            report.require(least, source=self.checkpoint)
            if self.min_loaded is None:  # of a whole model too
                for name, net in module.named_modules():
                    if _is_backbone(net) and name:
                        report.require(1.0, source=self.checkpoint, prefix=f'{name}.')
        except UserError as error:
            said = str(error) if self.checkpoint in str(error) else f'{self.checkpoint}: {error}'
            raise UserError(f'{said} {SCRATCH}' if ours else said) from error
        if hasattr(module, '_params_init_info'):
            update_init_info(module, init_info=self._get_init_info())


def check_min_loaded(min_loaded: float | None, min_coverage: float | None = None) -> float | None:
    """Return ``min_loaded``, which may be given by its deprecated alias ``min_coverage``.

    Raises:
        ValueError: It is not a share from 0 to 1.
    """
    if min_coverage is not None:
        print_log('min_coverage is a deprecated alias of min_loaded', 'current', logging.WARNING)
        min_loaded = min_coverage
    if min_loaded is not None and not 0 <= min_loaded <= 1:
        raise ValueError(f'min_loaded is {min_loaded}, must be from 0 to 1')
    return min_loaded


def load_checked(
    model: nn.Module,
    checkpoint: Any,
    *,
    source: str,
    min_loaded: float = 1.0,
    prefix: str = '',
) -> dict[str, Tensor]:
    """Load a checkpoint into a model, report what it filled, and refuse one that fills too little.

    Args:
        model: A whole model.
        checkpoint: What a file held.
        source: Of the checkpoint, for the messages.
        min_loaded: Least share of the tensors, from 0 to 1; 0 only reports.
        prefix: Of the model's names that count.

    Returns:
        The weights with the model's keys.

    Raises:
        UserError: As :func:`load_into`, or less than that was filled.
    """
    weights, report = load_into(model, checkpoint)
    _log(report, source)
    report.require(min_loaded, source=source, prefix=prefix)
    return weights


def _is_backbone(module: nn.Module) -> bool:
    """Return whether a module is a backbone of mmdense, which says what was never pretrained."""
    return hasattr(module, 'not_pretrained')


def _log(report: LoadReport, source: str) -> None:
    complete = not report.missing and not report.wrong_shape
    print_log(
        f'{report.model} from {source}'
        + (f' ({report.format.about})' if report.format else '')
        + f': {report.share():.1%} of its tensors\n{report.table()}',
        logger='current',
        level=logging.INFO if complete else logging.WARNING,
    )
