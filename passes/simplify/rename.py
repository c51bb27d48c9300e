"""A site's programs, in the names of :mod:`attnfuse.spec`: indices by role, captures and sizes numbered by use."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeVar

from attnfuse.algebra import WEIGHT_RULES, normalise
from attnfuse.axes import Axis, Size, product
from attnfuse.graph import facts
from attnfuse.passes.simplify.roles import Axes
from attnfuse.passes.site import Leaf, Site
from attnfuse.score import Apply, Capture, Const, Expr, Index, Symbol, apply, rewrite

__all__ = ["Renamer"]

Item = TypeVar("Item")


@dataclass
class Renamer:
    """Renames all programs of one site; ``leaves`` and ``symbols`` grow in the order of first use."""

    site: Site
    dimensions: dict[str, Axes]
    leaves: list[Leaf] = field(default_factory=list)
    symbols: list[Size] = field(default_factory=list)

    def program(self, expr: Expr) -> Expr:
        """The canonical program: renamed, then normalised again, since comparisons are solved for ``n`` by name."""
        also = WEIGHT_RULES if self.site.normaliser == "none" else ()
        return normalise(rewrite(expr, self._atom), lambda slot: facts.kind(self.leaves[slot].node), also)

    def _atom(self, expr: Expr) -> Expr:
        match expr:
            case Capture(slot):
                return Capture(_number(self.site.leaves[slot], self.leaves))
            case Symbol(slot):
                return self._size(self.site.symbols[slot])
            case Index(variable):
                return self._position(self.site.variables[variable])
        return expr

    def _size(self, size: Size) -> Expr:
        return Const(size) if isinstance(size, int) else Symbol(_number(size, self.symbols))

    def _position(self, axes: Axes) -> Expr:
        """The number that the digits ``axes`` make, from the indices of the dimensions they are in."""
        for name, dimension in self.dimensions.items():
            if axes == dimension:
                return Index(name)
        total: Expr = Const(0)
        for axis in axes:
            total = apply("add", apply("mul", total, self._size(axis.size)), self._digit(axis))
        return total

    def _digit(self, axis: Axis) -> Expr:
        name, dimension = next((n, axes) for n, axes in self.dimensions.items() if axis in axes)
        at = dimension.index(axis)
        below = product(a.size for a in dimension[at + 1 :])
        shifted: Expr = Index(name) if below == 1 else apply("floordiv", Index(name), self._size(below))
        return shifted if at == 0 else Apply("mod", (shifted, self._size(axis.size)))


def _number(item: Item, known: list[Item]) -> int:
    if item not in known:
        known.append(item)
    return known.index(item)
