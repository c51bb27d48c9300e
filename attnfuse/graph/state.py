"""What is known of a graph's inputs besides their shapes: which are parameters, and which have a value for good."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor

__all__ = ["State"]


@dataclass(frozen=True)
class State:
    """Names of the placeholders that are parameters, and the values of those that never change."""

    parameters: frozenset[str] = frozenset()
    constants: Mapping[str, Tensor] = field(default_factory=dict)
