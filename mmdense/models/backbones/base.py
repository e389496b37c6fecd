"""The contract of every backbone of mmdense.

    net = RDNet(arch='tiny', out_indices=(0, 1, 2, 3), frozen_stages=-1, norm_eval=False, ...)
    net.out_channels              # (256, 440, 744, 1040), one per returned map
    net.out_strides               # (4, 8, 16, 32), input pixels per map pixel
    net.layer_depth('stem.0.weight')   # (0, 9): depth of a parameter, number of depths
    net.layer_depth('stem.0.weight', 'layer')   # (0, 23): the same, counted block by block
    net(x)                        # x [N, C, H, W] -> tuple of [N, out_channels[i], H_i, W_i]
    net.train() is net            # frozen stages stay frozen

A stage is everything between two tapped maps: stage 1 ends in map 0, stage i in map i - 1, and the
stem is stage 0. Maps are tapped before any downsampling that follows them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdense.errors import suggest_name

__all__ = ['GRANULARITIES', 'Backbone', 'resolve_arch']

ArchT = TypeVar('ArchT')
GRANULARITIES = ('stage', 'layer')


def resolve_arch(arch: str | Mapping[str, Any], known: Mapping[str, ArchT]) -> ArchT:
    """Return the architecture of that name, or one built from a dict of its fields.

    Args:
        arch: A name in ``known``, or a dict with the fields of the family's ``Arch``.
        known: The family's named architectures.

    Raises:
        ValueError: Unknown name, or unknown, missing or impossible field.
    """
    if isinstance(arch, str):
        if arch not in known:
            raise ValueError(f'unknown arch {arch!r}{suggest_name(arch, known)}')
        return known[arch]
    arch_type = type(next(iter(known.values())))
    fields = {field.name: field for field in dataclasses.fields(arch_type)}
    if not isinstance(arch, Mapping):
        raise ValueError(f'arch must be one of {list(known)} or a dict of {list(fields)}')
    for key in arch:
        if key not in fields:
            raise ValueError(f'unknown field {key!r} of arch{suggest_name(key, fields)}')
    missing = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and name not in arch
    ]
    if missing:
        raise ValueError(f'arch lacks {missing}; fields: {list(fields)}')
    return arch_type(**arch)


class Backbone(BaseModule):
    """Base class: which maps are returned, what is frozen, what keeps its statistics.

    A family calls ``super().__init__`` with what it is made of, creates its modules, and ends its
    constructor with :meth:`_freeze`. It implements :meth:`_stage_modules`,
    :meth:`_layer_depths` and ``forward``.

    Args:
        map_channels: Channels of every map that can be tapped, fine to coarse.
        map_strides: Strides of the same maps, in input pixels.
        out_indices: Which maps to return, increasing; negative ones count from the end; None
            returns all.
        frozen_stages: -1 freezes nothing, 0 the stem, i the stem and stages 1 to i.
        norm_eval: Keep batch norms in eval mode while training.
        memory: What training keeps for the backward pass, one of ``memory_modes``: 'plain' what
            autograd keeps; 'lean' what convolutions put out, while what lies between them
            (concatenations, norms, activations, gates) is made again; 'recompute' the inputs of
            blocks alone. Outputs, gradients and running statistics are the same.
        with_cp: The old name of ``memory='recompute'``.
        init_cfg: mmengine's initialisation config.

    Raises:
        ValueError: An index, stage or memory mode that does not exist, or indices that don't
            increase.
    """

    out_channels: tuple[int, ...]
    out_strides: tuple[int, ...]
    memory_modes: tuple[str, ...] = ('plain', 'lean', 'recompute')
    # Beginnings of names that no ImageNet weights have.
    not_pretrained: tuple[str, ...] = ()

    def __init__(
        self,
        *,
        map_channels: Sequence[int],
        map_strides: Sequence[int],
        out_indices: Sequence[int] | None,
        frozen_stages: int,
        norm_eval: bool,
        memory: str,
        with_cp: bool,
        init_cfg: dict | list[dict] | None,
    ) -> None:
        super().__init__(init_cfg=init_cfg)
        num_maps = len(map_channels)
        if out_indices is None:
            out_indices = range(num_maps)
        if any(not -num_maps <= i < num_maps for i in out_indices):
            raise ValueError(f'out_indices {tuple(out_indices)}: there are {num_maps} maps')
        self.out_indices = tuple(i % num_maps for i in out_indices)
        if not self.out_indices or list(self.out_indices) != sorted(set(self.out_indices)):
            raise ValueError(
                f'out_indices {tuple(out_indices)} must be at least one, increasing and unique'
            )
        if not -1 <= frozen_stages <= num_maps:
            raise ValueError(f'frozen_stages is {frozen_stages}, must be from -1 to {num_maps}')
        self.out_channels = tuple(map_channels[i] for i in self.out_indices)
        self.out_strides = tuple(map_strides[i] for i in self.out_indices)
        self._coarsest = max(map_strides)
        self.frozen_stages = frozen_stages
        self.norm_eval = norm_eval
        if memory not in self.memory_modes:
            raise ValueError(f'memory is {memory!r}, must be one of {self.memory_modes}')
        if with_cp and memory == 'lean':
            raise ValueError("with_cp=True is memory='recompute': set memory='lean' alone")
        self.memory = 'recompute' if with_cp else memory

    def _stage_modules(self, stage: int) -> list[nn.Module]:
        """Return the modules of one stage; stage 0 is the stem."""
        raise NotImplementedError

    def _layer_depths(self, granularity: str) -> tuple[Mapping[str, int], int]:
        """Return the depth of each name or its prefix, finer prefixes first, and their number."""
        raise NotImplementedError

    def layer_depth(self, name: str, granularity: str = 'stage') -> tuple[int, int]:
        """Return ``(depth, number of depths)`` of a parameter, for layer-wise learning rates.

        The stem has depth 0. The last depth is that of what was not pretrained with the network
        (output norms here, necks and heads outside), so a rate of ``decay ** (number - 1 - depth)``
        leaves those at 1.

        Args:
            name: As in ``named_parameters()`` of the backbone.
            granularity: What adds one to the depth: 'stage' (of RDNet: a dense stage; else
                everything between two maps) or 'layer' (a block or dense layer of a stage).

        Raises:
            ValueError: The backbone has no such parameter, or there is no such granularity.
        """
        if granularity not in GRANULARITIES:
            raise ValueError(f'granularity is {granularity!r}, must be one of {GRANULARITIES}')
        prefixes, num_depths = self._layer_depths(granularity)
        for prefix, depth in prefixes.items():
            if f'{name}.'.startswith(f'{prefix}.'):
                return depth, num_depths
        raise ValueError(f'{type(self).__name__} has no parameter {name!r}')

    def _check_size(self, x: Tensor) -> None:
        """Raise ValueError for images [N, C, H, W] smaller than the coarsest stride."""
        if min(x.shape[-2:]) < self._coarsest:
            raise ValueError(
                f'image of {tuple(x.shape[-2:])} pixels: {type(self).__name__} needs at least '
                f'{self._coarsest} in both directions'
            )

    def _freeze(self) -> None:
        for stage in range(self.frozen_stages + 1):
            for module in self._stage_modules(stage):
                module.eval()
                module.requires_grad_(False)

    def train(self, mode: bool = True) -> Backbone:
        """Set training mode, except for what is frozen or, with ``norm_eval``, batch norms."""
        super().train(mode)
        if mode:
            self._freeze()
            if self.norm_eval:
                for module in self.modules():
                    if isinstance(module, _BatchNorm):
                        module.eval()
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the maps at ``out_indices``, [N, C_i, H_i, W_i], for images [N, C, H, W]."""
        raise NotImplementedError
