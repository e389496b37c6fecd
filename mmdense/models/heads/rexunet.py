"""The decoder of the ReXNet U-Net: six outputs, from full resolution to stride 32.

Shapes: N images, C_k channels of the encoder's feature map k, K output channels.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from mmseg.models.decode_heads.decode_head import BaseDecodeHead
from mmseg.models.losses import accuracy
from torch import Tensor, nn

from mmdense.models.backbones.rexnet import LinearBottleneck, init_convs

STRIDES = (1, 2, 4, 8, 16, 32)


class ReXUNetHead(BaseDecodeHead):
    """Decode the six feature maps of ``ReXNet(taps='unet')``, with deep supervision of all scales.

    From the coarsest feature map on, a ReXNet bottleneck (expansion 1) maps to the channels of the
    next finer one, and the result is resized and added to it. A 3x3 convolution computes the output
    at each stride from 2 to 32, a last bottleneck the output at full resolution. Prediction
    computes only the latter.

    Losses are named by stride: ``loss_ce_s1`` to ``loss_ce_s32``. All are computed at the size of
    the label, so training needs memory for six outputs [N, K, H, W].

    Args:
        in_channels: Of the encoder's maps at strides 2, 4, 8, 16, 32, and of the last one.
        out_channels: K: ``num_classes`` by default; or 1 for two classes with a ``threshold``.
        loss_weights: Of the scales, finest first.
        loss_decode: Cross entropy by default, with sigmoids if K is 1.
        align_corners: Of every interpolation. The published network has False.

    Other arguments are BaseDecodeHead's. ValueError for other than six channels, indices or
    weights, or a negative weight.
    """

    def __init__(
        self,
        *,
        in_channels: Sequence[int],
        in_index: Sequence[int] = (0, 1, 2, 3, 4, 5),
        num_classes: int,
        out_channels: int | None = None,
        threshold: float | None = None,
        loss_weights: Sequence[float] = (1.0, 0.5, 0.5, 0.5, 0.5, 0.5),
        loss_decode: dict | Sequence[dict] | None = None,
        ignore_index: int = 255,
        align_corners: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        for name, values in dict(in_channels=in_channels, in_index=in_index).items():
            if len(values) != 6:
                raise ValueError(f'{name} {tuple(values)}: the decoder reads six feature maps')
        if len(loss_weights) != 6 or min(loss_weights) < 0:
            raise ValueError(f'loss_weights {tuple(loss_weights)} must be six, none negative')
        if loss_decode is None:
            binary = 1 in (out_channels, num_classes)
            loss_decode = dict(type='mmseg.CrossEntropyLoss', use_sigmoid=binary)
        super().__init__(
            list(in_channels),
            in_channels[0],
            num_classes=num_classes,
            out_channels=out_channels,
            threshold=threshold,
            dropout_ratio=0,
            in_index=list(in_index),
            input_transform='multiple_select',
            loss_decode=loss_decode,
            ignore_index=ignore_index,
            align_corners=align_corners,
            init_cfg=init_cfg,
        )
        del self.conv_seg  # unused, and DDP refuses parameters without a gradient
        self.loss_weights = tuple(loss_weights)
        *taps, last = in_channels
        for k, channels in enumerate(pairwise([last, *reversed(taps), self.out_channels]), start=1):
            block = LinearBottleneck(*channels, gated=True, shortcut=k < 6)
            self.add_module(f'decode_conv{k}', block)
        for k, channels in enumerate(taps, start=1):
            self.add_module(f'output_conv{k}', nn.Conv2d(channels, self.out_channels, 3, padding=1))
        init_convs(self)

    def _resize(self, x: Tensor, size: Sequence[int]) -> Tensor:
        if x.shape[-2:] == tuple(size):
            return x
        return F.interpolate(x, tuple(size), mode='bilinear', align_corners=self.align_corners)

    def _outputs(self, inputs: Sequence[Tensor], scales: Iterable[int]) -> list[Tensor]:
        """Return the outputs of these scales, [N, K, H_i, W_i]; scale 0 is the finest."""
        *taps, x = self._transform_inputs(inputs)
        features = []
        for k, tap in enumerate(reversed(taps), start=1):
            x = self._resize(self.get_submodule(f'decode_conv{k}')(x), tap.shape[-2:]) + tap
            features.insert(0, x)
        outputs = []
        for scale in scales:
            if scale:
                outputs.append(self.get_submodule(f'output_conv{scale}')(features[scale - 1]))
            else:
                finest = self.decode_conv6(x)
                outputs.append(self._resize(finest, [2 * side for side in finest.shape[-2:]]))
        return outputs

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the logits of all six scales for the encoder's feature maps [N, C_k, H_k, W_k].

        They are [N, K, 2 H_0, 2 W_0] (the image's size, or a pixel more where that is odd), then
        [N, K, H_k, W_k] at strides 2, 4, 8, 16 and 32.
        """
        return tuple(self._outputs(inputs, range(6)))

    def predict(
        self, inputs: Sequence[Tensor], batch_img_metas: list[dict], test_cfg: dict | None
    ) -> Tensor:
        """Return the finest output at the image's size, [N, K, H, W]."""
        (finest,) = self._outputs(inputs, (0,))
        return self.predict_by_feat(finest, batch_img_metas)

    def loss_by_feat(self, seg_logits: Sequence[Tensor], batch_data_samples: list) -> dict:
        """Return each scale's weighted losses, and the accuracy of the finest."""
        label = self._stack_batch_gt(batch_data_samples)
        maps = [self._resize(logits, label.shape[-2:]) for logits in seg_logits]
        label = label.squeeze(1)
        losses = self._weighted_losses(maps, label, ignore_index=self.ignore_index)
        losses['acc_seg'] = accuracy(maps[0], label, ignore_index=self.ignore_index)
        return losses

    def _weighted_losses(
        self, maps: Sequence[Tensor], target: Tensor, **options: int | None
    ) -> dict:
        functions, losses = self.loss_decode, {}
        if not isinstance(functions, nn.ModuleList):
            functions = [functions]
        # Scales of weight 0 are computed too, so that their parameters get a gradient.
        for stride, weight, x in zip(STRIDES, self.loss_weights, maps, strict=True):
            for function in functions:
                name = f'{function.loss_name}_s{stride}'
                losses[name] = losses.get(name, 0) + weight * function(x, target, **options)
        return losses


class ReXUNetDepthHead(ReXUNetHead):
    """The same decoder with one output channel: depth, for mmseg's ``DepthEstimator``.

    The depth is ``max_depth``, in the unit of the labels, times a sigmoid; :meth:`disparities`
    returns the sigmoids, for self-supervised training. ``loss_decode`` is SiLogLoss by default.
    Other arguments, and ValueError: see :class:`ReXUNetHead`; a depth must be positive.
    """

    def __init__(
        self,
        *,
        in_channels: Sequence[int],
        in_index: Sequence[int] = (0, 1, 2, 3, 4, 5),
        max_depth: float = 10.0,
        loss_weights: Sequence[float] = (1.0, 0.5, 0.5, 0.5, 0.5, 0.5),
        loss_decode: dict | Sequence[dict] | None = None,
        align_corners: bool = False,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        if not max_depth > 0:
            raise ValueError(f'max_depth is {max_depth}, must be positive')
        super().__init__(
            in_channels=in_channels,
            in_index=in_index,
            num_classes=1,
            threshold=0.5,  # unused; mmseg warns if a one-channel output has none
            loss_weights=loss_weights,
            loss_decode=loss_decode or dict(type='mmseg.SiLogLoss'),
            align_corners=align_corners,
            init_cfg=init_cfg,
        )
        self.max_depth = max_depth

    def _outputs(self, inputs: Sequence[Tensor], scales: Iterable[int]) -> list[Tensor]:
        """Return the depths of these scales, [N, 1, H_i, W_i]."""
        return [self.max_depth * x.sigmoid() for x in super()._outputs(inputs, scales)]

    def disparities(self, inputs: Sequence[Tensor]) -> dict[tuple[str, int], Tensor]:
        """Return ``{('disp', k): sigmoid [N, 1, H_k, W_k]}``; scale 0 is the finest."""
        return {('disp', k): x.sigmoid() for k, x in enumerate(super()._outputs(inputs, range(6)))}

    def loss_by_feat(self, depths: Sequence[Tensor], batch_data_samples: list) -> dict:
        """Return each scale's weighted losses against ``gt_depth_map``."""
        target = torch.stack([sample.gt_depth_map.data for sample in batch_data_samples])
        maps = [self._resize(depth, target.shape[-2:]) for depth in depths]
        return self._weighted_losses(maps, target)
