"""A site at smaller sizes, so that a big one can be replayed too.

Lift knows of every node that it read which axes its dimensions are made of. Smaller axes give each of them
a smaller shape; literals that spell sizes (the arguments of a view, the end of an arange) are rewritten
to fit. Running the result shows whether all shapes came out as predicted; where not, there is no replay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch.fx import Interpreter, Node

from attnfuse.axes import Axis, Index
from attnfuse.graph import facts
from attnfuse.passes.site import Attention, Place

__all__ = ["Shaped", "Sizes", "shrunk_arguments", "shrunk_shape", "smaller_axes"]

#: The size that an axis is replayed at.
Sizes = Mapping[Axis, int]

#: What rows and keys, and other axes, are cut to: rows and keys to a prime, so that no block divides them.
_LENGTH, _COUNT = 61, 2


def smaller_axes(attention: Attention) -> Sizes:
    """Sizes for the batch, row and key axes, and the head axis where no group of heads shares it.

    Axes that make up a dimension together are left alone, since programs take such dimensions apart by
    literal sizes; so are feature axes, which a scale may be derived from.
    """
    *batch, head, row, _ = attention.groups
    key = attention.key.groups[-2]
    wanted = [*((group, _COUNT) for group in (*batch, head)), (row, _LENGTH), (key, _LENGTH)]
    return {
        group[0]: min(group[0].size, limit)
        for group, limit in wanted
        if len(group) == 1 and isinstance(group[0].size, int)
    }


def shrunk_shape(node: Node, place: Place, sizes: Sizes) -> tuple[int, ...]:
    """A tensor's shape at those sizes: what its index does not run over (a sink's column) keeps its size."""
    return tuple(
        full - _extent(index, {}) + _extent(index, sizes) for full, index in zip(facts.hint(node), place, strict=True)
    )


def _extent(index: Index, sizes: Sizes) -> int:
    return math.prod(sizes.get(axis, _traced(axis)) for axis in index.axes)


def _traced(axis: Axis) -> int:
    return axis.size if isinstance(axis.size, int) else 1


#: Where an operation spells the shape of its result: the name of that argument in its schema.
_SPELLED = {
    **dict.fromkeys(("view", "_unsafe_view", "zeros", "ones", "full", "new_zeros", "new_ones", "new_full"), "size"),
    "reshape": "shape",
    "expand": "size",
}


def shrunk_arguments(node: Node, shape: tuple[int, ...]) -> dict[str, Any]:
    """The arguments of a call, by name, that make its result have ``shape``; {} where they need no change."""
    name, given = facts.op_name(node), facts.arguments(node)
    if name in _SPELLED:
        return {_SPELLED[name]: list(shape)}
    match name:
        case "arange" if given.get("step", 1) == 1:
            return {"end": given.get("start", 0) + shape[0]}
        case "slice" if given.get("step", 1) == 1 and (given.get("start") or 0) >= 0:
            return {"end": (given.get("start") or 0) + shape[given["dim"]]}
        case "narrow":
            return {"length": shape[given["dim"]]}
        case "unflatten":
            at = given["dim"] % facts.rank(given["self"])
            return {"sizes": list(shape[at : at + len(given["sizes"])])}
    return {}


class Shaped(Interpreter):
    """Runs a shrunk graph. Raises ValueError at the first node whose shape is not the one predicted."""

    def run_node(self, n: Node) -> Any:
        """The node's value, checked."""
        result = super().run_node(n)
        if (wanted := n.meta.get("shape")) is not None and tuple(result.shape) != wanted:
            raise ValueError(f"{n.name} has shape {list(result.shape)} instead of {list(wanted)}")
        return result
