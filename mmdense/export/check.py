"""An exported file's outputs beside those of its model, on the same images.

Boxes are compared in pairs. If more than rounding differs, the model's own sensitivity decides: the
file may not differ more than the model itself after noise of 1e-5. With random weights such noise
ranks the proposals, with trained ones it changes ties only.
"""

import copy
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import DATASETS, DefaultScope
from mmengine.structures import BaseDataElement
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from mmdense.errors import UserError, explain
from mmdense.export.metadata import inner_dataset
from mmdense.export.networks import Network
from mmdense.export.onnx_model import OnnxModel

# Share of boxes lost or added, pixels, probabilities, shares of a mask's and of an image's pixels.
LIMITS = dict(lost=0.0, boxes=1e-3, scores=1e-5, masks=1e-3, segmentation=1e-4)
VALUES = 1e-4  # of the largest value of other outputs
NOISE = 1e-5  # of normalized pixels
TIES = 1e-5  # of scores
SEVERAL = 10  # times the change by noise: the rounding of all layers adds up
ROUGH = dict.fromkeys(LIMITS, math.inf) | dict(lost=0.5, segmentation=0.5)  # of lower precision,
CONFIDENT = 0.3  # for boxes and classes with such a score

Batches = Iterable[tuple[int, int, int]]  # N, H and W of each


def find_images(cfg: Config | None, count: int = 3, loader: str = 'test') -> list[Tensor]:
    """Return images of a loader's data, uint8 [3, H, W] in BGR, by the test pipeline, or none."""
    try:
        dataset = dict(inner_dataset(cfg, loader), pipeline=inner_dataset(cfg).pipeline)
        with DefaultScope.overwrite_default_scope(cfg.get('default_scope')):
            dataset = DATASETS.build(dataset)
        images = [dataset[i]['inputs'] for i in range(min(count, len(dataset)))]
    except (AttributeError, OSError, RuntimeError, TypeError, UserError):  # no loader, no files
        return []
    return [x.round().byte() if x.is_floating_point() else x for x in images]


def resize(images: Tensor, size: Sequence[int]) -> Tensor:
    """Return images [N, 3, H, W] of another size, uint8."""
    images = nn.functional.interpolate(images.float(), tuple(size), mode='bilinear', antialias=True)
    return images.round().clamp(0, 255).byte()


def check_file(
    file: Path, network: Network, batches: Batches, images: Sequence[Tensor] = ()
) -> dict[str, float]:
    """Return the largest differences of a file from its network before deployment, by output.

    Of a complete model, predictions are compared, with a score threshold of 0 where there are no
    boxes, and in lower precision only that they overlap; of a part, outputs on random images.
    ``images`` come from :func:`find_images`; by default they are smooth noise. Scores within
    1e-5 of the threshold, or of the last of a full list, are ties. UserError if more than rounding
    differs, or onnxruntime cannot run the file.
    """
    if network.part != 'model' or network.task == 'depth':
        found, limits = _compare_outputs(file, network, batches), {}
    else:
        generator = torch.Generator().manual_seed(0)
        images = images or [*resize(255 * torch.rand(3, 3, 9, 12, generator=generator), (480, 640))]
        inputs = []
        for start, (number, *size) in enumerate(batches):
            chosen = (images[(start + i) % len(images)][None] for i in range(number))
            inputs.append(torch.cat([resize(image, size) for image in chosen]))
        found, limits = _compare_predictions(file, network.model, inputs)
    if not all(value <= limits.get(name, VALUES) for name, value in found.items()):  # NaN too
        values = ', '.join(f'{name} {value:.1g}' for name, value in found.items())
        raise UserError(f'it differs from the model: {values}')
    return found


def _compare_outputs(file: Path, network: Network, batches: Batches) -> dict[str, float]:
    import onnxruntime

    found: dict[str, float] = defaultdict(float)
    for batch in batches:
        with explain('onnxruntime cannot run it'):
            session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])
            dtype = torch.uint8 if 'uint8' in session.get_inputs()[0].type else torch.float32
            images = network.random_images(*batch, dtype)
            arrays = session.run(list(network.names), dict(images=images.numpy()))
        with torch.no_grad():
            for name, array, b in zip(network.names, arrays, network(images), strict=True):
                a, same = torch.from_numpy(array), array.shape == b.shape
                share = (a - b).abs().max() / b.abs().max() if same else math.inf
                found[name] = float(np.maximum(found[name], share))
    return found


def _compare_predictions(
    file: Path, model: nn.Module, inputs: Sequence[Tensor]
) -> tuple[dict[str, float], dict[str, float]]:
    """Return the differences, and the largest that are allowed."""
    expected = _predict(model, inputs)
    if not any(len(sample.get('pred_instances', '1')) for sample in expected):
        file, model = _without_threshold(file, model)
        expected = _predict(model, inputs)
    onnx_model = OnnxModel(file)
    metadata = onnx_model.session.metadata
    exact = metadata['precision'] == 'float32'
    settings = metadata['postprocessing']
    found = _differences(_predict(onnx_model, inputs), expected, exact, settings)
    if not exact or all(value <= LIMITS[name] for name, value in found.items()):
        return found, LIMITS if exact else ROUGH
    add_noise = partial(torch.normal, std=NOISE, generator=torch.Generator().manual_seed(0))
    with model.backbone.register_forward_pre_hook(lambda _, args: (add_noise(args[0]), *args[1:])):
        noisy = _differences(_predict(model, inputs), expected, exact, settings)
    factors = dict.fromkeys(LIMITS, SEVERAL) | dict(lost=1)
    return found, {k: max(limit, factors[k] * noisy.get(k, 0)) for k, limit in LIMITS.items()}


@torch.no_grad()
def _predict(model: nn.Module, inputs: Iterable[Tensor]) -> list[BaseDataElement]:
    results = []
    for images in inputs:
        size = tuple(images.shape[2:])
        meta = dict(img_shape=size, ori_shape=size, pad_shape=size, scale_factor=(1, 1), img_id=0)
        samples = [DetDataSample(metainfo=meta) for _ in images]  # segmentors take it too
        samples = None if hasattr(model, 'head') else samples  # mmpretrain makes its own
        results += model.test_step(dict(inputs=list(images), data_samples=samples))
    return results


def _without_threshold(file: Path, model: nn.Module) -> tuple[Path, nn.Module]:
    """Write a copy of a file beside it, and return it and the model with a threshold of 0."""
    import onnx

    model, program = copy.deepcopy(model), onnx.load(file)
    cfg = (getattr(model, 'roi_head', None) or model.bbox_head).test_cfg
    graph, zero = program.graph, onnx.numpy_helper.from_array(np.float32(0), 'no_threshold')
    scalars = {x.name: onnx.numpy_helper.to_array(x) for x in graph.initializer if not x.dims}
    graph.initializer.append(zero)
    for node in graph.node:
        if node.op_type == 'Greater' and scalars.get(node.input[1]) == np.float32(cfg.score_thr):
            node.input[1] = zero.name
    cfg.score_thr = 0.0
    onnx.save(program, file := file.with_name('no-threshold.onnx'))
    return file, model


def _differences(
    results: Sequence[BaseDataElement],
    expected: Sequence[BaseDataElement],
    exact: bool,
    settings: Mapping[str, Any],
) -> dict[str, float]:
    values: dict[str, list[float]] = defaultdict(list)
    lost, count = 0, 0
    for a, b in zip(results, expected, strict=True):
        if 'pred_score' in b:
            values['scores'].append(float((a.pred_score - b.pred_score).abs().max()))
            lost += int(b.pred_score.max() > CONFIDENT and a.pred_label != b.pred_label)
            count += 1  # the class of an image
            continue
        if 'pred_instances' not in b:
            other = a.pred_sem_seg.data != b.pred_sem_seg.data
            values['segmentation'].append(float(other.float().mean()))
            continue
        a, b = (x.pred_instances for x in (a, b))
        if not exact:
            a, b = (x[x.scores > CONFIDENT] for x in (a, b))
        pixels = torch.cdist(a.bboxes, b.bboxes, p=math.inf)  # [N, M], of the farthest sides
        scores = (a.scores[:, None] - b.scores).abs()
        reach = 1 + (b.bboxes[:, 2:] - b.bboxes[:, :2]).amax(1) / 4
        cost = pixels / reach + scores + 10 * (a.labels[:, None] != b.labels)
        pairs = torch.as_tensor(np.stack(linear_sum_assignment(cost.nan_to_num(100).numpy())))
        i, j = pairs[:, cost[tuple(pairs)] < 2]
        values['boxes'] += pixels[i, j].tolist()
        values['scores'] += scores[i, j].tolist()
        if 'masks' in b:  # but for one pixel
            other = ((a.masks[i] != b.masks[j]).sum((1, 2)) - 1).clamp(min=0)
            values['masks'] += (other / b.masks[j].sum((1, 2)).clamp(min=1)).tolist()
        # At the threshold, and at the end of full lists, which boxes are kept is a matter of ties.
        full = min(len(a), len(b)) == settings.get('max_per_img')
        last = torch.cat([a.scores, b.scores]).min() if full else settings.get('score_thr', 0)
        for scores, paired in ((a.scores, i), (b.scores, j)):
            lost += int((scores.index_fill(0, paired, 0.0) > last + TIES).sum())
        count += len(a) + len(b)
    largest = {name: float(np.max(x, initial=0)) for name, x in values.items()}
    return largest if 'segmentation' in largest else dict(lost=lost / max(count, 1)) | largest
