"""Boxes of Deformable DETR, with box refinement and two stages, and of DINO, without NMS.

mmdet passes the sizes of feature maps as a tensor and reads it back, which torch.export cannot
follow. Here they are a list of ints through the same layers, and what reads them is replaced
meanwhile.

Shapes: N images, L feature maps of H_i x W_i, P pixels of all of them, Q queries, D channels,
M heads, K = ``test_cfg.max_per_img`` boxes.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any
from unittest import mock

import torch
from mmcv.ops import multi_scale_deform_attn as mmcv_attention
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy
from torch import Tensor, nn

from mmdense.errors import UserError
from mmdense.export.nms import rows

PARTS = (  # detector, decoder, head
    ('DeformableDETR', 'DeformableDetrTransformerDecoder', 'DeformableDETRHead'),
    ('DINO', 'DinoTransformerDecoder', 'DINOHead'),
)


def check_detr(model: nn.Module) -> None:
    """Raise a UserError if :func:`decode_detr` does not do what the model's prediction does."""
    parts = (model, model.decoder, model.bbox_head)
    if tuple(type(part).__name__ for part in parts) not in PARTS:
        raise UserError(
            'ONNX export reads DeformableDETR and DINO of the DETRs, with the decoder and head of '
            f'mmdet, not this {type(model).__name__}: export its neck or backbone instead'
        )


def decode_detr(
    model: nn.Module, maps: Sequence[Tensor], size: Sequence[int], padded: Sequence[int] | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return boxes [N, K, 4], scores [N, K], best first, and labels [N, K].

    ``model`` is one that :func:`check_detr` accepts, ``maps`` are the neck's, [N, D, H_i, W_i],
    ``size`` is the height and width of the images in pixels without padding, ``padded`` with it, or
    None if images are never padded.
    """
    sizes = [x.shape[2:] for x in maps]
    if padded is None:
        mask, ratios = None, maps[0].new_ones(maps[0].shape[0], len(maps), 2)
        positions = [model.positional_encoding(None, input=x) for x in maps]
    else:
        masks = [_padding(x, size, padded) for x in maps]
        mask = torch.cat([x.flatten(1) for x in masks], 1)
        ratios = torch.stack([model.get_valid_ratio(x) for x in masks], 1)
        positions = [model.positional_encoding(x) for x in masks]
    positions = [x + e[:, None, None] for x, e in zip(positions, model.level_embed, strict=True)]
    query, position = (torch.cat([x.flatten(2) for x in y], 2).mT for y in (maps, positions))
    shared = dict(key_padding_mask=mask, spatial_shapes=sizes, valid_ratios=ratios)
    shared['level_start_index'] = None
    centers = _centers(sizes, ratios)
    points = torch.cat(centers, 1)[:, :, None] * ratios[:, None]
    head = model.bbox_head
    with (
        mock.patch.object(mmcv_attention.MultiScaleDeformableAttention, 'forward', _attend),
        mock.patch.object(model, 'gen_encoder_output_proposals', partial(_propose, model)),
    ):
        for layer in model.encoder.layers:
            query = layer(query=query, query_pos=position, reference_points=points, **shared)
        inputs, _ = model.pre_decoder(query, mask, centers)
        states, references = model.decoder(
            value=inputs.pop('memory'),
            self_attn_mask=inputs.pop('dn_mask', None),
            reg_branches=head.reg_branches if model.with_box_refine else None,
            **shared,
            **inputs,
        )
    references = [inputs['reference_points'], *references][-len(states) - 1 :]
    scores, boxes = (layers[-1] for layers in head(states, references))
    count = head.test_cfg.get('max_per_img', boxes.shape[1])
    if head.loss_cls.use_sigmoid:
        scores, index = scores.sigmoid().flatten(1).topk(count)
        labels, index = index % head.num_classes, index // head.num_classes
    else:
        scores, labels = scores.softmax(-1)[..., :-1].max(-1)
        scores, index = scores.topk(count)
        labels = labels.gather(1, index)
    height, width = size
    limit = torch.stack([boxes.new_full((), x) for x in (width, height, width, height)])
    boxes = bbox_cxcywh_to_xyxy(rows(boxes, index)) * limit
    return torch.minimum(boxes.clamp(min=0), limit), scores, labels


def _padding(x: Tensor, size: Sequence[int], padded: Sequence[int]) -> Tensor:
    """Return which pixels of feature maps are padding, [N, H_i, W_i], as nearest sampling does."""
    sides = zip(x.shape[2:], size, padded, strict=True)
    row, column = (torch.arange(count) * full // count >= side for count, side, full in sides)
    return (row[:, None] | column).expand(x.shape[0], -1, -1)


def _centers(sizes: Sequence[Sequence[int]], ratios: Tensor) -> list[Tensor]:
    """Return (x, y) of pixels by feature map, [N, P_i, 2], as a share of images without padding.

    ``ratios`` [N, L, 2] are the shares of width and height that are no padding.
    """
    centers = []
    for level, (height, width) in enumerate(sizes):
        y, x = ((torch.arange(side) + 0.5) / side for side in (height, width))
        center = torch.stack([x.expand(height, -1), y[:, None].expand(-1, width)], -1)
        centers.append(center.flatten(0, 1) / ratios[:, None, level])
    return centers


def _propose(
    model: nn.Module, memory: Tensor, mask: Tensor | None, centers: Sequence[Tensor]
) -> tuple[Tensor, Tensor]:
    """Return features [N, P, D] and logits of boxes [N, P, 4] by pixel, for the first stage."""
    sides = [torch.full_like(x, 0.05 * 2**level) for level, x in enumerate(centers)]
    boxes = torch.cat([torch.cat(centers, 1), torch.cat(sides, 1)], 2)
    valid = ((boxes > 0.01) & (boxes < 0.99)).all(-1, keepdim=True)
    if mask is not None:
        valid = valid & ~mask[..., None]
    memory = model.memory_trans_norm(model.memory_trans_fc(torch.where(valid, memory, 0.0)))
    return memory, torch.where(valid, (boxes / (1 - boxes)).log(), torch.inf)


def _attend(layer: nn.Module, query: Tensor, *, value: Tensor, **options: Any) -> Tensor:
    """Return multi-scale deformable attention [N, Q, D], as mmcv's layer does."""
    points, sizes = (options[name] for name in ('reference_points', 'spatial_shapes'))
    points = points[:, :, None, :, None]  # [N, Q, 1, L, 1, 2 or 4]
    placed = query + options['query_pos']
    value = layer.value_proj(value)
    if options['key_padding_mask'] is not None:
        value = value.masked_fill(options['key_padding_mask'][..., None], 0.0)
    shape = (layer.num_heads, layer.num_levels, layer.num_points)
    weights = layer.attention_weights(placed).unflatten(2, (layer.num_heads, -1)).softmax(-1)
    offsets = layer.sampling_offsets(placed).unflatten(2, (*shape, 2))
    if points.shape[-1] == 2:
        sides = torch.stack([query.new_full((), x) for size in sizes for x in size])
        offsets = offsets / sides.view(-1, 1, 2).flip(-1)
    else:
        offsets = offsets * points[..., 2:] * (0.5 / layer.num_points)
    value, weights = value.unflatten(2, (layer.num_heads, -1)), weights.unflatten(3, shape[1:])
    sampled = mmcv_attention.multi_scale_deformable_attn_pytorch(
        value, sizes, points[..., :2] + offsets, weights
    )
    return layer.output_proj(sampled) + query
