"""What kernels would take with an operand in another layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from torch.fx import Node

from attnfuse.axes import Minor
from attnfuse.errors import NoKernel
from attnfuse.graph import facts
from attnfuse.kernels import Problem, choose
from attnfuse.passes.lower.choose import Plan, Wishes
from attnfuse.passes.lower.operands import nearest
from attnfuse.passes.site import Demand, Layout, Leaf

__all__ = ["Prices", "demands"]

_OPERANDS = ("query", "key", "value")


@dataclass(frozen=True)
class Prices:
    """What the fastest kernel takes for a problem; infinite where none can. Layers ask the same questions."""

    wishes: Wishes
    _known: dict[Problem, float] = field(default_factory=dict)

    def seconds(self, problem: Problem) -> float:
        """Seconds of a problem."""
        if problem not in self._known:
            self._known[problem] = self._asked(problem)
        return self._known[problem]

    def of(self, problem: Problem, names: Sequence[str]) -> tuple[float, float]:
        """Seconds with these operands d-minor, and with them n-minor."""
        return self.seconds(_with_minor(problem, names, "d")), self.seconds(_with_minor(problem, names, "n"))

    def _asked(self, problem: Problem) -> float:
        try:
            choice = choose(problem, self.wishes.target, self.wishes.kernel, portable=self.wishes.portable)
        except NoKernel:
            return float("inf")
        return choice.seconds[choice.kernel]


def demands(plans: Sequence[Plan], prices: Prices) -> tuple[Demand, ...]:
    """The operands of plans, and what their layouts cost. A tensor that is several operands is one demand."""
    # to write weights takes as long however the operands lie
    minding = [plan for plan in plans if not plan.problem.weights]
    asked = (_demand(plan, node, names, prices) for plan in minding for node, names in _tensors(plan).items())
    return tuple(demand for demand in asked if demand is not None)


def _tensors(plan: Plan) -> dict[Node, tuple[str, ...]]:
    """What each of a plan's tensors is read as."""
    found: dict[Node, tuple[str, ...]] = {}
    for name in _OPERANDS:
        node = nearest(getattr(plan.attention, name)).node
        found[node] = (*found.get(node, ()), name)
    return found


def _demand(plan: Plan, node: Node, names: tuple[str, ...], prices: Prices) -> Demand | None:
    dims = {_dims(getattr(plan.attention, name)) for name in names}
    (both,) = dims if len(dims) == 1 else {None}
    if both is None or min(facts.hint(node)[dim] for dim in both) < 2:
        return None
    today = getattr(plan.problem, names[0]).minor
    return Demand(plan.attention.site, names, node, *both, today, *prices.of(plan.problem, names))


def _dims(layout: Layout) -> tuple[int, int] | None:
    """The dimensions of the operand's tensor that its last two dimensions end in: columns, then rows."""
    leaf = nearest(layout)
    found = tuple(_dim_ending_in(leaf, group) for group in (layout.groups[-1], layout.groups[-2]))
    return None if None in found or found[0] == found[1] else (found[0], found[1])  # type: ignore[return-value]


def _dim_ending_in(leaf: Leaf, group: tuple[object, ...]) -> int | None:
    ends = (at for at, index in enumerate(leaf.place) if index.axes and group and index.axes[-1] == group[-1])
    return next(ends, None)


def _with_minor(problem: Problem, names: Sequence[str], minor: Minor) -> Problem:
    return replace(problem, **{name: replace(getattr(problem, name), minor=minor) for name in names})
