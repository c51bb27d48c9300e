"""Axis algebra: where an element of a tensor lies, written with named axes.

A tensor dimension is read at an :class:`Index`: an ordered product of axes (a mixed-radix number, most
significant digit first) plus an offset. ``view [B*H, M] -> [B, H, M]`` read at ``(b, h, m)`` is its
input read at ``(b h, m)``; the way back *splits* an axis into the factors that the view asks for, once
and for everybody, in a :class:`Space`. Torch is not known here; sizes are ints or sympy expressions.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

import sympy

__all__ = ["Axis", "Index", "Minor", "Size", "Space", "Unreadable", "divided", "product", "same_size"]

Size: TypeAlias = int | sympy.Expr

#: Which of an operand's last two dimensions, rows ``n`` or columns ``d``, is contiguous in memory.
Minor = Literal["d", "n"]


class Unreadable(Exception):
    """An index that this algebra cannot follow; the value is then taken as it is, unread."""


@dataclass(frozen=True)
class Axis:
    """One loop of the program: a name, unique in its :class:`Space`, and a size."""

    name: str
    size: Size


@dataclass(frozen=True)
class Index:
    """``offset + digits``, the digits being axes in mixed radix, most significant first.

    ``Index(())`` is the constant 0, which is how a dimension of size 1 is read.
    """

    axes: tuple[Axis, ...] = ()
    offset: Size = 0

    @property
    def extent(self) -> Size:
        """How many values the index takes."""
        return product(axis.size for axis in self.axes)

    def covers(self, size: Size) -> bool:
        """Whether the index runs over the whole of a dimension of that size, in order."""
        return self.offset == 0 and same_size(self.extent, size)


def product(sizes: Iterable[Size]) -> Size:
    """The product of sizes; 1 when there are none."""
    return math.prod(sizes)


def same_size(a: Size, b: Size) -> bool:
    """Whether two sizes are equal for all values of their symbols."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(sympy.expand(a - b) == 0)


def divided(size: Size, by: Size) -> Size | None:
    """``size / by`` where that is a whole number for all values of the symbols, else None."""
    if isinstance(size, int) and isinstance(by, int):
        return size // by if by and size % by == 0 else None
    quotient = sympy.cancel(sympy.sympify(size) / by)
    if sympy.denom(quotient) != 1:
        return None
    return int(quotient) if quotient.is_Integer else quotient


@dataclass
class Space:
    """The axes of one site, and how some of them turned out to be products of others."""

    splits: dict[Axis, tuple[Axis, ...]] = field(default_factory=dict)
    _count: int = 0

    def fresh(self, size: Size) -> Index:
        """An index over a new axis; the constant 0 for size 1."""
        if same_size(size, 1):
            return Index()
        return Index((self._axis(size),))

    def _axis(self, size: Size) -> Axis:
        self._count += 1
        return Axis(f"i{self._count}", size)

    def resolve(self, axes: Iterable[Axis]) -> tuple[Axis, ...]:
        """The axes with every split one replaced by its factors."""
        out: list[Axis] = []
        for axis in axes:
            out += self.resolve(self.splits[axis]) if axis in self.splits else (axis,)
        return tuple(out)

    def resolved(self, index: Index) -> Index:
        """The same index in today's axes."""
        return Index(self.resolve(index.axes), index.offset)

    def regroup(self, index: Sequence[Index], shape: Sequence[Size], into: Sequence[Size]) -> tuple[Index, ...]:
        """``index`` of a tensor of ``shape`` as an index of the same elements viewed with shape ``into``.

        Splits axes where a dimension of ``into`` ends inside one. Raises :class:`Unreadable` when an index
        that does not cover its dimension would have to be regrouped, or sizes do not divide.
        """
        head, tail = _common_ends(shape, into)
        stop, into_stop = len(shape) - tail, len(into) - tail
        middle = self._digits(index[head:stop], shape[head:stop])
        cut = tuple(self._take(middle, size) for size in into[head:into_stop])
        if middle:
            raise Unreadable(f"shapes {tuple(shape)} and {tuple(into)} hold different numbers of elements")
        return (*index[:head], *cut, *index[stop:])

    def _digits(self, index: Sequence[Index], shape: Sequence[Size]) -> list[Axis]:
        for part, size in zip(index, shape, strict=True):
            if not part.covers(size):
                raise Unreadable("a view regroups a dimension that is read in part")
        return [axis for part in index for axis in self.resolve(part.axes)]

    def _take(self, digits: list[Axis], size: Size) -> Index:
        """Removes from the front of ``digits`` those that make up a dimension of ``size``."""
        taken: list[Axis] = []
        while not same_size(product(axis.size for axis in taken), size):
            if not digits:
                raise Unreadable(f"no digits left for a dimension of size {size}")
            wanted = divided(size, product(axis.size for axis in taken))
            axis = digits.pop(0)
            if wanted is None or divided(wanted, axis.size) is None:
                axis, rest = self._split(axis, wanted)
                digits.insert(0, rest)
            taken.append(axis)
        return Index(tuple(taken))

    def _split(self, axis: Axis, size: Size | None) -> tuple[Axis, Axis]:
        """Splits ``axis`` into (``size``, the rest)."""
        rest = None if size is None else divided(axis.size, size)
        if size is None or rest is None:
            raise Unreadable(f"a dimension of size {size} ends inside an axis of size {axis.size}")
        parts = (self._axis(size), self._axis(rest))
        self.splits[axis] = parts
        return parts


def _common_ends(a: Sequence[Size], b: Sequence[Size]) -> tuple[int, int]:
    """How many leading, and then how many trailing, dimensions two shapes share."""
    limit, head, tail = min(len(a), len(b)), 0, 0
    while head < limit and same_size(a[head], b[head]):
        head += 1
    while tail < limit - head and same_size(a[-1 - tail], b[-1 - tail]):
        tail += 1
    return head, tail
