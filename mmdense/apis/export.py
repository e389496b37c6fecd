"""Export a model to ONNX: boxes, masks, a segmentation or classes in a file, or its parts."""

import copy
import inspect
import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from torch import nn

from mmdense.apis.classes import describe_classes, num_classes_of
from mmdense.errors import UserError, one_line
from mmdense.export.check import check_file, find_images
from mmdense.export.graph import AXES, write_graph
from mmdense.export.metadata import build_metadata, inner_dataset
from mmdense.export.networks import Detector, Network, Part, Preprocessing, build_network
from mmdense.files import check_writable
from mmdense.models.deploy import deploy as deploy_backbone

PACKAGES = ('onnx', 'onnxscript', 'onnxruntime')
# Dynamic sides are traced with these, as torch takes equal sides of a feature map for one, and a
# side of one pixel for constant.
TRACED = (1088, 2176)
DYNAMIC_AXES = (AXES, {0: 'batch'}, {})  # in the order of trying


@dataclass(frozen=True)
class Exported:
    """An exported file."""

    file: Path
    bytes: int  # with external weights
    opset: int  # version of the ONNX operators
    shapes: Mapping[str, tuple[int | str, ...]]  # of ``images`` and outputs; dynamic axes are names
    fixed: str  # why axes are fixed that were to be dynamic; '' if none is
    batches: Sequence[tuple[int, int, int]]  # N, H, W of those that were compared with the model
    differences: Mapping[str, float]  # from the model, the largest by output
    network: Network  # the model, with preprocessing, before deployment
    metadata: Mapping[str, Any]  # see mmdense.export.metadata
    unread: str  # what the file doesn't say about resizing images, and why; '' if it says all


def export_onnx(
    model: nn.Module,
    file: str | Path,
    *,
    part: str | None = None,
    config: Config | None = None,
    meta: Mapping[str, Any] | None = None,
    size: tuple[int, int] = (512, 512),
    deploy: bool = True,
    dtype: str = 'uint8',
    fixed: bool = False,
    score: float | None = None,
    iou: float | None = None,
    max_per_img: int | None = None,
) -> Exported:
    """Export a model to an ONNX file of standard operators, in float32.

    The input is ``images`` [N, 3, H, W], RGB from 0 to 255; channel order, normalization and
    padding are inside. Outputs: see :class:`.Detector`, :class:`.Segmentor`, :class:`.Classifier`
    and :class:`.Part`. Batch size, height and width are dynamic if torch can export that; otherwise
    the batch size is, or nothing. :mod:`.metadata` describes what the file says about itself.

    onnxruntime then runs the file on several batches of the config's validation images, if there
    are some. UserError, and no file, if its outputs differ from the model's predictions, the model
    does not have the part or cannot be exported, packages are missing, torch is older than 2.6, or
    the file cannot be written.

    Args:
        model: A detector, segmentor, classifier or backbone with its weights; it is not modified.
        file: Path of the .onnx file, overwritten if it exists. Above 1.5 GB, weights go to
            NAME.onnx.data beside it.
        part: See :func:`.build_network`.
        config: The model's config, from which the file gets its classes and the resizing of images.
        meta: Metadata of the checkpoint, whose class names come before the config's.
        size: H and W of the check, and of the input if its size is fixed.
        deploy: Export the backbone's inference form, if it has one.
        dtype: Of ``images``: 'uint8' or 'float32'.
        fixed: Fix the batch size at 1, and the image size.
        score, iou, max_per_img: In place of the ``test_cfg``'s lowest score of boxes, IoU threshold
            of NMS, and most boxes of an image.
    """
    missing = [name for name in PACKAGES if find_spec(name) is None]
    if missing:
        raise UserError(f'ONNX export needs more packages: pip install {" ".join(missing)}')
    parameters = inspect.signature(torch.onnx.export).parameters
    if 'custom_translation_table' not in parameters:  # before 2.6
        raise UserError(
            f'torch {torch.__version__} is too old for ONNX: pip install -U torch torchvision'
        )
    file = Path(file).expanduser()
    if file.suffix != '.onnx':
        raise UserError(f'{file} must end in .onnx')
    check_writable(file)
    expected = build_network(model, part)
    settings = dict(score=score, iou=iou, max_per_img=max_per_img)
    if isinstance(expected, Detector):
        expected.override(**settings)
    elif given := [name for name, value in settings.items() if value is not None]:
        raise UserError(f'{", ".join(given)}: complete detectors only, not part {expected.part!r}')
    steps = (inner_dataset(config) or {}).get('pipeline')
    if expected.task == 'classification' and steps and 'Load' not in str(steps[0]['type']):
        # mmpretrain's data in memory are RGB, as CIFAR, where files are BGR.
        raise UserError('the test pipeline loads no files: pass a config with LoadImageFromFile')
    expected.fit_divisor(size)
    if isinstance(expected, Part):
        expected.name_outputs(size)
    network = copy.deepcopy(expected)
    if deploy and any(hasattr(module, 'switch_to_deploy') for module in network.modules()):
        try:
            deploy_backbone(network)
        except UserError as error:
            raise UserError(f'{error} (or --no-deploy exports it as it is)') from error
    dtype = dtype if expected.preprocess.order else 'float32'
    count = None if expected.task == 'depth' else num_classes_of(model)
    named = count is not None and inner_dataset(config) is not None
    names = describe_classes(model, config, meta or {}) if named else ()
    metadata, unread = build_metadata(expected, *names, dtype=dtype, config=config)
    reason = ''
    with tempfile.TemporaryDirectory(prefix='.export-', dir=file.parent) as folder:
        draft = Path(folder, file.name)
        for axes in DYNAMIC_AXES[-1:] if fixed else DYNAMIC_AXES:
            try:
                shapes, opset = _write(network, draft, size, axes, metadata)
                batches, differences = _check(draft, expected, axes, size, config)
                break
            except UserError as error:
                if not axes:
                    raise UserError(f'{file} was not written: {error}') from error
                reason = reason or str(error)
        written = list(Path(folder).glob(f'{file.name}*'))  # the draft, and external weights
        total = sum(path.stat().st_size for path in written)
        for path in written:
            path.replace(file.parent / path.name)
    return Exported(
        file, total, opset, shapes, reason, batches, differences, expected, metadata, unread
    )


def _write(
    network: Network,
    file: Path,
    size: tuple[int, int],
    axes: Mapping[int, str],
    metadata: Mapping[str, Any],
) -> tuple[dict[str, tuple[int | str, ...]], int]:
    height, width = size
    if 3 in axes:
        height, width = TRACED
    dtype = getattr(torch, metadata['input']['dtype'])
    number = 5 if axes else 1  # torch might take 2 x 256 channels for a fixed batch size
    images = network.random_images(number, height, width, dtype)
    try:
        return write_graph(network, images, file, network.names, axes, metadata)
    except Exception as error:  # torch and onnxscript raise many; the cause says most
        reason = one_line(error.__cause__ or error)
        raise UserError(f'torch cannot export it ({reason})') from error


def _check(
    file: Path, network: Network, axes: Mapping[int, str], size: tuple[int, int], config: Any
) -> tuple[list[tuple[int, int, int]], dict[str, float]]:
    """Compare a file with its network on several batches, and return them."""
    divisor = network.preprocess.divisor
    pads = network.part != 'model' or Preprocessing(network.model).divisor == divisor
    height, width = size if pads else (math.ceil(side / divisor) * divisor for side in size)
    batches = [(1, height, width)]
    if 0 in axes:
        batches.append((3, height, width))
    if 2 in axes:
        step = math.lcm(32, divisor)
        odd = (1, height + 1, width + 31)  # where the model pads itself
        batches += [(2, height + step, width + 2 * step), *([odd] if pads else [])]
    return batches, check_file(file, network, batches, find_images(config))
