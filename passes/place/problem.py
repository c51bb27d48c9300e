"""Where transposes go, as one optimisation problem: values, the layouts they can have, and what copies cost.

Each value lies in memory d-minor or n-minor (:data:`attnfuse.axes.Minor`). Holding it so has a price: a linear
layer writes either for nothing, a graph input has one layout, a kernel's operand costs what the kernel takes with
it. A value that somebody reads in the other layout is copied, once, however many read the copy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from attnfuse.axes import Minor

__all__ = ["IMPOSSIBLE", "Labels", "Price", "Problem", "Value", "other"]

IMPOSSIBLE = math.inf


@dataclass(frozen=True)
class Price:
    """Seconds of something for each layout."""

    d: float = 0.0
    n: float = 0.0

    def of(self, minor: Minor) -> float:
        """Seconds for that layout."""
        return self.d if minor == "d" else self.n

    @staticmethod
    def only(minor: Minor) -> Price:
        """Nothing for a layout, and the other ruled out."""
        return Price(n=IMPOSSIBLE) if minor == "d" else Price(d=IMPOSSIBLE)


@dataclass(frozen=True)
class Value:
    """A tensor, or an operand as a kernel reads it.

    ``price`` is that of holding it in a layout, ``copy`` that of a copy of it *in* a layout. ``reads`` are the values
    it is made of, each in its own layout or as a copy; ``tied`` those whose layout it shares, copies or not. Both name
    values by their place in the problem, and only earlier ones. ``today`` is the layout it has in the source.
    """

    name: str
    price: Price = Price()
    copy: Price = Price()
    reads: tuple[int, ...] = ()
    tied: tuple[int, ...] = ()
    today: Minor = "d"


#: A layout for each value.
Labels = tuple[Minor, ...]


@dataclass(frozen=True)
class Problem:
    """Values in an order in which each comes after those it reads."""

    values: tuple[Value, ...]

    def cost(self, labels: Sequence[Minor]) -> float:
        """Seconds of an assignment; infinite for one that cannot be."""
        held = sum(value.price.of(label) for value, label in zip(self.values, labels, strict=True))
        if any(labels[i] != label for value, label in zip(self.values, labels, strict=True) for i in value.tied):
            return IMPOSSIBLE
        return held + sum(self.values[i].copy.of(minor) for i, minor in self.copies(labels))

    def copies(self, labels: Sequence[Minor]) -> tuple[tuple[int, Minor], ...]:
        """The values that are copied under an assignment, with the layouts of the copies."""
        wanted = {(i, label) for value, label in zip(self.values, labels, strict=True) for i in value.reads}
        return tuple(sorted((i, label) for i, label in wanted if labels[i] != label))

    @property
    def today(self) -> Labels:
        """The layouts that the source has."""
        return tuple(value.today for value in self.values)


def other(minor: Minor) -> Minor:
    """The layout that this one is not."""
    return "n" if minor == "d" else "d"
