"""The contract of every backbone of mmdense.

    net = RDNet(arch='tiny', out_indices=(0, 1, 2, 3), frozen_stages=-1, norm_eval=False, ...)
    net.out_channels              # (256, 440, 744, 1040), one per returned feature map
    net.out_strides               # (4, 8, 16, 32), in pixels of the image
    net.layer_depth('stem.0.weight')   # (0, 9): depth of a parameter, number of depths
    net.layer_depth('stem.0.weight', 'layer')   # (0, 23): the same, counted block by block
    net(x)                        # x [N, C, H, W] -> tuple of [N, out_channels[i], H_i, W_i]
    net.train() is net            # frozen stages stay frozen

The stem is stage 0; stage i is everything between feature maps i - 2 and i - 1. Feature maps are
taken before any downsampling that follows them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING
from dataclasses import fields as fields_of
from typing import Any, TypeVar

import torch
import torch._functorch.config as functorch
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from mmdense.errors import UserError, suggest_name

ArchT = TypeVar('ArchT')
GRANULARITIES = ('stage', 'layer')
# Of torch.compile for backbones with batch norm: else inductor stores sums, masks and gradients in
# float32.
FUSE_MORE = dict(
    realize_reads_threshold=16, realize_acc_reads_threshold=64, realize_opcount_threshold=200
)
# Else the graph's partitioner saves each activation that a kernel of backward reads.
RECOMPUTE_MORE = dict(ban_recompute_materialized_backward=False)


def resolve_arch(arch: str | Mapping[str, Any], known: Mapping[str, ArchT]) -> ArchT:
    """Return one of a family's known architectures, or one built from a dict of its fields.

    ValueError if the name, or a field, is unknown, missing or impossible.
    """
    if isinstance(arch, str):
        if arch not in known:
            raise ValueError(f'unknown arch {arch!r}{suggest_name(arch, known)}')
        return known[arch]
    arch_type = type(next(iter(known.values())))
    fields = {field.name: field.default for field in fields_of(arch_type)}
    if not isinstance(arch, Mapping):
        raise ValueError(f'arch must be one of {list(known)} or a dict of {list(fields)}')
    for key in arch:
        if key not in fields:
            raise ValueError(f'unknown field {key!r} of arch{suggest_name(key, fields)}')
    if missing := [k for k, default in fields.items() if default is MISSING and k not in arch]:
        raise ValueError(f'arch lacks {missing}; fields: {list(fields)}')
    return arch_type(**arch)


class Backbone(BaseModule):
    """Base class of all backbones: outputs, frozen stages, norms, memory modes and forms.

    A family passes the shared arguments to ``super().__init__``, creates its modules, and ends its
    constructor with :meth:`_freeze`. It implements :meth:`_stage_modules`, :meth:`_layer_depths`
    and ``forward``. Layers after the last returned feature map are neither built nor run. A family
    also has an ``arch``, a name or a dict of its Arch's fields, and ``in_channels`` of the image.

    A family may have an inference form, which ``switch_to_deploy()`` builds in place from trained
    weights: its outputs equal those of the trained network in evaluation, it cannot be trained, and
    ``train()`` has no effect on it. Gradients reach the image only. Load weights first, and convert
    to half precision afterwards, so that they are rounded once.

    Args:
        map_channels: Channels of all feature maps, fine to coarse.
        map_strides: Strides of the same feature maps, in pixels of the image.
        out_indices: Feature maps to return: increasing indices, or a single one. Negative indices
            count from the end; None returns all.
        frozen_stages: -1 freezes nothing, 0 the stem, i the stem and stages 1 to i.
        norm_eval: Keep batch norms in eval mode during training.
        memory: What autograd saves, one of ``memory_modes``: 'plain' is torch's default, 'lean'
            saves convolution outputs and recomputes the layers in between (concatenation, norms,
            activations, gates), and 'recompute' saves the inputs of blocks (activation
            checkpointing; the least memory). Outputs, gradients and running statistics are the
            same.
        with_cp: Deprecated alias of ``memory='recompute'``.

    ValueError for an argument or a field of ``arch`` that is unknown or impossible, such as an
    index or a stage that does not exist, or indices that don't increase.
    """

    # Arch by name, and the address of the ImageNet weights that recipes start from, by arch. The
    # benchmark and the documents list the families that have archs.
    archs: Mapping[str, Any] = {}
    weights: Mapping[str, str] = {}
    # Options of mmdense's recipes: in all of them, in detectors, and with pretrained weights.
    recipe: Mapping[str, Any] = {}
    detector_recipe: Mapping[str, Any] = {}
    pretrained_recipe: Mapping[str, Any] = {}
    # Form -> ending, or endings, of parameter names that occur in its state dict only.
    form_marks: Mapping[str, str | tuple[str, ...]] = {}
    memory_modes: tuple[str, ...] = ('plain', 'lean', 'recompute')
    not_pretrained: tuple[str, ...] = ()  # prefixes of names that no ImageNet weights have
    compile_options: Mapping[str, Any] = {}  # of torch.compile on CUDA, if it has them

    form: str = 'trained'
    out_channels: tuple[int, ...]
    out_strides: tuple[int, ...]

    def __init__(
        self,
        *,
        map_channels: Sequence[int],
        map_strides: Sequence[int],
        out_indices: int | Sequence[int] | None,
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
        elif isinstance(out_indices, int):  # as in mmpretrain
            out_indices = (out_indices,)
        if any(not -num_maps <= i < num_maps for i in out_indices):
            raise ValueError(f'out_indices {tuple(out_indices)}: there are {num_maps} feature maps')
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

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile, as :meth:`torch.nn.Module.compile` does; arguments are those of torch.compile.

        Without any, on CUDA, the compiler has the family's ``compile_options``, and for 'lean' it
        recomputes activations in backward.
        """
        tuned = not (args or kwargs) and self._on_cuda()
        if tuned and self._options_exist():
            kwargs = dict(options=dict(self.compile_options))
        super().compile(*args, **kwargs)
        if tuned and self.memory == 'lean' and hasattr(functorch, *RECOMPUTE_MORE):
            call = functorch.patch(RECOMPUTE_MORE)(self._compiled_call_impl)
            self._compiled_call_impl = call

    def _on_cuda(self) -> bool:
        """Return whether the network may be trained on CUDA."""
        return self.form != 'deployed' and next(self.parameters()).is_cuda

    def _options_exist(self) -> bool:
        return self.compile_options.keys() <= {*torch._inductor.list_options()}

    def _stage_modules(self, stage: int) -> list[nn.Module]:
        """Return the modules of one stage; stage 0 is the stem."""
        raise NotImplementedError

    def _layer_depths(self, granularity: str) -> tuple[Mapping[str, int], int]:
        """Return the depth of each name or its prefix, finer prefixes first, and their number."""
        raise NotImplementedError

    def layer_depth(self, name: str, granularity: str = 'stage') -> tuple[int, int]:
        """Return ``(depth, number of depths)`` of a parameter, for layer-wise learning rates.

        The stem has depth 0. The last depth is that of layers without pretrained weights (output
        norms here, necks and heads elsewhere), so ``decay ** (number - 1 - depth)`` is 1 for them.
        Depths are those of the complete network, whichever feature maps are returned. Their unit,
        ``granularity``, is 'stage' (a dense stage in RDNet, everything between two feature maps in
        the others) or 'layer' (a block or dense layer). ValueError if the backbone has no such
        parameter, or there is no such granularity.
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

    def _load_from_state_dict(self, state_dict: dict, prefix: str, *rest: Any) -> None:
        # mmengine only warns about keys that don't fit, and some fit several forms.
        keys = [key for key in state_dict if key.startswith(prefix)]
        for form, endings in self.form_marks.items():
            if form != self.form and any(key.endswith(endings) for key in keys):
                way = f'build it with form={form!r}'
                if 'deployed' in (form, self.form):
                    way = 'load weights before switch_to_deploy()'
                raise UserError(
                    f'these are {type(self).__name__} weights of form={form!r}, the network is of '
                    f'form={self.form!r}: {way}'
                )
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def _finish_deploy(self) -> None:
        """Mark the network as deployed, after its modules were replaced; all channels-last."""
        self.form = 'deployed'
        self.frozen_stages = -1
        self.requires_grad_(False).eval().to(memory_format=torch.channels_last)

    def _freeze(self) -> None:
        """Put the frozen stages into evaluation, without gradients."""
        for stage in range(self.frozen_stages + 1):
            for module in self._stage_modules(stage):
                module.eval()
                module.requires_grad_(False)

    def train(self, mode: bool = True) -> Backbone:
        """Set training mode, except for frozen stages and, with ``norm_eval``, batch norms."""
        mode = mode and self.form != 'deployed'
        super().train(mode)
        if mode:
            self._freeze()
            if self.norm_eval:
                for module in self.modules():
                    if isinstance(module, _BatchNorm):
                        module.eval()
        return self

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the feature maps at ``out_indices``, [N, C_i, H_i, W_i], for images [N, C, H, W].

        ValueError if an image is smaller than the coarsest stride in either direction.
        """
        raise NotImplementedError
