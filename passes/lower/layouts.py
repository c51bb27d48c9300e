"""What kernels would take with an operand in another layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial

from torch.fx import Node

from attnfuse.axes import Minor
from attnfuse.errors import NoKernel
from attnfuse.graph import facts
from attnfuse.kernels import Problem, choose
from attnfuse.passes.lower.choose import Plan, Wishes
from attnfuse.passes.lower.operands import nearest
from attnfuse.passes.site import Demand, Layout, Leaf

__all__ = ["demands"]

_OPERANDS = ("query", "key", "value")


def demands(plans: Sequence[Plan], wishes: Wishes) -> tuple[Demand, ...]:
    """The operands of plans whose layout matters to some kernel. A tensor that is several operands is one demand."""
    # layers ask the same questions
    seconds = cache(partial(_seconds, wishes=wishes))
    asked = (_demand(plan, node, names, seconds) for plan in plans for node, names in _tensors(plan).items())
    return tuple(demand for demand in asked if demand is not None)


def _tensors(plan: Plan) -> dict[Node, tuple[str, ...]]:
    """What each of a plan's tensors is read as."""
    found: dict[Node, tuple[str, ...]] = {}
    for name in _OPERANDS:
        node = nearest(getattr(plan.attention, name)).node
        found[node] = (*found.get(node, ()), name)
    return found


def _demand(plan: Plan, node: Node, names: tuple[str, ...], seconds: Callable[[Problem], float]) -> Demand | None:
    dims = {_dims(getattr(plan.attention, name)) for name in names}
    (both,) = dims if len(dims) == 1 else {None}
    if both is None or min(facts.hint(node)[dim] for dim in both) < 2:
        return None
    d, n = (seconds(_with_minor(plan.problem, names, minor)) for minor in ("d", "n"))
    if d == n:
        return None
    today = getattr(plan.problem, names[0]).minor
    return Demand(plan.attention.site, names, node, *both, today, d, n)


def _dims(layout: Layout) -> tuple[int, int] | None:
    """The dimensions of the operand's tensor that its last two dimensions end in: columns, then rows."""
    leaf = nearest(layout)
    found = tuple(_dim_ending_in(leaf, group) for group in (layout.groups[-1], layout.groups[-2]))
    return None if None in found or found[0] == found[1] else (found[0], found[1])  # type: ignore[return-value]


def _dim_ending_in(leaf: Leaf, group: tuple[object, ...]) -> int | None:
    ends = (at for at, index in enumerate(leaf.place) if index.axes and group and index.axes[-1] == group[-1])
    return next(ends, None)


def _with_minor(problem: Problem, names: tuple[str, ...], minor: Minor) -> Problem:
    return replace(problem, **{name: replace(getattr(problem, name), minor=minor) for name in names})


def _seconds(problem: Problem, wishes: Wishes) -> float:
    """What the fastest kernel takes; infinite where none can."""
    try:
        choice = choose(problem, wishes.target, wishes.kernel, portable=wishes.portable)
    except NoKernel:
        return float("inf")
    return choice.seconds[choice.kernel]
