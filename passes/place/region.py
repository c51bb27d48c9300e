"""The values that a fused node's operands come from, as far as their layouts can be chosen, and how each can lie.

The walk goes backwards from the operands, following two dimensions of each value: the one that is contiguous when it
is d-minor and the one when it is n-minor. Views are not interpreted: they are carried out on tensors without data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field

from torch import Tensor
from torch.fx import Graph, Node

from attnfuse.axes import Minor
from attnfuse.graph import facts
from attnfuse.graph.order import Order, storage
from attnfuse.graph.weightless import Strides, result_of, source_of, strides_of
from attnfuse.passes.place.problem import other
from attnfuse.passes.place.reading import OPERANDS, Copies, Gathers, Passes, Reading, Stops, Views, Writes, reading
from attnfuse.passes.site import Demand

__all__ = ["Dims", "Held", "Walk", "copies", "dense", "folds"]


@dataclass(frozen=True)
class Dims:
    """Which dimension of a value is contiguous in each layout."""

    d: int
    n: int

    def of(self, minor: Minor) -> int:
        """The dimension that is contiguous in that layout."""
        return self.d if minor == "d" else self.n


@dataclass(frozen=True)
class Held:
    """A value of a region. ``turned`` are its strides in the layout that it does not have today, None if it cannot."""

    node: Node
    dims: Dims
    today: Minor
    reading: Reading
    turned: Strides | None

    def strides(self, minor: Minor) -> Strides:
        """How it lies in a layout, or a copy of it does where it cannot itself."""
        if minor == self.today:
            return strides_of(self.node)
        return self.turned or dense(facts.hint(self.node), self.dims.of(minor))


def dense(shape: Iterable[int], minor: int) -> Strides:
    """Strides of a dense tensor whose dimension ``minor`` is innermost and whose others are in order."""
    sizes = list(shape)
    order = [dim for dim in range(len(sizes)) if dim != minor] + [minor]
    return tuple(math.prod(sizes[later] for later in order[order.index(dim) + 1 :]) for dim in range(len(sizes)))


@dataclass
class Walk:
    """Finds regions in ``graph``. ``place_of`` leads to the edited graph's node with a value, if there is one.

    A product with a weight, when it is turned, is one product for the whole batch, and what was copied for its layout
    no longer is. ``batched`` products write a batch's matrices one after another, and copies stay: that takes more
    memory in training, but some views can merge the dimensions of these only.
    """

    graph: Graph
    place_of: Callable[[Node], Node | None]
    batched: bool = False
    held: dict[Node, Held] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._order = Order.of(self.graph)
        self._written = frozenset(storage(write.target) for write in self._order.writes)
        self._dims: dict[Node, Dims] = {}
        self._readings: dict[Node, Reading] = {}

    def run(self, demands: Collection[Demand]) -> Walk:
        """Fills ``held`` with the values that the demands' operands come from, each after those it reads."""
        for demand in demands:
            self._visit(demand.node, Dims(demand.columns, demand.rows))
        for node in sorted(self._dims, key=self._order.position.__getitem__):
            self.held[node] = self._held(node)
        return self

    @property
    def stuck(self) -> int:
        """How many views cannot be made of what a product writes when it is turned."""
        return sum(isinstance(each.reading, Views) and each.turned is None for each in self.held.values())

    def _visit(self, start: Node, dims: Dims) -> None:
        stack = [(start, dims)]
        while stack:
            node, wanted = stack.pop()
            if node in self._dims:
                continue
            found = self._readable(node, wanted)
            before = {source: _dims_before(node, source, found, wanted) for source in found.sources}
            # a value that is wanted with other dimensions elsewhere is not followed twice
            if any(each is None or self._dims.get(source, each) != each for source, each in before.items()):
                found, before = Stops(), {}
            self._dims[node], self._readings[node] = wanted, found
            stack += [(source, each) for source, each in before.items() if each is not None]

    def _readable(self, node: Node, dims: Dims) -> Reading:
        """What the node does, where the edited graph can be changed accordingly."""
        home, call = self.place_of(node), source_of(node)
        if home is None or (self._written and storage(node) in self._written):
            return Stops()
        found = reading(node)
        operands = [self.place_of(arg) for arg in call.all_input_nodes if facts.is_tensor(arg)]
        if any(operand is None or operand not in source_of(home).all_input_nodes for operand in operands):
            return Stops()
        match found:
            case Writes((first, second)):
                ours = [dim % facts.rank(node) for dim in (first, second)]
                return found if set(ours) == {dims.d, dims.n} and strides_of(node)[first] == 1 else Stops()
        return found

    def _held(self, node: Node) -> Held:
        dims, found = self._dims[node], self._readings[node]
        strides = strides_of(node)
        today: Minor = "n" if strides[dims.n] == 1 and strides[dims.d] != 1 else "d"
        return Held(node, dims, today, found, self._turned(node, found, other(today), dims))

    def _turned(self, node: Node, found: Reading, minor: Minor, dims: Dims) -> Strides | None:
        """Strides of a value in the layout that it does not have."""
        match found:
            case Writes():
                return self._product_strides(node, dims.of(minor))
            case Gathers():
                return dense(facts.hint(node), dims.of(minor))
            case Copies((source,)):
                return dense(facts.hint(node), dims.of(minor)) if self.batched else self.held[source].strides(minor)
            case Views(sources) | Passes(sources):
                carried = result_of(node, {source: self.held[source].strides(minor) for source in sources})
                if carried is None or carried[0].stride(dims.of(minor)) != 1:
                    return None
                if isinstance(found, Views) and not _shares_storage(carried, source_of(node)):
                    return None
                return tuple(carried[0].stride())
        return None

    def _product_strides(self, node: Node, minor: int) -> Strides:
        sizes = facts.hint(node)
        if self.batched or not folds(node):
            return dense(sizes, minor)
        # one matrix for the whole batch: [columns, *batch, rows]
        columns = ({len(sizes) - 2, len(sizes) - 1} - {minor}).pop()
        inner = dense(sizes[:columns] + sizes[columns + 1 :], minor - (columns < minor))
        return (*inner[:columns], math.prod(sizes) // max(sizes[columns], 1), *inner[columns:])


def folds(node: Node) -> bool:
    """Whether a product is of a batch of matrices and of one on the right that all of them share."""
    left, right, _ = OPERANDS.get(facts.op_name(node), ("", "", ""))
    args = facts.arguments(node)
    return bool(left) and facts.rank(args[left]) > 2 and facts.rank(args[right]) == 2


def _dims_before(node: Node, source: Node, found: Reading, dims: Dims) -> Dims | None:
    """The dimensions of a source that become these of a node; None where one does not."""
    before = tuple(_dim_before(node, source, found, dim) for dim in (dims.d, dims.n))
    return None if None in before or before[0] == before[1] else Dims(*before)  # type: ignore[arg-type]  # no None


def _dim_before(node: Node, source: Node, found: Reading, dim: int) -> int | None:
    """The dimension of a source which, innermost there, makes ``dim`` innermost in a node."""
    if isinstance(found, Gathers) and facts.rank(source) < facts.rank(node):
        new: int = facts.arguments(node)["dim"] % facts.rank(node)
        if dim == new:
            return None
        return dim - 1 if dim > new else dim
    if not isinstance(found, Views):
        return dim
    # most views keep a dimension's distance from one of the ends
    likely: dict[int, None] = dict.fromkeys(
        (dim, dim - facts.rank(node) + facts.rank(source), *range(facts.rank(source)))
    )
    sizes = facts.hint(source)
    for candidate in (each for each in likely if 0 <= each < len(sizes) and sizes[each] != 1):
        carried = result_of(node, {source: dense(sizes, candidate)})
        if carried is not None and carried[0].stride(dim) == 1 and _shares_storage(carried, source_of(node)):
            return candidate
    return None


def copies(node: Node) -> bool:
    """Whether a view copies as its source lies today: a ``reshape`` may."""
    return not _shares_storage(result_of(node, {}), source_of(node))


def _shares_storage(carried: tuple[Tensor, dict[Node, Tensor]] | None, call: Node) -> bool:
    """Whether what was carried out without data made no copy."""
    if carried is None:
        return False
    found, operands = carried
    return bool(found.untyped_storage()._cdata == operands[call.all_input_nodes[0]].untyped_storage()._cdata)
