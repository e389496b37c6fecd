"""Layer-wise learning rate decay from the heads down to the backbone's stem."""

import math
from collections.abc import Collection, Mapping
from numbers import Real
from typing import Any

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from torch import nn

from mmdense.errors import suggest_name
from mmdense.models.backbones.base import GRANULARITIES
from mmdense.models.backbones.rdnet import RDNet
from mmdense.registry import OPTIM_WRAPPER_CONSTRUCTORS

MODES = ('exact', 'published')
# RDNet's release counts 7 stages in every size, and places the heads one depth after the last.
PUBLISHED_DEPTHS = 7 + 2
PUBLISHED_HEADS = PUBLISHED_DEPTHS + 1
COMPILED = '_orig_mod.'  # torch.compile's prefix of parameter names
FSDP = 'FullyShardedDataParallel'


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Scale learning rates by ``decay_rate ** (number of depths - 1 - depth)``.

    The depths come from ``backbone.layer_depth(name, granularity)``: 0 for the stem, the last one
    for layers that were not pretrained. Necks and heads use the base learning rate. One-dimensional
    parameters and biases have no weight decay. Frozen parameters are left out of the optimizer, and
    shared ones count once. The scales are logged as a table. The optimizer needs ``lr`` and
    ``weight_decay``.

    Settings in ``paramwise_cfg``:

    - ``decay_rate`` (float): Above 0, at most 1.
    - ``granularity`` ('stage' or 'layer'): One step of depth. 'stage' by default.
    - ``mode`` ('exact' or 'published'): 'published' gives the scales of RDNet's release, which
      counts 7 stages in every size and places the heads after the last depth. The heads get
      ``decay_rate ** -2`` and stage i (from 0) gets ``decay_rate ** (7 - i)``, which exceeds 1 for
      the last stages of the larger sizes. 'exact' by default.
    - ``custom_keys`` (dict): As in mmengine, settings for the parameters whose names contain a key;
      the longest key wins. ``lr_mult`` and ``decay_mult`` multiply the values above.

    ValueError if a setting is unknown, missing or out of range, if a custom key matches no
    parameter, or if the backbone has no ``layer_depth``.
    """

    def _validate_cfg(self) -> None:
        cfg = self.paramwise_cfg
        _check_keys('paramwise_cfg', cfg, ('decay_rate', 'granularity', 'mode', 'custom_keys'))
        rate = cfg.get('decay_rate')
        if not _is_number(rate) or not 0 < rate <= 1:
            raise ValueError(f'paramwise_cfg.decay_rate is {rate!r}, must be above 0, at most 1')
        for key, known in (('granularity', GRANULARITIES), ('mode', MODES)):
            if cfg.get(key, known[0]) not in known:
                raise ValueError(f'paramwise_cfg.{key} is {cfg[key]!r}, must be one of {known}')
        self.granularity = cfg.get('granularity', GRANULARITIES[0])
        self.published = cfg.get('mode') == 'published'
        if self.published and self.granularity != 'stage':
            raise ValueError("paramwise_cfg.granularity must be 'stage' in mode 'published'")
        custom = cfg.get('custom_keys', {})
        _check_keys('paramwise_cfg.custom_keys', custom, custom)
        for name, settings in custom.items():
            where = f'paramwise_cfg.custom_keys[{name!r}]'
            _check_keys(where, settings, ('lr_mult', 'decay_mult'))
            for key, value in settings.items():
                if not _is_number(value) or value < 0:
                    raise ValueError(f'{where}.{key} is {value!r}, must be a number from 0 up')
        for key in ('lr', 'weight_decay'):
            if not _is_number(self.optimizer_cfg.get(key)):
                raise ValueError(f'optimizer.{key} must be a number for layer decay to scale')

    def __call__(self, model: nn.Module) -> OptimWrapper:
        if any(c.__name__ == FSDP for m in model.modules() for c in type(m).__mro__):
            raise ValueError(f'layer decay does not support {FSDP}, which flattens parameters')
        return super().__call__(model)

    def add_params(self, params: list[dict], module: nn.Module, **kwargs: Any) -> None:
        """Append a model's groups to ``params``, one per depth and setting, with its ``depth``."""
        backbone = self._backbone(module)
        name, _ = next(backbone.named_parameters())
        last = backbone.layer_depth(name, self.granularity)[1] - 1
        custom = self.paramwise_cfg.get('custom_keys', {})
        names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
        for key in custom:
            if not any(key in name for name in names):
                raise ValueError(f'paramwise_cfg.custom_keys[{key!r}] matches no parameter')
        keys = sorted(custom, key=lambda key: (-len(key), key))  # mmengine's order
        groups, scales = {}, {}
        for name, parameter in module.named_parameters():  # without duplicates
            if not parameter.requires_grad:
                continue
            name = name.replace(COMPILED, '')
            depth = last
            if name.startswith('backbone.'):
                name_inside = name.removeprefix('backbone.')
                depth, _ = backbone.layer_depth(name_inside, self.granularity)
            settings = next((custom[key] for key in keys if key in name), {})
            scale = self._scale(depth, last) * settings.get('lr_mult', 1)
            decays = parameter.ndim > 1 and not name.endswith('.bias')
            weight_decay = self.base_wd * decays * settings.get('decay_mult', 1)
            scales.setdefault((depth, scale), []).append(parameter.numel())
            group = dict(params=[], lr=self.base_lr * scale, weight_decay=weight_decay, depth=depth)
            group = groups.setdefault((depth, scale, weight_decay), group)
            group['params'].append(parameter)
        # The order must not depend on the settings: a resumed optimizer matches groups by position.
        params.extend(groups.values())
        self._log(scales)

    def _backbone(self, module: nn.Module) -> nn.Module:
        """Return the backbone, which must have ``layer_depth``."""
        backbone = getattr(module, 'backbone', None)
        if backbone is None:
            raise ValueError(f'{type(module).__name__} has no backbone, which layer decay needs')
        backbone = getattr(backbone, COMPILED.rstrip('.'), backbone)
        if not hasattr(backbone, 'layer_depth'):
            raise ValueError(
                f'{type(backbone).__name__} cannot be used with layer decay: add a method '
                'layer_depth(name, granularity) that returns (depth, number of depths), from 0 for '
                'the stem to number - 1 for layers that were not pretrained'
            )
        if self.published and not isinstance(backbone, RDNet):
            raise ValueError("paramwise_cfg.mode 'published' is only for RDNet: use 'exact'")
        return backbone

    def _scale(self, depth: int, last: int) -> float:
        if self.published:
            depth = PUBLISHED_HEADS if depth == last else depth
            last = PUBLISHED_DEPTHS - 1
        return self.paramwise_cfg['decay_rate'] ** (last - depth)

    def _log(self, scales: Mapping[tuple[int, float], list[int]]) -> None:
        lines = [f'layer decay {self.paramwise_cfg}, learning rate {self.base_lr:g}']
        lines.append(f'{"depth":>5} {"scale":>9} {"lr":>9} {"parameters":>11}')
        for (depth, scale), sizes in sorted(scales.items()):
            lines.append(f'{depth:5} {scale:9.4g} {self.base_lr * scale:9.3g} {sum(sizes):11,}')
        print_log('\n'.join(lines), logger='current')


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _check_keys(where: str, settings: Any, known: Collection[str]) -> None:
    if not isinstance(settings, Mapping):
        raise ValueError(f'{where} is {settings!r}, must be a dict')
    for key in settings:
        if key not in known:
            raise ValueError(f'unknown {where}.{key}{suggest_name(str(key), known)}')
