"""Export parts of a model to ONNX, checked against the model by onnxruntime.

A file ends where a model's Python code begins: anchors, box decoding, NMS and everything after
proposals are up to the caller.

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
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, replace
from importlib.util import find_spec
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.utils import _pair

import mmdense
from mmdense.apis.deployment import TOLERANCE, relative_difference
from mmdense.errors import UserError, one_line
from mmdense.files import check_writable
from mmdense.models.deploy import deploy as deploy_backbone

PARTS = ('backbone', 'neck', 'model')
PACKAGES = ('onnx', 'onnxscript', 'onnxruntime')
AXES = {0: 'batch', 2: 'height', 3: 'width'}
DYNAMIC_AXES = (AXES, {0: 'batch'}, {})  # in the order of trying
HEAD_OUTPUTS = ('cls_score', 'bbox_pred', 'score_factor')  # the last: objectness or centerness
DIVISORS = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True)
class Preprocessing:
    """What the model's data preprocessor does to pixels from 0 to 255."""

    channels: str = ''  # their order, 'RGB' or 'BGR'; '' if the model has no data preprocessor
    mean: tuple[float, ...] = ()  # subtracted per channel; empty if nothing is
    std: tuple[float, ...] = ()  # divided by per channel, after that
    multiple: int = 1  # height and width are padded to one of this, at the bottom and right


@dataclass(frozen=True)
class Exported:
    """An exported file."""

    file: Path
    part: str  # one of PARTS
    bytes: int  # with external weights
    opset: int  # version of the ONNX operators
    shapes: Mapping[str, tuple[int | str, ...]]  # of ``image`` and outputs; dynamic axes are names
    fixed: str  # why axes are fixed that were to be dynamic; '' if none is
    # (N, H, W) of each batch -> output -> largest difference from the model, as a share of the
    # output's largest value.
    checks: Mapping[tuple[int, int, int], Mapping[str, float]]
    preprocessing: Preprocessing  # of the model
    normalized: bool  # whether the file itself subtracts the mean and divides by std


class _ExportError(Exception):
    """The model cannot be exported with these dynamic axes, or the file differs from it."""


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
    """Export a part of a model to an ONNX file of standard operators, in float32.

    The input is ``image`` [N, C, H, W]. Outputs are the feature maps of a backbone, ``c2``, ``c3``,
    ... (log2 of the stride), or of a neck, ``p2``, ``p3``, ...; the raw outputs of a dense head by
    level, ``cls_score_0``, ..., ``bbox_pred_0``, ... and of some ``score_factor_0``, ...; or a
    segmentor's ``logits`` [N, K, H, W] or ``depth`` [N, 1, H, W], of the image's size. Batch size,
    height and width are dynamic if torch can export that; otherwise the batch size is, or nothing.

    onnxruntime then runs the file on random images: of the given size, of another batch size, of
    another size, and of an odd size, or the nearest that the model takes. If an output differs from
    the model's by more than 1e-4 of its largest value, no file is written.

    Args:
        model: A detector, segmentor or backbone with its weights; it is not modified.
        file: Path of the .onnx file, overwritten if it exists. Above 1.5 GB, weights go to
            NAME.onnx.data beside it.
        part: 'backbone'; 'neck', after the backbone; 'model', with the dense head or segmentation
            head too. By default as much as the model allows.
        size: H and W of the check, and of the input if its size is fixed.
        deploy: Export the backbone's form for deployment, checked against the form before.
        fixed: Fix the batch size at 1, and the image size.
        normalize: Subtract the mean and divide by std in the file.

    Raises:
        UserError: if packages are missing, torch is older than 2.5, the file cannot be written, the
            model does not have the part, it cannot be exported, or the outputs differ.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise UserError(f'ONNX export needs more packages: pip install {" ".join(missing)}')
    if 'dynamic_shapes' not in inspect.signature(torch.onnx.export).parameters:  # before 2.5
        raise UserError(
            f'torch {torch.__version__} is too old for ONNX: pip install -U torch torchvision'
        )
    file = Path(file).expanduser()
    if file.suffix != '.onnx':
        raise UserError(f'{file} must end in .onnx')
    check_writable(file)
    part = _choose_part(model, part)
    preprocessing = _preprocessing_of(model)
    if normalize and not preprocessing.mean:
        raise UserError(f'{type(model).__name__} has no mean and std to normalize by')
    expected = _Network(model, part, preprocessing if normalize else None)
    multiple = _least_multiple(expected, size)
    if any(side % multiple for side in size):
        raise UserError(f'{type(model).__name__} takes sides that are multiples of {multiple} only')
    preprocessing = replace(preprocessing, multiple=math.lcm(multiple, preprocessing.multiple))
    names = _output_names(expected, size)
    network = expected
    if deploy:
        network = copy.deepcopy(expected)
        deploy_backbone(network)
    for module in network.modules():
        if getattr(module, 'inplace', False):
            module.inplace = False  # torch.export decomposes in-place activations
    metadata = dict(part=part, version=mmdense.__version__, preprocessing=vars(preprocessing))
    reason = ''
    with tempfile.TemporaryDirectory(prefix='.export-', dir=file.parent) as folder:
        draft = Path(folder, file.name)
        for axes in DYNAMIC_AXES[-1:] if fixed else DYNAMIC_AXES:
            try:
                shapes, opset = _write(network, draft, names, size, axes, metadata)
                checks = _check(draft, names, expected, size, axes, multiple)
                break
            except _ExportError as error:
                if not axes:
                    raise UserError(f'{file} was not written: {error}') from error
                reason = reason or str(error)
        written = list(Path(folder).iterdir())  # the draft, and external weights
        total = sum(path.stat().st_size for path in written)
        for path in written:
            path.replace(file.parent / path.name)
    return Exported(
        file, part, total, opset, shapes, reason, checks, preprocessing, normalized=normalize
    )


def _choose_part(model: nn.Module, part: str | None) -> str:
    kind = type(model).__name__
    has_neck = getattr(model, 'neck', None) is not None
    has_head = _head_of(model) is not None
    part = part or ('model' if has_head else 'neck' if has_neck else 'backbone')
    if part not in PARTS:
        raise ValueError(f'part is {part!r}, must be one of {PARTS}')
    if part == 'neck' and not has_neck:
        raise UserError(f'{kind} has no neck: export its backbone')
    if part == 'model' and not has_head:
        raise UserError(
            f'{kind} can be exported up to its neck only: its proposals, and everything after '
            'them, are not supported'
        )
    return part


def _head_of(model: nn.Module) -> nn.Module | None:
    """Return the head of a segmentor or one-stage detector, which reads the neck's outputs."""
    if hasattr(model, 'roi_head') or hasattr(model, 'encoder'):
        return None
    head = getattr(model, 'decode_head', None) or getattr(model, 'bbox_head', None)
    return None if isinstance(head, nn.ModuleList) else head  # cascades


def _preprocessing_of(model: nn.Module) -> Preprocessing:
    preprocessor = getattr(model, 'data_preprocessor', None)
    flips = getattr(preprocessor, '_channel_conversion', None)  # mmengine's
    flips = getattr(preprocessor, 'channel_conversion', flips)  # mmseg 1.2's
    if flips is None:
        return Preprocessing()
    mean, std = (
        tuple(getattr(preprocessor, key, torch.empty(0)).flatten().tolist())
        for key in ('mean', 'std')
    )
    multiple = getattr(preprocessor, 'pad_size_divisor', 1)
    return Preprocessing('RGB' if flips else 'BGR', mean, std, multiple)  # mmcv reads BGR


class _Network(nn.Module):
    """A part of a model, copied to the CPU in float32: images [N, C, H, W] to a tuple of tensors.

    It normalizes the images if there is a ``normalization``, by mean and std.
    """

    def __init__(self, model: nn.Module, part: str, normalization: Preprocessing | None) -> None:
        super().__init__()
        model = copy.deepcopy(model).float().cpu().eval().requires_grad_(False)
        self.backbone = getattr(model, 'backbone', model)
        self.neck = getattr(model, 'neck', None) if part != 'backbone' else None
        self.head = _head_of(model) if part == 'model' else None
        self.segments = self.head is not None and hasattr(model, 'decode_head')
        self.test_cfg = getattr(model, 'test_cfg', None)
        self.channels = next(p for p in self.backbone.parameters() if p.dim() == 4).shape[1]
        for name in ('mean', 'std'):
            values = None
            if normalization:
                values = torch.tensor(getattr(normalization, name))[:, None, None]
            self.register_buffer(name, values)
        for parent in list(self.modules()):
            for name, child in parent.named_children():
                if type(child) is nn.AdaptiveAvgPool2d:
                    setattr(parent, name, _AdaptivePool(child.output_size))

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        x = image if self.mean is None else (image - self.mean) / self.std
        features = self.backbone(x)
        if self.neck is not None:
            features = self.neck(features)
        if self.head is None:
            return (features,) if isinstance(features, Tensor) else tuple(features)
        if self.segments:
            size = image.shape[2:]
            meta = dict(ori_shape=size, img_shape=size, pad_shape=size)
            return (self.head.predict(features, [meta], self.test_cfg),)
        outputs = self.head(features)
        if isinstance(outputs, Tensor) or not 2 <= len(outputs) <= len(HEAD_OUTPUTS):
            raise UserError(
                f'{type(self.head).__name__} returns more than scores and boxes: export the neck'
            )
        self.kinds = len(outputs)
        return tuple(level for levels in outputs for level in levels)

    def random_images(self, number: int, height: int, width: int) -> Tensor:
        """Return random images in the network's range, the same in each call."""
        generator = torch.Generator().manual_seed(0)
        images = torch.randn(number, self.channels, height, width, generator=generator)
        return images if self.mean is None else images * self.std + self.mean

    def run(self, image: tuple[int, int, int]) -> tuple[Tensor, ...]:
        """Return the outputs for random images, given by N, H and W."""
        try:
            with torch.no_grad():
                return self(self.random_images(*image))
        except ValueError as error:  # the image is too small
            raise UserError(str(error)) from error


class _AdaptivePool(nn.AdaptiveAvgPool2d):
    """Adaptive pooling for dynamic sizes, which ONNX has no operator for.

    Means over windows are matrix products: [N, C, H, W] to [N, C, h, w].
    """

    def forward(self, x: Tensor) -> Tensor:
        counts = _pair(self.output_size)
        if counts == (1, 1):
            return x.mean((2, 3), keepdim=True)
        rows, columns = (_windows(*sides, x) for sides in zip(counts, x.shape[2:], strict=True))
        return rows @ x @ columns.t()


def _windows(count: int | None, side: int, like: Tensor) -> Tensor:
    """Return the weights [count, side] of pixels in windows, which may overlap."""
    count = count or side
    index = torch.arange(count, device=like.device)[:, None]
    pixel = torch.arange(side, device=like.device)
    inside = (pixel >= index * side // count) & (pixel * count < (index + 1) * side)
    weights = inside.to(like.dtype)
    return weights / weights.sum(1, keepdim=True)


def _least_multiple(network: _Network, size: tuple[int, int]) -> int:
    """Return what height and width must be multiples of; some necks add maps of unequal sizes."""
    for multiple in DIVISORS:
        try:
            network.run(_odd(size, multiple))
        except UserError:
            raise
        except (AssertionError, RuntimeError):
            continue
        return multiple
    return 1  # it takes no other size at all


def _odd(size: tuple[int, int], multiple: int) -> tuple[int, int, int]:
    """Return the shape of a larger image: sides just above and below what halves best."""
    height, width = (side // DIVISORS[-1] * DIVISORS[-1] for side in size)
    return 1, height + DIVISORS[-1] + multiple, width + 2 * DIVISORS[-1] - multiple


def _output_names(network: _Network, size: tuple[int, int]) -> list[str]:
    try:
        outputs = network.run((1, *size))
    except UserError:
        raise
    except (AssertionError, RuntimeError) as error:
        raise UserError(f'no run on images of {size[0]} x {size[1]}: {one_line(error)}') from error
    if network.segments:
        return ['depth' if hasattr(network.head, 'max_depth') else 'logits']
    if network.head is not None:
        kinds = HEAD_OUTPUTS[: network.kinds]
        levels = range(len(outputs) // len(kinds))
        return [f'{name}_{level}' for name in kinds for level in levels]
    letter = 'c' if network.neck is None else 'p'
    sides = [max(size), *(max(x.shape[2:]) for x in outputs)]
    levels = [*accumulate(round(math.log2(a / b)) for a, b in pairwise(sides))]  # strides 2^level
    names = []
    for i, level in enumerate(levels):
        repeat = levels[:i].count(level)
        names.append(f'{letter}{level}' + (f'_{repeat}' if repeat else ''))
    return names


def _write(
    network: _Network,
    file: Path,
    names: list[str],
    size: tuple[int, int],
    axes: Mapping[int, str],
    metadata: Mapping[str, Any],
) -> tuple[dict[str, tuple[int | str, ...]], int]:
    """Write a network with these dynamic axes to a file; return its shapes and opset."""
    height, width = size
    if 3 in axes and height == width:
        width += 32  # torch might take two equal sides for one
    images = network.random_images(2 if axes else 1, height, width)
    try:
        with ExitStack() as stack, warnings.catch_warnings(), torch.no_grad():
            stack.callback(logging.disable, logging.root.manager.disable)
            logging.disable(logging.CRITICAL)  # the exporter either works or raises an error
            warnings.simplefilter('ignore')
            program = torch.onnx.export(
                network,
                (images,),
                input_names=['image'],
                output_names=names,
                dynamic_shapes=(axes,) if axes else None,
                dynamo=True,
                verbose=False,
            )
    except Exception as error:  # torch and onnxscript raise many; the cause says most
        reason = one_line(error.__cause__ or error)
        raise _ExportError(f'torch cannot export it ({reason})') from error
    graph = program.model.graph
    for value in graph.outputs:
        for axis, name in AXES.items():
            side = value.shape[axis]
            if not isinstance(side, int) and side.value not in axes.values():  # a long formula
                value.shape[axis] = f'{value.name}_{name}'
    shapes = {
        value.name: tuple(s if isinstance(s, int) else str(s.value) for s in value.shape)
        for value in (*graph.inputs, *graph.outputs)
    }
    for node in graph:  # stack traces of this machine
        node.metadata_props.clear()
    program.model.metadata_props['mmdense'] = json.dumps(metadata)
    program.save(file, external_data=False)
    return shapes, program.model.opset_imports['']


def _check(
    file: Path,
    names: list[str],
    expected: _Network,
    size: tuple[int, int],
    axes: Mapping[int, str],
    multiple: int,
) -> dict[tuple[int, int, int], dict[str, float]]:
    """Compare a file's outputs with a network's on batches of random images."""
    import onnxruntime

    height, width = size
    batches = [(1, height, width)]
    if 0 in axes:
        batches.append((3, height, width))
    if 2 in axes:
        step = max(32, multiple)
        batches += [(1, height + step, width + 2 * step), _odd(size, multiple)]
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(file, options, providers=['CPUExecutionProvider'])
        outputs = [
            session.run(names, dict(image=expected.random_images(*batch).numpy()))
            for batch in batches
        ]
    except Exception as error:  # onnxruntime has a dozen classes of errors
        raise _ExportError(f'onnxruntime cannot run it ({one_line(error)})') from error
    checks = {}
    for batch, arrays in zip(batches, outputs, strict=True):
        images = f'images of {" x ".join(map(str, batch))}'
        checks[batch] = {}
        for name, a, b in zip(names, arrays, expected.run(batch), strict=True):
            if a.shape != tuple(b.shape):
                raise _ExportError(f'{name} is {a.shape} for {images}, must be {tuple(b.shape)}')
            difference = relative_difference(torch.from_numpy(a), b)
            checks[batch][name] = difference
            if not difference <= TOLERANCE:  # NaN too
                raise _ExportError(
                    f'{name} differs from the model by {difference:.1e} of its largest value '
                    f'for {images} (allowed: {TOLERANCE:.0e})'
                )
    return checks
