"""From a graph and what kernels ask for to layout problems, one for each region whose values hang together."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Collection, Hashable, Sequence
from dataclasses import dataclass, replace

from torch.fx import Graph, Node

from attnfuse.axes import Minor
from attnfuse.graph import facts
from attnfuse.graph.strides import matters
from attnfuse.graph.weightless import strides_of
from attnfuse.kernels.prices import Table
from attnfuse.passes.place.problem import IMPOSSIBLE, Price, Problem, Value, other
from attnfuse.passes.place.reading import Copies, Gathers, Passes, Stops, Views, Writes
from attnfuse.passes.place.region import Held, Walk, copies
from attnfuse.passes.site import Demand

__all__ = ["Gathered", "Outside", "Part", "Region", "extract"]


@dataclass(frozen=True)
class Outside:
    """Whoever else reads a value and may rely on how it lies today."""

    node: Node


@dataclass(frozen=True)
class Gathered:
    """A value as an operation reads it that moves its elements anyway, but more slowly where it transposes them."""

    node: Node
    by: Node


#: What a value of a problem stands for.
Part = Held | Gathered | Outside | Demand


@dataclass(frozen=True)
class Region:
    """Parts of a graph and, in the same order, the values of the problem that they pose."""

    parts: tuple[Part, ...]
    problem: Problem
    batched: bool

    def repriced(self, prices: Callable[[Demand], tuple[float, float]]) -> Region:
        """The region with other prices of the operands, d-minor and n-minor."""
        values = zip(self.parts, self.problem.values, strict=True)
        new = (replace(v, price=Price(*prices(part))) if isinstance(part, Demand) else v for part, v in values)
        return Region(self.parts, Problem(tuple(new)), self.batched)


def extract(
    graph: Graph,
    demands: Sequence[Demand],
    gone: Collection[Node],
    place_of: Callable[[Node], Node | None],
    table: Table,
    *,
    compiled: bool = False,
) -> tuple[Region, ...]:
    """The regions that the demands' operands come from. ``gone`` are nodes that will not be there any more.

    In a graph that is ``compiled`` the last of some pointwise operations writes a copy in one pass with its result.
    """
    walk = Walk(graph, place_of).run(demands)
    if walk.stuck:
        walk = min(walk, Walk(graph, place_of, batched=True).run(demands), key=lambda each: each.stuck)
    writer = _Writer(walk.held, gone, table, compiled)
    for held in walk.held.values():
        writer.add_held(held)
    for demand in demands:
        writer.add_demand(demand)
    return tuple(Region(*found, walk.batched) for found in writer.components())


class _Writer:
    """Writes values one after another; each is known by its node, or by what it stands for."""

    def __init__(self, held: dict[Node, Held], gone: Collection[Node], table: Table, compiled: bool) -> None:
        self._held, self._table = held, table
        passing = [each for each in held.values() if isinstance(each.reading, Passes)]
        within = {source for each in passing for source in each.reading.sources}
        self._copied_in_passing = {each.node for each in passing if each.node not in within} if compiled else set()
        # what stops the walk may still hand on how its operands lie
        self._ignored = {*gone, *(node for node, each in held.items() if not isinstance(each.reading, Stops))}
        self._at: dict[Hashable, int] = {}
        self._parts: list[Part] = []
        self._values: list[Value] = []

    def add_held(self, held: Held) -> None:
        """A value, and those who read it beside the region."""
        sources = dict.fromkeys(held.reading.sources)
        reads: list[Hashable] = [] if _is_piece(held) else list(sources)
        tied = list(sources) if _is_piece(held) else []
        if isinstance(held.reading, Gathers) or self._stays_a_copy(held):
            reads = [self._gathered(source, held) for source in sources]
        self._add(held.node, held, self._price(held), reads, tied, held.today)
        if not isinstance(held.reading, Stops) and matters(held.node, self._ignored):
            self._add(Outside(held.node), Outside(held.node), Price.only(held.today), [held.node], [], held.today)

    def add_demand(self, demand: Demand) -> None:
        """An operand of a fused node."""
        today = self._held[demand.node].today
        self._add(id(demand), demand, Price(demand.d, demand.n), [demand.node], [], today)

    def _gathered(self, source: Node, held: Held) -> Hashable:
        part = Gathered(source, held.node)
        slower = self._slower(source)
        today = self._held[source].today
        self._add(part, part, Price(), [], [source], today, Price(slower, slower))
        return part

    def _stays_a_copy(self, held: Held) -> bool:
        """Whether a copy is one even if its source lies as it does."""
        match held.reading:
            case Copies((source,)):
                return self._held[source].strides(other(held.today)) != held.turned
        return False

    def _price(self, held: Held) -> Price:
        size, dtype = math.prod(facts.hint(held.node)), facts.dtype(held.node)
        now, turned = 0.0, 0.0 if held.turned is not None else IMPOSSIBLE
        match held.reading:
            case Writes(_, bias, reread):
                turned += self._table.pass_seconds(size, dtype) if bias else 0.0
                turned += 0.0 if reread is None else self._table.copy_seconds(math.prod(facts.hint(reread)), dtype)
            case Copies((source,)) if strides_of(source) != strides_of(held.node):
                now = self._table.pass_seconds(size, dtype)
                turned = now if self._stays_a_copy(held) else 0.0
            case Views() if copies(held.node):
                now = self._table.pass_seconds(size, dtype)
        return Price(**{held.today: now, other(held.today): turned})

    def _add(
        self,
        key: Hashable,
        part: Part,
        price: Price,
        reads: Sequence[Hashable],
        tied: Sequence[Hashable],
        today: Minor,
        copy: Price | None = None,
    ) -> None:
        if copy is None and not isinstance(part, (Demand, Outside)):
            seconds = self._copied(part)
            copy = Price(seconds, seconds)
        before, beside = (tuple(self._at[source] for source in sources) for sources in (reads, tied))
        self._at[key] = len(self._values)
        self._parts.append(part)
        self._values.append(Value(_name(part), price, copy or Price(), before, beside, today))

    def _copied(self, part: Held | Gathered) -> float:
        """Seconds of a copy in the other layout."""
        if isinstance(part, Held) and part.node in self._copied_in_passing:
            return self._slower(part.node)
        return self._table.copy_seconds(math.prod(facts.hint(part.node)), facts.dtype(part.node))

    def _slower(self, node: Node) -> float:
        """What it takes longer to write a value across the order it is read in."""
        size, dtype = math.prod(facts.hint(node)), facts.dtype(node)
        return max(self._table.copy_seconds(size, dtype) - self._table.pass_seconds(size, dtype), 0.0)

    def components(self) -> list[tuple[tuple[Part, ...], Problem]]:
        """The values that hang together, as problems of their own."""
        root = list(range(len(self._values)))

        def find(i: int) -> int:
            while root[i] != i:
                root[i] = root[root[i]]
                i = root[i]
            return i

        for i, value in enumerate(self._values):
            for j in (*value.reads, *value.tied):
                root[find(i)] = find(j)
        members = defaultdict(list)
        for i in range(len(self._values)):
            members[find(i)].append(i)
        return [self._component(each) for each in members.values()]

    def _component(self, members: list[int]) -> tuple[tuple[Part, ...], Problem]:
        at = {i: new for new, i in enumerate(members)}
        values = (self._values[i] for i in members)
        renamed = (
            Value(v.name, v.price, v.copy, tuple(at[j] for j in v.reads), tuple(at[j] for j in v.tied), v.today)
            for v in values
        )
        return tuple(self._parts[i] for i in members), Problem(tuple(renamed))


def _is_piece(held: Held) -> bool:
    return isinstance(held.reading, Views) and held.reading.piece


def _name(part: Part) -> str:
    match part:
        case Demand():
            return f"{'/'.join(part.operands)} of {part.site.node.name}"
        case Outside(node):
            return f"other readers of {node.name}"
        case Gathered(node, by):
            return f"{node.name} in {by.name}"
    return part.node.name
