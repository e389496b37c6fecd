"""Loading checkpoints: a report of each load, and an error where too little of a model is loaded.

mmengine only warns about tensors that don't fit, and continues with random weights.
:class:`PretrainedInit` replaces its ``Pretrained`` (:func:`mmdense.patches.apply_patches`), and
:class:`~mmdense.engine.LoadReportHook`, which the tools register, checks what a runner loads.
"""

import ast
import logging
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from mmengine.logging import print_log
from mmengine.model import PretrainedInit as MMEnginePretrainedInit
from mmengine.model.weight_init import update_init_info
from mmengine.runner import CheckpointLoader
from timm.models import adapt_input_conv
from torch import Tensor, nn

from mmdense.errors import UserError, one_line, warn
from mmdense.weights.formats import LINEAR, Format, recognise, state_dict_of

SHOWN = 3  # names in a message
RGB = 3
COUNTER = 'num_batches_tracked'  # optional: files from before torch 0.4.1 lack it
SCRATCH = '(To train from scratch: --cfg-options model.backbone.init_cfg=None)'


@dataclass(frozen=True)
class LoadReport:
    """The outcome of loading a checkpoint into a model, tensor by tensor."""

    model: str  # its class
    format: Format | None  # that the checkpoint's keys were renamed from, if they were
    backbones: tuple[str, ...]  # prefixes of mmdense's backbones; '' if the model is one itself
    # The model's names.
    buffers: frozenset[str]  # all others are parameters
    loaded: tuple[str, ...]
    missing: tuple[str, ...]  # without the optional ones
    wrong_shape: Mapping[str, str]  # -> both shapes
    # The checkpoint's keys.
    unexpected: tuple[str, ...]
    dropped: tuple[str, ...]  # that the model doesn't need, such as a classifier's
    hint: str = ''  # the prefix that would let more tensors match, if there is one

    def share(self, part: str = '') -> float:
        """Return the loaded share of the model's tensors with a prefix, from 0 to 1."""
        loaded, total = self._count(part)
        return loaded / total if total else 1.0

    def _count(self, part: str) -> tuple[int, int]:
        loaded, *others = (
            sum(name.startswith(part) for name in names)
            for names in (self.loaded, self.missing, self.wrong_shape)
        )
        return loaded, loaded + sum(others)

    def table(self) -> str:
        """Return the numbers of tensors by outcome, with the first names that were not loaded."""
        lines = [f'{"":13}{"parameters":>10}{"buffers":>9}']
        for outcome in ('loaded', 'missing', 'wrong_shape', 'unexpected', 'dropped'):
            names = getattr(self, outcome)
            buffers = sum(name in self.buffers for name in names)
            numbers = f'{len(names) - buffers:10}'
            numbers += f'{buffers:9}' if outcome not in ('unexpected', 'dropped') else f'{"":9}'
            shown = _first(names) if outcome != 'loaded' else ''
            lines.append(f'{outcome.replace("_", " "):13}{numbers}  {shown}'.rstrip())
        return '\n'.join(lines)

    def require(self, min_loaded: float | None, *, source: str, part: str = '') -> None:
        """Raise UserError if less than a share, from 0 to 1, of the tensors was loaded.

        None requires all tensors of mmdense's backbones, and at least one of any other model. Names
        with the prefix ``part`` count. The message names ``source``, the first names that are
        missing, and the prefix that would let more match.
        """
        if min_loaded is None:
            for backbone in self.backbones:
                self.require(1.0, source=source, part=backbone)
        loaded, total = self._count(part)
        enough = loaded > 0 if min_loaded is None else self.share(part) >= min_loaded
        if enough or not total:
            return
        lists = {
            'missing': _first(self.missing, part),
            'wrong shape': _first(self.wrong_shape, part),
            'in the file instead': _first(self.unexpected),
        }
        faults = [f'{outcome}: {names}' for outcome, names in lists.items() if names]
        if self.format:
            faults.append(f'its keys are those of {self.format.about}')
        if self.hint:
            faults.append(self.hint)
        model = f'{part.rstrip(".")} of {self.model}' if part else self.model
        raise UserError(
            f'{source} fills {loaded} of {total} tensors of {model}: {"; ".join(faults)}'
        )


def _first(names: Collection[str], part: str = '') -> str:
    """Return the first names with a prefix; of a mapping, with their values."""
    names_of_part = [name for name in names if name.startswith(part)]
    shown = names_of_part[:SHOWN]
    if isinstance(names, Mapping):
        shown = [f'{name} {names[name]}' for name in shown]
    return ', '.join(shown + ['...'] * (len(names_of_part) > SHOWN))


def load_into(
    module: nn.Module, checkpoint: Any, *, prefix: str | None = None
) -> tuple[dict[str, Tensor], LoadReport]:
    """Load the tensors of a checkpoint of any known format that fit a model.

    If a backbone of mmdense reads images with other than three channels, the weights of its first
    convolution are adapted as in timm: summed for one channel, repeated and scaled for more.

    Of the checkpoint's keys those with ``prefix`` count, without it. Returns the weights with the
    model's names, unexpected ones included, and the report. UserError if the checkpoint holds no
    weights, or tensors that cannot be of its format or of the network.
    """
    expected = module.state_dict()
    backbones = {
        (f'{name}.' if name else ''): net
        for name, net in module.named_modules()
        if hasattr(net, 'not_pretrained')
    }
    try:
        state_dict = state_dict_of(checkpoint)
        weights, dropped, source_format = _select(state_dict, expected, prefix)
    except ValueError as error:
        raise UserError(str(error)) from error
    for name, net in backbones.items():
        _adapt_first_conv(net, weights, name)
    wrong_shape = {}
    try:  # with all tensors: a model may resize some as it loads them
        missing, unexpected = module.load_state_dict(weights, strict=False)
    except UserError:
        raise
    except RuntimeError as error:
        sizes = re.findall(r'size mismatch for (\S+): .*?\((.*?)\).*\((.*?)\)\.', str(error))
        if not sizes:
            raise UserError(one_line(error)) from error
        wrong_shape = {name: f'(file: {old}; model: {new})' for name, old, new in sizes}
        fitting = {name: value for name, value in weights.items() if name not in wrong_shape}
        missing, unexpected = module.load_state_dict(fitting, strict=False)
    absent = {name for name in expected if name.endswith(COUNTER) and name not in weights}
    absent |= {*missing, *wrong_shape}
    missing = [name for name in missing if name not in wrong_shape]
    if '' in backbones:  # checkpoints of complete models have these too
        missing = [name for name in missing if not name.startswith(module.not_pretrained)]
    if not weights:  # no key has the prefix
        unexpected = list(state_dict)
    hint = ''
    if missing or wrong_shape:
        hint = _hint(state_dict, expected, len(expected.keys() & weights.keys()))
    report = LoadReport(
        model=type(module).__name__,
        format=source_format,
        backbones=tuple(backbones),
        buffers=frozenset(expected.keys() - {name for name, _ in module.named_parameters()}),
        loaded=tuple(name for name in expected if name not in absent),
        missing=tuple(missing),
        wrong_shape=wrong_shape,
        unexpected=tuple(unexpected),
        dropped=tuple(dropped),
        hint=hint,
    )
    return weights, report


def load_checked(
    module: nn.Module,
    checkpoint: Any,
    *,
    source: str,
    min_loaded: float | None = 1.0,
    part: str = '',
    prefix: str | None = None,
) -> dict[str, Tensor]:
    """Load a checkpoint, log the report, and refuse a checkpoint that fills too little.

    Arguments and errors are those of :func:`load_into` and :meth:`LoadReport.require`;
    ``min_loaded=0`` only reports. Another normalization of images in training is a warning. Returns
    the weights with the model's names.
    """
    weights, report = load_into(module, checkpoint, prefix=prefix)
    format_of = f' ({report.format.about})' if report.format else ''
    complete = not report.missing and not report.wrong_shape
    print_log(
        f'{report.model} from {source}{format_of}: {report.share():.1%} of its tensors\n'
        f'{report.table()}',
        logger='current',
        level=logging.INFO if complete else logging.WARNING,
    )
    report.require(min_loaded, source=source, part=part)
    meta = checkpoint.get('meta') if isinstance(checkpoint, Mapping) else None
    for name, trained in _trained_normalization((meta or {}).get('cfg')).items():
        buffer = getattr(getattr(module, 'data_preprocessor', None), name, None)
        here = [] if buffer is None else [round(x, 3) for x in buffer.flatten().tolist()]
        if here and here != [round(x, 3) for x in trained or ()]:
            warn(f'{source} was trained with {name} {trained}, but data_preprocessor has {here}')
    return weights


def _trained_normalization(text: Any) -> dict[str, Sequence[float] | None]:
    """Return mean and std of the data preprocessor in a config's text, which is not executed."""
    with suppress(Exception):  # the text may be anything
        for node in ast.walk(ast.parse(text)):
            target = node.targets[0] if isinstance(node, ast.Assign) else node
            name = getattr(target, 'id', getattr(target, 'arg', ''))
            if name == 'data_preprocessor' and isinstance(node, ast.Assign | ast.keyword):
                settings = {keyword.arg: keyword.value for keyword in node.value.keywords}
                known = [name for name in ('mean', 'std') if name in settings]
                return {name: ast.literal_eval(settings[name]) for name in known}
    return {}


def _map_keys(
    state_dict: Mapping[str, Tensor], expected: Iterable[str]
) -> tuple[dict[str, Tensor], list[str], Format | None]:
    """Rename the keys of a known format, unless the model has more of them as they are.

    Returns the weights, the dropped keys, and the format if the keys were renamed.
    """
    source_format = recognise(state_dict)
    if source_format is not None:
        expected = set(expected)
        mapped = source_format.map(state_dict, complete=LINEAR in expected)
        if len(expected & mapped.weights.keys()) >= len(expected & state_dict.keys()):
            return mapped.weights, mapped.dropped, source_format
    return dict(state_dict), [], None


def _select(
    state_dict: Mapping[str, Tensor], expected: Iterable[str], prefix: str | None
) -> tuple[dict[str, Tensor], list[str], Format | None]:
    if not prefix:
        return _map_keys(state_dict, expected)
    prefix = prefix.rstrip('.') + '.'
    if selected := _below(prefix, state_dict):
        return _map_keys(selected, expected)
    # Renamed keys may have the prefix.
    weights, dropped, source_format = _map_keys(state_dict, [prefix + name for name in expected])
    return _below(prefix, weights), dropped, source_format


def _below(prefix: str, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {k.removeprefix(prefix): v for k, v in state_dict.items() if k.startswith(prefix)}


def _adapt_first_conv(net: nn.Module, weights: dict[str, Tensor], prefix: str) -> None:
    convs = [(n, m) for n, m in net.named_modules() if isinstance(m, nn.Conv2d)]
    channels = convs[0][1].in_channels if convs else RGB
    for name, conv in convs:  # in some stems several convolutions read the image
        key = f'{prefix}{name}.weight'
        shape = weights[key].shape if key in weights else ()
        if len(shape) == 4 and shape[1] == RGB != channels == conv.in_channels:
            weights[key] = adapt_input_conv(channels, weights[key])
            print_log(f'{key}: adapted from {RGB} to {channels} image channels', 'current')


def _hint(state_dict: Mapping[str, Tensor], expected: Iterable[str], matched: int) -> str:
    """Return the prefix to remove, or to add, for more tensors to match; '' if none helps."""
    names = {name for name in expected if not name.endswith(COUNTER)}
    found = {}  # hint -> number of names that would match
    for prefix in ('', *_prefixes(state_dict)):
        hint = f"without the prefix '{prefix}': add prefix='{prefix}' to init_cfg, or remove it by "
        hint += f'tools/convert_weights.py --prefix {prefix}'
        with suppress(ValueError):
            weights = _map_keys(_below(prefix, state_dict), names)[0]
            found[hint if prefix else 'without a prefix'] = len(weights.keys() & names)
    weights = _map_keys(state_dict, ())[0]
    for prefix in _prefixes(expected):
        hint = f"with the prefix '{prefix}'"
        if prefix == 'backbone.':
            hint += ': name the file in model.backbone.init_cfg.checkpoint'
        found[hint] = len({prefix + name for name in weights} & names)
    best = max(found, key=found.get)
    return f'{found[best]} would match {best}' if found[best] > matched else ''


def _prefixes(names: Iterable[str]) -> dict[str, None]:
    """Return the prefixes of up to three words, once each, in order."""
    words = [name.split('.') for name in names]
    return dict.fromkeys('.'.join(w[:n]) + '.' for w in words for n in range(1, min(4, len(w))))


def check_min_loaded(min_loaded: float | None, min_coverage: float | None = None) -> float | None:
    """Return ``min_loaded``, a share from 0 to 1 or ValueError; ``min_coverage`` is deprecated."""
    if min_coverage is not None:
        warn('min_coverage is a deprecated alias of min_loaded')
        min_loaded = min_coverage
    if min_loaded is not None and not 0 <= min_loaded <= 1:
        raise ValueError(f'min_loaded is {min_loaded}, must be from 0 to 1')
    return min_loaded


class PretrainedInit(MMEnginePretrainedInit):
    """mmengine's ``Pretrained`` for weights of any known format; it logs a load report.

    Args:
        checkpoint: A file (.pth, .safetensors), a URL, or a scheme such as ``timm://NAME``.
        min_loaded: Least share of the module's tensors that must be loaded, from 0 to 1. By
            default all tensors of an mmdense backbone, also within a complete model (RDNet's
            output norms, which are never pretrained, are optional), and of any other module at
            least one.
        min_coverage: Deprecated alias of ``min_loaded``.

    UserError, when the module is initialised, if there are no such weights, or too few.
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
        try:
            load_checked(
                module,
                CheckpointLoader.load_checkpoint(self.checkpoint, self.map_location),
                source=self.checkpoint,
                min_loaded=self.min_loaded,
                prefix=self.prefix,
            )
        except UserError as error:
            message = str(error)
            if self.checkpoint not in message:
                message = f'{self.checkpoint}: {message}'
            if hasattr(module, 'not_pretrained'):
                message += f' {SCRATCH}'
            raise UserError(message) from error
        if hasattr(module, '_params_init_info'):
            update_init_info(module, init_info=self._get_init_info())
