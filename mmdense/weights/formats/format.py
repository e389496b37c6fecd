"""What a foreign format of weights is: rules from its keys to ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor

__all__ = ['AFFINE', 'Format', 'Mapped', 'NORM', 'Rule', 'below']

# A pattern of the whole key, and our key (with groups of the pattern), or None for what is dropped.
Rule = tuple[str, str | Callable[[re.Match], str] | None]
AFFINE = r'(?:weight|bias)'
NORM = r'(?:weight|bias|running_mean|running_var|num_batches_tracked)'


@dataclass(frozen=True)
class Mapped:
    """A state dict with our keys.

    Attributes:
        weights: Our keys, with the tensors that were given.
        dropped: Their keys that no dense prediction needs, such as the classifier's.
        unknown: Their keys that the format doesn't have. They are in ``weights`` too, as they are.
    """

    weights: dict[str, Any]
    dropped: list[str]
    unknown: list[str]


@dataclass(frozen=True)
class Format:
    """A naming of weights that was published.

    Attributes:
        name: Such as 'rdnet'.
        about: What is published so, in a few words.
        sign: Pattern at the beginning of a key; some key of each such file matches it, and none of
            another format's.
        rules: The first one that matches a key decides.
        values: Changes mapped tensors where not only the names differ; raises ValueError.
    """

    name: str
    about: str
    sign: str
    rules: tuple[Rule, ...]
    values: Callable[[dict[str, Any]], dict[str, Any]] | None = None

    @cached_property
    def _compiled(self) -> list[tuple[re.Pattern, str | Callable[[re.Match], str] | None]]:
        return [(re.compile(pattern), to) for pattern, to in self.rules]

    def recognises(self, keys: Mapping[str, Any]) -> bool:
        """Say whether a state dict bears the format's sign."""
        sign = re.compile(self.sign)
        return any(sign.match(key) for key in keys)

    def _rule(self, key: str) -> tuple[re.Match | None, str | Callable[[re.Match], str] | None]:
        for pattern, to in self._compiled:
            if match := pattern.fullmatch(key):
                return match, to
        return None, None

    def map(self, state_dict: Mapping[str, Tensor]) -> Mapped:
        """Return the state dict with our keys; what was given is left as it was.

        Raises:
            ValueError: Two keys are the same one of ours, or tensors that the format cannot hold.
        """
        mapped, sources, dropped, unknown = {}, {}, [], []
        for key, value in state_dict.items():
            match, to = self._rule(key)
            if match is None:
                unknown.append(key)
            elif to is None:
                dropped.append(key)
            else:
                ours = to(match) if callable(to) else match.expand(to)
                if ours in mapped:
                    raise ValueError(f'{sources[ours]} and {key} are both {ours}')
                mapped[ours], sources[ours] = value, key
        if self.values is not None and mapped:
            mapped = self.values(mapped)
        for key in unknown:
            if key in mapped:
                raise ValueError(f'{sources[key]} and {key} are both {key}')
            mapped[key] = state_dict[key]
        return Mapped(mapped, dropped, unknown)


def below(prefix: str, rules: tuple[Rule, ...]) -> tuple[Rule, ...]:
    """Return rules for the same keys behind a prefix, which ours get too."""

    def moved(to: str | Callable[[re.Match], str] | None) -> Any:
        if to is None:
            return None
        return (lambda match: prefix + to(match)) if callable(to) else prefix + to

    return tuple((re.escape(prefix) + pattern, moved(to)) for pattern, to in rules)
