"""Edits a graph so that its values lie as was decided. Views and pointwise operations need no edit: they follow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch.fx import Node

from attnfuse.axes import Minor
from attnfuse.graph.build import Builder
from attnfuse.graph.capture import Captured
from attnfuse.graph.strides import memory_order, ordered
from attnfuse.graph.weightless import source_of
from attnfuse.passes.place.decide import Decision
from attnfuse.passes.place.extract import Outside
from attnfuse.passes.place.reading import Copies, Gathers, Writes
from attnfuse.passes.place.region import Held
from attnfuse.passes.place.turn import gathered, written
from attnfuse.passes.site import Demand

__all__ = ["Arranged", "arrange", "orders"]


@dataclass(frozen=True)
class Arranged:
    """The node of the edited graph that each demand's fused node is to read, and those that hold values and copies."""

    operands: Mapping[Demand, Node]
    values: tuple[Node, ...]


def arrange(decision: Decision, captured: Captured) -> Arranged:
    """Makes the edits of a decision; the nodes that are replaced are erased."""
    return _Arranger(decision, captured).run()


def orders(decision: Decision, site: Node) -> dict[Node, tuple[int, ...]]:
    """The order in memory of the dimensions of what a site will read, by value, where that is not today's."""
    held = _held(decision)
    read = decision.chosen | {each.node: minor for each, minor in decision.demands.items() if each.site.node is site}
    turned = ((held[node], minor) for node, minor in read.items() if minor != held[node].today)
    return {each.node: memory_order(each.strides(minor)) for each, minor in turned}


def _held(decision: Decision) -> dict[Node, Held]:
    return {part.node: part for part in decision.region.parts if isinstance(part, Held)}


@dataclass
class _Arranger:
    """Walks the region in order; ``now`` is each value's node in the edited graph, ``copies`` those that were made."""

    decision: Decision
    captured: Captured
    now: dict[Node, Node] = field(default_factory=dict)
    copies: dict[tuple[Node, Minor], Node] = field(default_factory=dict)

    def run(self) -> Arranged:
        self.held, self.labels = _held(self.decision), self.decision.chosen
        readers = self._readers()
        outside = {part.node for part in self.decision.region.parts if isinstance(part, Outside)}
        for node, each in self.held.items():
            home = self.captured.at_home(node)
            others = [user for user in home.users if user not in readers[node]]
            self.now[node] = self._settled(each, home)
            if node in outside and self.labels[node] != each.today:
                self._replace_input(others, self.now[node], self._in(node, each.today))
        operands = {demand: self._in(demand.node, minor) for demand, minor in self.decision.demands.items()}
        return Arranged(operands, (*self.now.values(), *self.copies.values()))

    def _readers(self) -> dict[Node, set[Node]]:
        """The edited graph's nodes that read each value for a value of the region."""
        found: dict[Node, set[Node]] = {node: set() for node in self.held}
        for node, each in self.held.items():
            for source in each.reading.sources:
                found[source].add(source_of(self.captured.at_home(node)))
        return found

    def _settled(self, held: Held, home: Node) -> Node:
        """The node that has the value, in the layout decided for it."""
        label = self.labels[held.node]
        turned = label != held.today
        match held.reading:
            case Writes() if turned:
                new = written(
                    Builder(home.graph, before=home), held.node, self._at_home, batched=self.decision.region.batched
                )
                return self._replaced(held, home, new)
            case Gathers() if turned:
                new = gathered(Builder(home.graph, before=home), held.node, self._at_home, held.dims.of(label))
                return self._replaced(held, home, new)
            case Copies((source,)) if turned:
                return self._replaced(held, home, self._copied(source, label, held, Builder(home.graph, before=home)))
            case Gathers() | Copies():
                return home
        for source in held.reading.sources:
            if self.labels[source] != label:
                self._replace_input([source_of(home)], self.now[source], self._in(source, label))
        return home

    def _copied(self, source: Node, label: Minor, held: Held, builder: Builder) -> Node:
        """What a copy is replaced by: its source where that lies so already."""
        if self.held[source].strides(label) == held.turned:
            return self._in(source, label)
        return ordered(builder, self.now[source], memory_order(held.strides(label)))

    def _at_home(self, node: Node) -> Node:
        return self.now.get(node) or self.captured.at_home(node)

    def _in(self, node: Node, minor: Minor) -> Node:
        """The value in a layout: itself, or the one copy of it."""
        if self.labels[node] == minor:
            return self.now[node]
        if (node, minor) not in self.copies:
            home = self.now[node]
            builder = Builder(home.graph, before=_after(home), like=home)
            self.copies[node, minor] = ordered(builder, home, memory_order(self.held[node].strides(minor)))
        return self.copies[node, minor]

    def _replaced(self, held: Held, old: Node, new: Node) -> Node:
        old.replace_all_uses_with(new)
        self.captured.moved(held.node, new)
        old.graph.erase_node(old)
        return new

    @staticmethod
    def _replace_input(users: Iterable[Node], old: Node, new: Node) -> None:
        for user in users:
            user.replace_input_with(old, new)


def _after(node: Node) -> Node:
    """Where what reads a node can stand: behind it, and behind the inputs if it is one."""
    following = node.next
    while node.op == "placeholder" and following.op == "placeholder":
        following = following.next
    return following
