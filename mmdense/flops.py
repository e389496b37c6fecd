"""Parameters, MACs and activations of any module, on torch's meta device, without memory.

MACs are those of convolutions and matrix products, as torch's counter defines them; activations are
the elements of their outputs. Norms, nonlinearities, pooling, resizing and RoIAlign don't count.
Operators that may be products but have no formula are named. N images, K RoIs, C channels, H x W
pixels.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, dataclass
from typing import Any

import torch
import torchvision  # noqa: F401  (registers its operators)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from mmdense.errors import warn


def _sum_flop(
    y: Sequence[int], a: Sequence[int], b: Sequence[int], *others: Any, **options: Any
) -> int:
    """Count the product of y + a @ b."""
    return 2 * math.prod(a) * b[-1]


def _deform_conv_flop(
    x: Sequence[int], weight: Sequence[int], *others: Any, out_shape: Sequence[int]
) -> int:
    """Count the product; sampling is not counted, like resizing."""
    return 2 * math.prod(out_shape) * math.prod(weight[1:])


# Formulas that torch's counter lacks; it passes the shapes of tensors.
FORMULAS = {
    torch.ops.aten.addmm_: _sum_flop,
    torch.ops.aten.baddbmm_: _sum_flop,
    torch.ops.torchvision.deform_conv2d: _deform_conv_flop,
}
# Words in the names of torch's operators that are products, or may be.
PRODUCT = re.compile(
    r'(^|_)(b?add(b?mm|mv|r)|b?mm|mv|v?dot|ger|outer|matmul|einsum|tensordot|(tri)?linear'
    r'|conv(?!ert)\w*|cdist|attention|encoder|rnn|lstm|gru|linalg(?!_vector_norm))(_|$)'
)
TORCH = ('aten', 'prim', 'prims')
# Other libraries' operators that are no products. All others may be products.
FREE = {f'torchvision::{name}' for name in ('nms', 'roi_align', 'roi_pool')}


@dataclass(frozen=True)
class Cost:
    """The cost of a network, or of a part of one, for an image."""

    parameters: int = 0
    macs: int = 0  # executed ones, of convolutions and matrix products
    activations: int = 0  # elements of their outputs

    def __add__(self, other: 'Cost') -> 'Cost':
        return Cost(*map(sum, zip(astuple(self), astuple(other), strict=True)))


def count_parameters(module: nn.Module) -> int:
    """Return the number of parameters, including frozen ones; shared ones count once."""
    return sum(parameter.numel() for parameter in module.parameters())


def backbone_macs(net: nn.Module, size: tuple[int, int], *, in_channels: int = 3) -> int:
    """Return the MACs of a network for an image, and warn as :func:`model_costs` does."""
    unknown: Counter[str] = Counter()
    cost, _ = count_cost(net, torch.empty(1, in_channels, *size, device='meta'), unknown)
    if unknown:
        warn(not_counted(unknown))
    return cost.macs


def model_costs(
    model: nn.Module, size: tuple[int, int], *, num_boxes: int = 1000, num_masks: int = 100
) -> dict[str, Cost]:
    """Return the cost of each part of a model, for one image.

    The heads of a two-stage detector run on a fixed number of RoIs in each stage, as in mmdet 2.x.
    An auxiliary head, which runs only in training, has parameters but no MACs. A warning names
    operators that were not counted. The result is such as
    ``dict(backbone=..., neck=..., rpn_head=..., bbox_head=..., mask_head=...)``.

    The model, in eval mode on the meta device, is a one- or two-stage detector, a segmentor with a
    decode head, or a classifier, else ValueError. ``size`` is height and width in pixels;
    ``num_boxes`` and ``num_masks`` are the RoIs of the box and of the mask heads.
    """
    unknown: Counter[str] = Counter()
    costs = {}
    image = torch.empty(1, 3, *size, device='meta')
    costs['backbone'], maps = count_cost(model.backbone, image, unknown)
    if getattr(model, 'with_neck', False):
        costs['neck'], maps = count_cost(model.neck, maps, unknown)
    dense = [name for name in ('rpn_head', 'bbox_head') if hasattr(model, name)]
    if hasattr(model, 'decode_head'):
        head, metas = model.decode_head, [dict(img_shape=size)]
        cost, _ = count_cost(lambda x: head.predict(x, metas, {}), maps, unknown)
        costs['decode_head'] = Cost(count_parameters(head)) + cost
        if getattr(model, 'with_auxiliary_head', False):
            costs['auxiliary_head'] = Cost(count_parameters(model.auxiliary_head))
    elif hasattr(model, 'head'):  # of a classifier
        costs['head'], _ = count_cost(model.head, maps, unknown)
    elif not dense:
        raise ValueError(f'{type(model).__name__}: no rpn_head, bbox_head or decode_head to count')
    for name in dense:
        costs[name], _ = count_cost(getattr(model, name), maps, unknown)
    if hasattr(model, 'roi_head'):
        head = model.roi_head
        costs['bbox_head'] = _roi_cost(head.bbox_head, head.bbox_roi_extractor, num_boxes, unknown)
        if head.with_mask:
            extractor = head.mask_roi_extractor or head.bbox_roi_extractor
            costs['mask_head'] = _roi_cost(head.mask_head, extractor, num_masks, unknown)
    if unknown:
        warn(not_counted(unknown))
    return costs


def _roi_cost(
    heads: nn.Module, extractors: nn.Module, num_rois: int, unknown: Counter[str]
) -> Cost:
    """Return the cost of the heads of all stages, on RoIs of their extractors' size."""
    stages = [list(m) if isinstance(m, nn.ModuleList) else [m] for m in (heads, extractors)]
    total = Cost()
    for head, extractor in zip(*stages, strict=True):
        side = extractor.roi_layers[0].output_size
        rois = torch.empty(num_rois, extractor.out_channels, *side, device='meta')  # [K, C, H, W]
        total += count_cost(head, rois, unknown)[0]
    return total


def count_cost(
    run: Callable[[Any], Any], x: Tensor | Sequence[Tensor], unknown: Counter[str]
) -> tuple[Cost, Any]:
    """Return the cost of ``run(x)``, without gradients, and its result.

    ``run`` is a network on any device, or a function, whose parameters are not counted. ``unknown``
    counts the calls of operators that may be products and were not counted.
    """
    counter = FlopCounterMode(display=False, custom_mapping=FORMULAS)
    watch = _Watch(counter.flop_registry, unknown)
    with watch, counter, torch.no_grad():
        y = run(x)
    parameters = count_parameters(run) if isinstance(run, nn.Module) else 0
    macs = counter.get_total_flops() // 2  # a MAC is two FLOPs
    return Cost(parameters, macs, watch.activations), y


def not_counted(unknown: Mapping[str, int]) -> str:
    """Return a line with the names and calls of these operators, '' if there are none."""
    calls = [f'{name} ({n} call{"s" * (n > 1)})' for name, n in sorted(unknown.items())]
    return f'not counted: {", ".join(calls)}' if calls else ''


class _Watch(TorchDispatchMode):
    """Count the output elements of known operators, and the calls of unknown products."""

    def __init__(self, known: Mapping[Any, Any], calls: Counter[str]) -> None:
        super().__init__()
        self.known, self.calls, self.activations = known, calls, 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        y = func(*args, **(kwargs or {}))
        if func.overloadpacket in self.known:
            self.activations += (y[0] if isinstance(y, list | tuple) else y).numel()
            return y
        full = func.name().partition('.')[0]  # without the overload
        space, _, name = full.partition('::')
        if PRODUCT.search(name) if space in TORCH else full not in FREE:
            self.calls[full] += 1
        return y
