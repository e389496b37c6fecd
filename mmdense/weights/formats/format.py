"""A weight format: rules that rename its keys to mmdense's."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from torch import Tensor

# A pattern of a complete key, and mmdense's key (with the pattern's groups), or None to drop it.
Target = str | Callable[[re.Match], str] | None
Rule = tuple[str, Target]
AFFINE = r'(?:weight|bias)'
NORM = r'(?:weight|bias|running_mean|running_var|num_batches_tracked)'


class Mapped(NamedTuple):
    """A state dict with mmdense's keys."""

    weights: dict[str, Any]  # mmdense's keys, and the unknown ones -> the given tensors
    dropped: list[str]  # source keys that the model doesn't need, such as a classifier's
    unknown: list[str]  # source keys that the format doesn't have


@dataclass(frozen=True)
class Format:
    """Published names of weights."""

    name: str  # such as 'rdnet'
    about: str  # the published weights of this format, in a few words
    sign: str  # pattern of the beginning of a key that is in each file of this format, in no other
    rules: tuple[Rule, ...]  # the first that matches a key decides
    # The classifier's keys -> names in an ImageClassifier with the family's neck.
    classifier: tuple[Rule, ...] = ()
    # Changes renamed tensors, if more than names differ; raises ValueError.
    values: Callable[[dict[str, Any]], dict[str, Any]] | None = None

    @cached_property
    def _compiled(self) -> list[tuple[re.Pattern, Target, str]]:
        return [
            (re.compile(pattern), target, part)
            for part, rules in (('backbone.', self.rules), ('', self.classifier))
            for pattern, target in rules
        ]

    def recognises(self, keys: Mapping[str, Any]) -> bool:
        """Return whether a state dict is of this format."""
        sign = re.compile(self.sign)
        return any(sign.match(key) for key in keys)

    def map(
        self, state_dict: Mapping[str, Tensor], *, strict: bool = False, complete: bool = False
    ) -> Mapped:
        """Return a state dict with mmdense's keys; the given one stays unchanged.

        They are those of a backbone, or of an ImageClassifier if ``complete``. ValueError if two
        keys have the same name in mmdense, tensors cannot be of the format, or ``strict`` and some
        keys are unknown.
        """
        renamed, sources, dropped, unknown = {}, {}, [], []
        for key, value in state_dict.items():
            matches = ((pattern.fullmatch(key), *rest) for pattern, *rest in self._compiled)
            match, target, part = next((found for found in matches if found[0]), (None, None, ''))
            if match is None:
                unknown.append(key)
            elif target is None or not (part or complete):
                dropped.append(key)
            else:
                name = target(match) if callable(target) else match.expand(target)
                name = part + name if complete else name
                if name in renamed:
                    raise ValueError(f'{sources[name]} and {key} are both {name}')
                renamed[name], sources[name] = value, key
        if unknown and strict:
            raise ValueError(
                f'{len(unknown)} keys are not of the format {self.name} ({self.about}), such as '
                f'{unknown[:3]}'
            )
        if self.values is not None and renamed:
            renamed = self.values(renamed)
        for key in unknown:
            if key in renamed:
                raise ValueError(f'{sources[key]} and {key} are both {key}')
            renamed[key] = state_dict[key]
        return Mapped(renamed, dropped, unknown)
