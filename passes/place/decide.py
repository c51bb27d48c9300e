"""What is done about layouts: the regions whose cheapest layouts are not today's, and what the alternatives cost."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from torch.fx import Node

from attnfuse.axes import Minor
from attnfuse.passes.place.extract import Gathered, Part, Region
from attnfuse.passes.place.problem import IMPOSSIBLE, Labels, other
from attnfuse.passes.place.reading import Copies, Views
from attnfuse.passes.place.region import Held
from attnfuse.passes.place.solve import solve
from attnfuse.passes.site import Demand

__all__ = ["Decision", "decide", "fixed_rules"]


@dataclass(frozen=True)
class Decision:
    """A region and the layouts that were chosen for its values."""

    region: Region
    labels: Labels

    @property
    def changes(self) -> bool:
        """Whether anything is to be edited."""
        return self.labels != self.region.problem.today

    @cached_property
    def chosen(self) -> dict[Node, Minor]:
        """The layout of each value."""
        return {part.node: label for part, label in self.parts() if isinstance(part, Held)}

    @property
    def demands(self) -> dict[Demand, Minor]:
        """The layout in which each operand is read."""
        return {part: label for part, label in self.parts() if isinstance(part, Demand)}

    def minors(self, site: Node) -> dict[str, Minor]:
        """The layouts of a site's operands by name, as far as the region decides them."""
        mine = ((demand.operands, minor) for demand, minor in self.demands.items() if demand.site.node is site)
        return {name: minor for names, minor in mine for name in names}

    def parts(self) -> list[tuple[Part, Minor]]:
        """Parts with their layouts."""
        return list(zip(self.region.parts, self.labels, strict=True))

    @property
    def seconds(self) -> float:
        """What the chosen layouts cost."""
        return self.region.problem.cost(self.labels)

    @property
    def spent(self) -> float:
        """What the chosen layouts cost more than today's, kernels not counted."""
        return self._beside_kernels(self.labels) - self._beside_kernels(self.region.problem.today)

    def _beside_kernels(self, labels: Labels) -> float:
        values = zip(self.region.parts, self.region.problem.values, labels, strict=True)
        return self.region.problem.cost(labels) - sum(
            v.price.of(x) for part, v, x in values if isinstance(part, Demand)
        )

    def withdrawn(self) -> Decision:
        """The region with today's layouts."""
        return Decision(self.region, self.region.problem.today)

    @property
    def copies(self) -> tuple[int, int]:
        """How many tensors are copied for their layout, in the source and as decided."""
        return _copies(self.region, self.region.problem.today), _copies(self.region, self.labels)

    @property
    def alternatives(self) -> dict[str, float]:
        """Seconds of fixed rules: nothing is changed; operands alone are copied; all that can is turned."""
        return {name: self.region.problem.cost(labels) for name, labels in fixed_rules(self.region).items()}


def decide(region: Region) -> Decision:
    """The best layouts of a region."""
    return Decision(region, solve(region.problem))


def fixed_rules(region: Region) -> dict[str, Labels]:
    """The layouts that fixed rules choose, by :attr:`Decision.alternatives`' names."""
    values, parts = region.problem.values, region.parts
    wanted = [
        "n" if v.price.n < v.price.d else "d" for v, p in zip(values, parts, strict=True) if isinstance(p, Demand)
    ]
    liked: Minor = "n" if wanted.count("n") * 2 > len(wanted) else "d"
    copied: list[Minor] = []
    turned: list[Minor] = []
    for value, part in zip(values, parts, strict=True):
        best: Minor = "n" if value.price.n < value.price.d else "d"
        copied.append(best if isinstance(part, Demand) and value.price.d != value.price.n else value.today)
        turned.append(liked if value.price.of(liked) < IMPOSSIBLE else other(liked))
    return {"fold": region.problem.today, "copy": tuple(copied), "propagate": tuple(turned)}


def _copies(region: Region, labels: Labels) -> int:
    """Copies that are made for a layout alone, and calls of ``contiguous`` or ``reshape`` that copy as they stand."""
    parts = region.parts
    made = [i for i, _ in region.problem.copies(labels) if not isinstance(parts[i], Gathered)]
    held = zip(parts, region.problem.values, labels, strict=True)
    stay = [part for part, value, label in held if _may_copy(part) and value.price.of(label)]
    return len(made) + len(stay)


def _may_copy(part: Part) -> bool:
    return isinstance(part, Held) and isinstance(part.reading, (Copies, Views))
