"""A program at a single score, as flex_attention asks for it: scalars go in, a scalar comes out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from attnfuse.reference import Scope, evaluate
from attnfuse.score import Capture, Expr, walk
from attnfuse.spec import AttentionSpec

__all__ = ["Modification"]


@dataclass(frozen=True)
class Element(Scope):
    """The scope of one score: its indices, and captured tensors cut down to the axes that they vary along."""

    at: tuple[Tensor, ...] = ()
    axes: Mapping[int, Sequence[int]] = field(default_factory=dict)
    given: Mapping[int, Tensor] = field(default_factory=dict)

    def index(self, axis: int) -> Tensor:
        """A scalar, int64."""
        return self.at[axis].to(torch.int64)

    def capture(self, slot: int) -> Tensor:
        """A captured tensor's value here."""
        tensor, place = self.given[slot], [self.at[axis] for axis in self.axes[slot]]
        # not tensor[place], which would ask a scalar for its value
        found: Tensor = torch.ops.aten.index.Tensor(tensor, place) if place else tensor
        return found.to(self.dtype) if found.is_floating_point() else found


@dataclass(frozen=True)
class Modification:
    """``program`` as a ``score_mod`` or a ``mask_mod``, to be called with its :attr:`buffers` behind the indices.

    flex_attention has one batch axis: ``batch`` are the sizes of those that it stands for.
    """

    spec: AttentionSpec
    program: Expr
    batch: tuple[int, ...]
    captures: Sequence[Tensor]

    @property
    def slots(self) -> tuple[int, ...]:
        """The captures that the program reads."""
        return tuple(sorted({part.slot for part in walk(self.program) if isinstance(part, Capture)}))

    @property
    def buffers(self) -> dict[int, Tensor]:
        """Those captures by slot, without the axes they broadcast along."""
        return {slot: self.captures[slot].squeeze(self._axes(slot, varying=False)) for slot in self.slots}

    def score_mod(self, score: Tensor, b: Tensor, h: Tensor, m: Tensor, n: Tensor, *buffers: Tensor) -> Tensor:
        """The logit of a score."""
        return self._value((b, h, m, n), buffers, score)

    def mask_mod(self, b: Tensor, h: Tensor, m: Tensor, n: Tensor, *buffers: Tensor) -> Tensor:
        """Whether a key is kept."""
        return self._value((b, h, m, n), buffers, None)

    def _value(self, at: tuple[Tensor, ...], buffers: Sequence[Tensor], score: Tensor | None) -> Tensor:
        b, *others = at
        indices: list[Tensor] = []
        for size in reversed(self.batch):
            indices.insert(0, b % size if len(self.batch) > 1 else b)
            b = b // size if len(self.batch) > 1 else b
        axes = {slot: self._axes(slot, varying=True) for slot in self.slots}
        spans = tuple((0, 1) for _ in self.spec.axes)
        given = dict(zip(self.slots, buffers, strict=True))
        scope = Element(spans, (), (), torch.float32, at[0].device, score, None, (*indices, *others), axes, given)
        return evaluate(self.program, scope)

    def _axes(self, slot: int, *, varying: bool) -> tuple[int, ...]:
        named = self.spec.captures[slot].axes
        return tuple(axis for axis, name in enumerate(self.spec.axes) if (name in named) == varying)
