"""ONNX files of a model's networks, checked against the model by onnxruntime.

What a file holds ends where Python begins: anchors, box decoding, NMS and everything behind
proposals are the caller's.

Shapes: N images of C channels, H x W pixels, K classes.
"""

from __future__ import annotations

import copy
import inspect
import json
import logging
import math
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import mmdense
from mmdense.apis.deployment import TOLERANCE, relative_difference
from mmdense.errors import UserError, one_line
from mmdense.files import check_writable
from mmdense.models.backbones import Backbone
from mmdense.models.deploy import deploy as deploy_backbone

__all__ = ['PARTS', 'Check', 'Exported', 'Preprocessing', 'export_onnx']

PARTS = ('backbone', 'neck', 'model')
PACKAGES = ('onnx', 'onnxscript', 'onnxruntime')
AXES = {0: 'batch', 2: 'height', 3: 'width'}
# What a file leaves open, in the order in which it is tried.
FREEDOMS = (tuple(AXES.values()), ('batch',), ())
HEAD_OUTPUTS = ('cls_score', 'bbox_pred')
LOGGERS = ('torch.onnx', 'torch.export', 'onnxscript', 'onnx_ir')


@dataclass(frozen=True)
class Preprocessing:
    """What is done to the pixels of a file, 0 to 255, before the model's network sees them.

    Attributes:
        channels: Their order: 'RGB', 'BGR', or '' where the model has no preprocessor.
        mean: Subtracted per channel; empty where nothing is.
        std: Divided by after that.
        multiple: What height and width were padded to a multiple of, on the right and below.
    """

    channels: str = ''
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    multiple: int = 1


@dataclass(frozen=True)
class Check:
    """How far onnxruntime's outputs are from torch's for one batch of random images.

    Attributes:
        image: N, H and W.
        differences: Per output the largest difference, as a share of its largest value.
    """

    image: tuple[int, int, int]
    differences: Mapping[str, float]


@dataclass(frozen=True)
class Exported:
    """What was written.

    Attributes:
        file: The file.
        part: One of ``PARTS``.
        bytes: Its size.
        opset: Version of ONNX's operators.
        shapes: Of the input ``image`` and of each output; sides that are open are words.
        fixed: Why batch or sizes are fixed that were to be open; empty if none is.
        checks: One for each batch and size that was tried.
        preprocessing: Of the model.
        normalized: Whether the file does its part of it: subtracts the mean, divides by std.
    """

    file: Path
    part: str
    bytes: int
    opset: int
    shapes: Mapping[str, tuple[int | str, ...]]
    fixed: str
    checks: tuple[Check, ...]
    preprocessing: Preprocessing
    normalized: bool


def export_onnx(
    model: nn.Module,
    file: str | Path,
    *,
    part: str | None = None,
    size: tuple[int, int] = (512, 512),
    deploy: bool = False,
    fixed: bool = False,
    normalize: bool = False,
) -> Exported:
    """Write a part of a model as an ONNX file of standard operators, in float32.

    Inputs and outputs are named: ``image`` [N, C, H, W]; a backbone's maps ``c2``, ``c3``, ... and
    a neck's ``p2``, ``p3``, ... by the logarithm of the stride; a dense head's ``cls_score_0``, ...
    and ``bbox_pred_0``, ... by level, as they leave it; a segmentor's ``logits`` [N, K, H, W], of
    the image's size, or ``depth`` [N, 1, H, W]. Batch, height and width are left open where torch
    can export that; else sizes, and then the batch, are fixed.

    onnxruntime then runs the file on random images: of that size, of another batch, another size
    and an odd one. Where an output differs from the model's by more than 1e-4 of its largest value
    the file is thrown away.

    Args:
        model: A detector, segmentor or backbone, with its weights; left alone.
        file: NAME.onnx; what is there already is overwritten. Above 1.5 GB the weights go to
            NAME.onnx.data beside it.
        part: 'backbone'; 'neck', for both; 'model', for dense heads and segmentors as well. By
            default as much as there is.
        size: H and W that it is checked at, and that are fixed if sizes are.
        deploy: Take the backbone's form for deployment; it is compared with what it was before.
        fixed: Fix the batch at 1, and the size.
        normalize: Let the file subtract the mean and divide by std.

    Raises:
        UserError: Missing packages, a torch before 2.5, a file that cannot be written, a part that
            the model doesn't have or that cannot be exported, outputs that differ.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise UserError(f'ONNX needs more packages: pip install {" ".join(missing)}')
    if 'dynamic_shapes' not in inspect.signature(torch.onnx.export).parameters:  # before 2.5
        raise UserError(
            f'torch {torch.__version__} is too old for ONNX: pip install -U torch torchvision'
        )
    file = Path(file).expanduser()
    if file.suffix != '.onnx':
        raise UserError(f'{file} must end in .onnx')
    check_writable(file)
    part = _choose(model, part)
    preprocessing = _preprocessing(model)
    if normalize and not preprocessing.mean:
        raise UserError(f'{type(model).__name__} has no mean and std to normalize by')
    expected = _Network(model, part, preprocessing if normalize else None)
    names = _names(expected, size)
    network = expected
    if deploy:
        network = copy.deepcopy(expected)
        deploy_backbone(network)
    for module in network.modules():
        if getattr(module, 'inplace', False):
            module.inplace = False  # torch takes activations apart that write in place
    notes = dict(part=part, version=mmdense.__version__, preprocessing=vars(preprocessing))
    why = ''
    with tempfile.TemporaryDirectory(prefix='.export-', dir=file.parent) as folder:
        written = Path(folder, file.name)
        for free in FREEDOMS[-1:] if fixed else FREEDOMS:
            try:
                shapes, opset = _write(network, written, names, size, free, notes)
                checks = _check(written, expected, size, free)
                break
            except _Failed as error:
                if not free:
                    raise UserError(f'no {file} written: {error}') from error
                why = why or str(error)
        count = 0
        for each in Path(folder).iterdir():
            count += each.stat().st_size
            each.replace(file.parent / each.name)
    return Exported(
        file=file,
        part=part,
        bytes=count,
        opset=opset,
        shapes=shapes,
        fixed=why,
        checks=tuple(checks),
        preprocessing=preprocessing,
        normalized=normalize,
    )


class _Failed(Exception):
    """A network that torch cannot export in one way, or a file that is not the network."""


def _choose(model: nn.Module, part: str | None) -> str:
    """Return the part of a model that is to be exported."""
    kind = type(model).__name__
    neck = getattr(model, 'neck', None) is not None
    whole = _is_segmentor(model) or _is_dense(model)
    if part is None:
        return 'model' if whole else 'neck' if neck else 'backbone'
    if part not in PARTS:
        raise ValueError(f'part is {part!r}, must be one of {PARTS}')
    if part == 'neck' and not neck:
        raise UserError(f'{kind} has no neck: export its backbone')
    if part == 'model' and not whole:
        raise UserError(
            f'{kind} is exported up to its neck: proposals, and boxes made from them, are not '
            'for ONNX here'
        )
    return part


def _is_segmentor(model: nn.Module) -> bool:
    return isinstance(getattr(model, 'decode_head', None), nn.Module) and not isinstance(
        model.decode_head, nn.ModuleList
    )


def _is_dense(model: nn.Module) -> bool:
    """Whether it is a detector of one stage, whose head reads the neck's maps."""
    between = any(hasattr(model, name) for name in ('roi_head', 'encoder'))
    return hasattr(model, 'bbox_head') and not between


def _preprocessing(model: nn.Module) -> Preprocessing:
    said = getattr(model, 'data_preprocessor', None)
    flips = getattr(said, '_channel_conversion', getattr(said, 'channel_conversion', None))
    if flips is None:  # (the second name is mmseg's own of 1.2)
        return Preprocessing()
    values = [getattr(said, name, None) for name in ('mean', 'std')]
    mean, std = ((), ()) if values[0] is None else [tuple(v.flatten().tolist()) for v in values]
    return Preprocessing(
        channels='RGB' if flips else 'BGR',  # mmcv reads BGR
        mean=mean,
        std=std,
        multiple=getattr(said, 'pad_size_divisor', 1),
    )


class _Network(nn.Module):
    """A part of a model as one network: images [N, C, H, W] to a tuple of tensors.

    Args:
        model: Copied to the CPU, in float32, in evaluation.
        part: One of ``PARTS``.
        normalization: Mean and std to normalize by.
    """

    def __init__(self, model: nn.Module, part: str, normalization: Preprocessing | None) -> None:
        super().__init__()
        model = copy.deepcopy(model).float().cpu().eval().requires_grad_(False)
        self.backbone = getattr(model, 'backbone', model)
        self.neck = getattr(model, 'neck', None) if part != 'backbone' else None
        self.segments = part == 'model' and _is_segmentor(model)
        self.head = None
        if part == 'model':
            self.head = model.decode_head if self.segments else model.bbox_head
        self.test_cfg = getattr(model, 'test_cfg', None)
        self.channels = next(p for p in self.backbone.parameters() if p.dim() == 4).shape[1]
        for name in ('mean', 'std'):
            values = None
            if normalization is not None:
                values = torch.tensor(getattr(normalization, name))[:, None, None]
            self.register_buffer(name, values)
        _replace_pools(self)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        x = image if self.mean is None else (image - self.mean) / self.std
        maps = self.backbone(x)
        if self.neck is not None:
            maps = self.neck(maps)
        if self.head is None:
            return (maps,) if isinstance(maps, Tensor) else tuple(maps)
        if self.segments:
            size = image.shape[2:]
            meta = dict(ori_shape=size, img_shape=size, pad_shape=size)
            return (self.head.predict(maps, [meta], self.test_cfg),)
        found = self.head(maps)
        if isinstance(found, Tensor) or len(found) != len(HEAD_OUTPUTS):
            raise UserError(
                f'what {type(self.head).__name__} returns is not scores and boxes alone: export '
                'the neck'
            )
        return tuple(level for levels in found for level in levels)

    def images(self, number: int, height: int, width: int) -> Tensor:
        """Return random images as the network takes them, always the same."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(number, self.channels, height, width, generator=generator)
        return images if self.mean is None else images * self.std + self.mean


class _AdaptivePool(nn.Module):
    """``nn.AdaptiveAvgPool2d`` for maps of open size, for which ONNX has no operator.

    Means over windows are products with what each pixel's share of them is: [N, C, H, W] to
    [N, C, h, w].

    Args:
        size: h and w.
    """

    def __init__(self, size: tuple[int, int]) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        if self.size == (1, 1):
            return x.mean((2, 3), keepdim=True)
        rows, columns = (_windows(*sides, x) for sides in zip(self.size, x.shape[2:], strict=True))
        return rows @ x @ columns.t()


def _windows(number: int, side: int, like: Tensor) -> Tensor:
    """Return the shares [number, side] of pixels in windows, which torch lets overlap."""
    index = torch.arange(number, device=like.device)[:, None]
    pixel = torch.arange(side, device=like.device)
    inside = (pixel >= index * side // number) & (pixel * number < (index + 1) * side)
    shares = inside.to(like.dtype)
    return shares / shares.sum(1, keepdim=True)


def _replace_pools(module: nn.Module) -> None:
    for name, child in module.named_children():
        if type(child) is nn.AdaptiveAvgPool2d:
            sides = child.output_size
            sides = (sides, sides) if isinstance(sides, int) else tuple(sides)
            if None not in sides:  # a side as long as the map's
                setattr(module, name, _AdaptivePool(sides))
        else:
            _replace_pools(child)


def _outputs(network: _Network, image: tuple[int, int, int]) -> tuple[Tensor, ...]:
    """Return what a network makes of random images of N, H and W."""
    try:
        with torch.no_grad():
            return network(network.images(*image))
    except ValueError as error:  # too small an image
        raise UserError(str(error)) from error


def _names(network: _Network, size: tuple[int, int]) -> list[str]:
    """Return names for a network's outputs."""
    outputs = _outputs(network, (1, *size))
    if network.segments:
        return ['depth' if hasattr(network.head, 'max_depth') else 'logits']
    if network.head is not None:
        levels = range(len(outputs) // len(HEAD_OUTPUTS))
        return [f'{name}_{level}' for name in HEAD_OUTPUTS for level in levels]
    if network.neck is None and isinstance(network.backbone, Backbone):
        levels = [round(math.log2(stride)) for stride in network.backbone.out_strides]
    else:
        levels = _levels(outputs, size)
    letter = 'c' if network.neck is None else 'p'
    names: list[str] = []
    for level in levels:
        again = levels[: len(names)].count(level)
        names.append(f'{letter}{level}' + (f'_{again}' if again else ''))
    return names


def _levels(maps: Sequence[Tensor], size: tuple[int, int]) -> list[int]:
    """Return the logarithm of each map's stride: where sides are rounded, one more than before."""
    side, levels = max(size), []
    for x in maps:
        pixels = max(x.shape[2:])
        if levels and abs(pixels - side / 2 ** (levels[-1] + 1)) < 1:
            levels.append(levels[-1] + 1)
        else:
            levels.append(round(math.log2(side / pixels)))
    return levels


def _write(
    network: _Network,
    file: Path,
    names: list[str],
    size: tuple[int, int],
    free: Sequence[str],
    notes: Mapping[str, Any],
) -> tuple[dict[str, tuple[int | str, ...]], int]:
    """Write a network to a file, with the axes in ``free`` open; return shapes and the opset.

    Raises:
        _Failed: torch cannot, or fixes an axis.
    """
    axes = {axis: name for axis, name in AXES.items() if name in free}
    height, width = size
    if 'width' in free and height == width:
        width += 32  # what is equal here might be taken for equal always
    images = network.images(2 if 'batch' in free else 1, height, width)
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                network,
                (images,),
                input_names=['image'],
                output_names=names,
                dynamic_shapes=(axes,) if axes else None,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # of whatever library: torch's says more in its cause
        raise _Failed(f'torch cannot export it ({one_line(error.__cause__ or error)})') from error
    graph = program.model.graph
    values = [*graph.inputs, *graph.outputs]
    for value in graph.outputs:
        for axis, name in AXES.items():
            side = value.shape[axis]
            if not isinstance(side, int) and side.value not in free:  # a long formula
                value.shape[axis] = f'{value.name}_{name}'
    shapes = {value.name: tuple(map(_side, value.shape)) for value in values}
    for axis, name in axes.items():
        if isinstance(shapes['image'][axis], int):
            raise _Failed(f'torch exports it for one {name} alone')
    for node in graph:  # lines of our sources, which nobody else has
        node.metadata_props.clear()
    program.model.metadata_props['mmdense'] = json.dumps(notes)
    program.save(file, external_data=False)
    return shapes, program.model.opset_imports['']


def _side(side: Any) -> int | str:
    return side if isinstance(side, int) else str(side.value)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence what exporting says on the way: it either works, or ends in an error."""
    loggers = [logging.getLogger(name) for name in LOGGERS]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.CRITICAL)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _check(
    file: Path, expected: _Network, size: tuple[int, int], free: Sequence[str]
) -> list[Check]:
    """Compare a file's outputs with a network's on random images.

    Raises:
        _Failed: onnxruntime cannot run it, or an output differs.
    """
    session = _session(file)
    height, width = size
    images = [(1, height, width)]
    if 'batch' in free:
        images.append((3, height, width))
    if 'height' in free:
        images += [(1, height + 32, width + 64), (1, height + 45, width + 13)]
    return [_compare(session, expected, image) for image in images]


def _session(file: Path) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        return onnxruntime.InferenceSession(file, options, providers=['CPUExecutionProvider'])
    except Exception as error:  # onnxruntime has a dozen of its own
        raise _Failed(f'onnxruntime cannot load it ({one_line(error)})') from error


def _compare(session: Any, expected: _Network, image: tuple[int, int, int]) -> Check:
    wanted = _outputs(expected, image)
    shown = ' x '.join(map(str, image))
    names = [output.name for output in session.get_outputs()]
    try:
        found = session.run(names, dict(image=expected.images(*image).numpy()))
    except Exception as error:  # as above
        raise _Failed(f'onnxruntime cannot run it on {shown} ({one_line(error)})') from error
    differences = {}
    for name, a, b in zip(names, found, wanted, strict=True):
        if a.shape != tuple(b.shape):
            raise _Failed(f'{name} is {a.shape} for images of {shown}, must be {tuple(b.shape)}')
        differences[name] = relative_difference(torch.from_numpy(a), b)
        if not differences[name] <= TOLERANCE:
            raise _Failed(
                f'{name} differs from the model by {differences[name]:.1e} of its largest value '
                f'for images of {shown}, and may by {TOLERANCE:.0e}'
            )
    return Check(image, differences)
