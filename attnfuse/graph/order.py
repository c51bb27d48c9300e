"""Where nodes stand in their graph, what writes into what, and which nodes share storage."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from torch.fx import Graph, Node

from attnfuse.graph import facts

__all__ = ["Order", "Write", "gone_with", "storage"]

#: Operations whose result may share its input's storage, though their schemas do not say so.
_MAY_ALIAS = frozenset(
    (
        *("atleast_1d", "atleast_2d", "atleast_3d", "alpha_dropout", "dropout", "feature_alpha_dropout"),
        *("feature_dropout", "getitem", "type_as", "unsafe_chunk", "unsafe_split", "unsafe_split_with_sizes"),
    )
)
#: Those that make a list of a list, a view of each.
_OF_EACH = frozenset(("broadcast_tensors", "meshgrid", "atleast_1d", "atleast_2d", "atleast_3d"))
#: What a graph is given. A tensor's ``data`` is traced as an attribute.
_GIVEN = ("placeholder", "get_attr")


def storage(node: Node) -> Node:
    """The node that made the storage a value lives in (or may live in); of inputs that share one, the first."""
    while (source := _shared(node)) is not None:
        node = source
    if node.op not in _GIVEN or not facts.is_tensor(node):
        return node
    given: Iterator[Node] = (each for op in _GIVEN for each in node.graph.find_nodes(op=op) if facts.is_tensor(each))
    return next(each for each in given if _room(each) == _room(node))


def _shared(node: Node) -> Node | None:
    """The input whose storage a value has, or may have; None where it has its own."""
    if not node.all_input_nodes:
        return None
    name, first = facts.op_name(node), node.all_input_nodes[0]
    if name == "getitem" and facts.op_name(first) in _OF_EACH and isinstance(first.args[0], (list, tuple)):
        found: object = first.args[0][node.args[1]]  # type: ignore[index]  # of a list by a number
        return found if isinstance(found, Node) else None
    return first if name in _MAY_ALIAS or facts.is_mutating(node) or facts.is_view(node) else None


def _room(node: Node) -> int:
    return int(facts.tensor(node).untyped_storage()._cdata)


@dataclass(frozen=True)
class Write:
    """``node`` writes into ``target``."""

    node: Node
    target: Node


@dataclass(frozen=True)
class Order:
    """Positions and writes of one graph, found in one walk."""

    position: dict[Node, int]
    writes: tuple[Write, ...]
    live: frozenset[Node]

    @staticmethod
    def of(graph: Graph) -> Order:
        """The order of a graph as it stands; it knows nothing of later edits."""
        nodes = list(graph.nodes)
        writes = tuple(Write(node, target) for node in nodes for target in _targets(node))
        return Order({node: i for i, node in enumerate(nodes)}, writes, _live(nodes))

    def is_live(self, node: Node) -> bool:
        """Whether the node's value reaches an output or a write; looking at metadata does not count."""
        return node in self.live

    def before(self, a: Node, b: Node) -> bool:
        """Whether ``a`` runs before ``b``."""
        return self.position[a] < self.position[b]

    def is_written_between(self, node: Node, reader: Node) -> bool:
        """Whether a node's storage is written after it was made and before ``reader`` runs."""
        return any(storage(w.target) is storage(node) for w in self.writes_between(node, reader))

    def writes_between(self, first: Node, last: Node) -> Iterator[Write]:
        """Writes that happen after ``first`` was computed and before ``last`` is."""
        return (w for w in self.writes if self.before(first, w.node) and self.before(w.node, last))


#: Calls that look at metadata or assert something about it.
_ONLOOKERS = ("_assert_tensor_metadata", "sym_size", "sym_stride", "sym_numel")


def _live(nodes: list[Node]) -> frozenset[Node]:
    live: set[Node] = set()
    for node in reversed(nodes):
        if facts.op_name(node) in _ONLOOKERS:
            continue
        if node.op == "output" or facts.is_mutating(node) or any(user in live for user in node.users):
            live.add(node)
    return frozenset(live)


def gone_with(graph: Graph, replaced: Collection[Node], kept: Collection[Node]) -> frozenset[Node]:
    """The nodes that nobody will need once ``replaced`` are, except for those that are ``kept``."""
    gone = set(replaced)
    for node in reversed(graph.nodes):
        if node.users and node not in kept and not facts.is_mutating(node) and gone.issuperset(node.users):
            gone.add(node)
    return frozenset(gone)


def _targets(node: Node) -> Iterator[Node]:
    if facts.is_mutating(node):
        yield from facts.written(node)
