"""Layers whose connections are pruned in training and become group convolutions afterwards.

`CondenseNet V2 <https://arxiv.org/abs/2104.04382>`_ has two such layers, each a norm, an activation
and a 1x1 convolution. Learned group convolution selects the channels that its groups of outputs
read; sparse feature reactivation selects the channels that its groups of inputs add to. Both have
two forms: learned, a dense convolution with a mask, and condensed, a group convolution after a
gather or before a scatter. N images, C channels, H x W pixels, G groups, F the condense factor, K
the channels that a group keeps.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from mmcv.cnn import build_norm_layer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdense.models.layers.lean import lean_conv, plain_conv

BN = dict(type='BN')


def pruning_stage(progress: float, condense_factor: int) -> int:
    """Return the stage of pruning, 0 to F - 1, at a progress from 0 to 1 (else ValueError).

    Each stage prunes 1 / F of the channels; the last one begins at half of the training.
    """
    if not 0 <= progress <= 1:
        raise ValueError(f'progress is {progress}, must be from 0 to 1')
    last = condense_factor - 1
    return sum(2 * progress >= stage / last for stage in range(1, last + 1))


class _Layer(nn.Module):
    """Norm, activation, dropout and a 1x1 convolution, which the subclasses run.

    ``norm_cfg`` is mmcv's config of a batch norm with weights, else ValueError; ``memory='lean'``
    saves only the input for backward.
    """

    # The side of the weight, 0 (C_out) or 1 (C_in), that groups select from; the other forms them.
    chosen: int

    def __init__(
        self,
        conv: nn.Conv2d,
        *,
        groups: int,
        norm_cfg: Mapping[str, Any] = BN,
        activation: type[nn.Module] = nn.ReLU,
        drop_rate: float = 0.0,
        memory: str = 'plain',
    ) -> None:
        super().__init__()
        self.groups = groups
        self.norm = build_norm_layer(dict(norm_cfg), conv.in_channels)[1]
        if not isinstance(self.norm, _BatchNorm) or not self.norm.affine:
            raise ValueError(f'norm_cfg must be of a batch norm with weights, not {dict(norm_cfg)}')
        # In place only where autograd saves the output: others would copy their input.
        self.activation = activation(inplace=activation is nn.ReLU)
        self.drop = nn.Dropout(drop_rate)
        self.conv = conv
        self.memory = memory
        self._run = lean_conv if memory == 'lean' else plain_conv

    def _activated(self) -> tuple[nn.Module, ...]:
        return self.norm, self.activation, self.drop


class _Learned(_Layer):
    """A dense 1x1 convolution with a mask of connections, which are pruned in stages.

    ``_mask`` [C_out, C_in, 1, 1] has one value per group and channel, repeated over the group's
    members; ``_count`` is the number of channels that each group has lost, ``_stage`` the stage.
    ValueError if G or F does not divide the channels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        groups: int,
        condense_factor: int,
        **options: Any,
    ) -> None:
        sides = (out_channels, in_channels)
        if sides[1 - self.chosen] % groups or sides[self.chosen] % condense_factor:
            raise ValueError(
                f'{in_channels} to {out_channels} channels: those that form groups must be a '
                f'multiple of {groups}, the others a multiple of {condense_factor}'
            )
        conv = nn.Conv2d(in_channels, out_channels, 1, bias=False)
        super().__init__(conv, groups=groups, **options)
        self.channels = sides[self.chosen]
        self.condense_factor = condense_factor
        # Integers, so that moving averages and half precision don't change them.
        self.register_buffer('_count', torch.zeros(1, dtype=torch.int64))
        self.register_buffer('_stage', torch.zeros(1, dtype=torch.int64))
        self.register_buffer('_mask', torch.ones_like(self.conv.weight, dtype=torch.uint8))

    def _members(self, weight: Tensor) -> Tensor:
        """View a weight as [G, members of a group, channels that the groups select from]."""
        raise NotImplementedError

    @property
    def stage(self) -> int:
        """The stage of pruning, from 0 to F - 1."""
        return int(self._stage)

    @property
    def weight(self) -> Tensor:
        """The weights of the remaining connections, zero elsewhere: [C_out, C_in, 1, 1]."""
        return self.conv.weight * self._mask

    def kept(self) -> Tensor:
        """Return which channels each group is connected to: bool [G, channels]."""
        return self._members(self._mask).bool().any(1)

    @torch.no_grad()
    def prune_to(self, progress: float) -> None:
        """Prune the channels of least L1 weight that are due at this progress, from 0 to 1.

        The result depends on weights, mask and stage only. The first of equal channels are pruned,
        pruned connections don't come back, and skipped stages are caught up on.
        """
        stage = pruning_stage(progress, self.condense_factor)
        if stage <= self.stage:
            return
        count = stage * (self.channels // self.condense_factor)
        kept = self.kept()
        sizes = self._members(self.conv.weight).abs().sum(1).masked_fill(~kept, torch.inf)
        ranks = sizes.argsort(dim=1, stable=True).argsort(dim=1)
        kept &= ranks >= count - (~kept).sum(1, keepdim=True)
        mask = self._members(self._mask)
        mask.copy_(kept[:, None].expand_as(mask))
        self._count.fill_(count)
        self._stage.fill_(stage)

    def _index(self) -> Tensor:
        """Return the channels that each group keeps, ascending: [G, K]."""
        kept = self.kept()
        if len(set(kept.sum(1).tolist())) > 1:
            raise ValueError(f'groups keep different numbers of channels: {kept.sum(1).tolist()}')
        return kept.nonzero()[:, 1].view(self.groups, -1)


class _Condensed(_Layer):
    """A 1x1 group convolution, and the channels that it reads or adds to in ``index`` [G * K].

    Arguments are those of the learned form; G * K channels are gathered (``in_channels``) or
    scattered (``out_channels``).
    """

    def __init__(self, in_channels: int, out_channels: int, *, groups: int, **options: Any) -> None:
        conv = nn.Conv2d(in_channels, out_channels, 1, groups=groups, bias=False)
        super().__init__(conv, groups=groups, **options)
        kept = (out_channels, in_channels)[self.chosen] // groups
        self.register_buffer('index', torch.arange(kept).repeat(groups))

    @classmethod
    def _from(cls, learned: _Learned, norm: nn.Module, weight: Tensor, index: Tensor) -> Any:
        """Return a condensed layer; weight [G, C_out / G, C_in / G], index [G, K]."""
        weight = weight.detach().clone()
        layer = cls(
            weight.shape[2] * learned.groups,
            weight.shape[0] * weight.shape[1],
            groups=learned.groups,
            activation=type(learned.activation),
            drop_rate=learned.drop.p,
            memory=learned.memory,
        )
        layer.norm = norm
        layer.conv.weight = nn.Parameter(
            weight.reshape(layer.conv.weight.shape), learned.conv.weight.requires_grad
        )
        layer.index = index.flatten()
        return layer.train(learned.training)


class LearnedGroupConv(_Learned):
    """Norm, activation and a 1x1 convolution whose groups of outputs select their inputs.

    Output channel o belongs to group o mod G. Fully pruned, each group reads C_in / F channels.
    """

    chosen = 1

    def _members(self, weight: Tensor) -> Tensor:
        return weight.view(-1, self.groups, self.channels).transpose(0, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, C_in, H, W] to [N, C_out, H, W]."""
        return self._run(self._activated(), self.conv, x, weight=self.weight)

    def condensed(self) -> CondensedGroupConv:
        """Return the condensed form, whose outputs are the same in evaluation."""
        index = self._index()
        weight = self._members(self.conv.weight)
        weight = weight.gather(2, index[:, None].expand(-1, weight.shape[1], -1))
        return CondensedGroupConv._from(self, _gather(self.norm, index.flatten()), weight, index)


class SparseReactivation(_Learned):
    """Norm, activation and a 1x1 convolution whose groups of inputs select their outputs.

    Input channel i belongs to group i mod G. Fully pruned, each group adds to C_out / F channels.
    """

    chosen = 0

    def _members(self, weight: Tensor) -> Tensor:
        return weight.view(self.channels, -1, self.groups).permute(2, 1, 0)

    def forward(self, x: Tensor, new: Tensor) -> Tensor:
        """Return x [N, C_out, H, W] plus the convolution of new [N, C_in, H, W]."""
        return x + self._run(self._activated(), self.conv, new, weight=self.weight)

    def condensed(self) -> CondensedReactivation:
        """Return the condensed form, whose outputs are the same in evaluation."""
        index = self._index()
        weight = self._members(self.conv.weight).transpose(1, 2)  # [G, C_out, C_in / G]
        weight = weight.gather(1, index[..., None].expand(-1, -1, weight.shape[2]))
        return CondensedReactivation._from(self, self.norm, weight, index)


class CondensedGroupConv(_Condensed):
    """A condensed :class:`LearnedGroupConv`: gather, norm, activation, conv, shuffle."""

    chosen = 1

    def forward(self, x: Tensor) -> Tensor:
        """Map the features of a block, [N, C, H, W], to [N, C_out, H, W]."""
        chain = (self._gathered, *self._activated())
        return _shuffle(self._run(chain, self.conv, x), self.groups)

    def _gathered(self, x: Tensor) -> Tensor:
        return x.index_select(1, self.index)


class CondensedReactivation(_Condensed):
    """A condensed :class:`SparseReactivation`: norm, activation, conv, scatter."""

    chosen = 0

    def forward(self, x: Tensor, new: Tensor) -> Tensor:
        """Return x [N, C, H, W] plus the scattered convolution of new [N, C_in, H, W]."""
        chain = (*self._activated(), self._shuffled)
        return x.index_add(1, self.index, self._run(chain, self.conv, new))

    def _shuffled(self, x: Tensor) -> Tensor:
        return _shuffle(x, x.shape[1] // self.groups)


def _shuffle(x: Tensor, groups: int) -> Tensor:
    # torch's channel_shuffle has no derivative before torch 2.5.
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


def _gather(norm: nn.Module, index: Tensor) -> nn.Module:
    """Return a norm of the channels ``index``, which may repeat."""
    gathered = copy.deepcopy(norm)
    gathered.num_features = index.numel()
    for name, parameter in norm.named_parameters():
        value = nn.Parameter(parameter.detach()[index], parameter.requires_grad)
        setattr(gathered, name, value)
    for name, buffer in norm.named_buffers():
        setattr(gathered, name, buffer[index] if buffer.ndim else buffer.clone())
    return gathered
