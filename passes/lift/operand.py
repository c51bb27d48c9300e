"""Query, key and value: seen through views, and for query and key through multiplication by a scalar."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch.fx import Node

from attnfuse.algebra import normalise
from attnfuse.axes import Unreadable
from attnfuse.graph import facts
from attnfuse.passes.lift.reader import Reader, Rule, Rules
from attnfuse.passes.lift.view import VIEWS
from attnfuse.passes.site import Leaf, Operand, Place
from attnfuse.score import Capture, Const, Expr, apply, rewrite, walk

__all__ = ["factored", "viewed"]


def _scaling(op: str) -> Rule:
    def rule(reader: Reader, node: Node, args: Mapping[str, Any], place: Place) -> Expr:
        source, factor = args["self"], args["other"]
        if facts.is_tensor(factor) and facts.rank(factor) > 0:
            if op == "div" or facts.rank(source) > 0:
                raise Unreadable("scaled by more than one number")
            source, factor = factor, source
        if facts.dtype(source) != facts.dtype(node) or args.get("rounding_mode"):
            raise Unreadable("scaling that changes the dtype")
        # as far as the logits are read, so that one number is not two inputs of the fused node
        by = reader.unlimited().scalar(factor)
        return apply(op, reader.read(source, place), by)

    return rule


_FACTORED: Rules = {**VIEWS, "mul": _scaling("mul"), "div": _scaling("div")}


def factored(reader: Reader, node: Node, place: Place, product: Node) -> Operand:
    """Query or key of ``product``. The factor may be moved out of the contraction, which is linear in it."""
    return _followed(reader.limited_to(_FACTORED, product), reader, node, place)


def viewed(reader: Reader, node: Node, place: Place, product: Node) -> Operand:
    """Value of ``product``."""
    return _followed(reader.limited_to(VIEWS, product), reader, node, place)


def _followed(seen: Reader, reader: Reader, node: Node, place: Place) -> Operand:
    found = seen.read(node, place)
    reader.trail += seen.trail
    slot, source = _read_last(seen, found)
    factor = normalise(rewrite(found, lambda e: Const(1.0) if e == Capture(slot) else e), reader.kind_of)
    # past a scaling, the nodes nearer to the contraction hold scaled values
    seen_views = [Leaf(n, p) for n, p in seen.trail if factor == Const(1.0) and n is not source.node]
    return Operand(factor, (*filter(reader.is_plain, seen_views), source))


def _read_last(seen: Reader, found: Expr) -> tuple[int, Leaf]:
    """The leaf that the walk ended at; any other leaf in the expression is a factor."""
    slots = [part.slot for part in walk(found) if isinstance(part, Capture)]
    for node, _ in reversed(seen.trail):
        for slot in slots:
            atom = seen.atoms[slot]
            if isinstance(atom, Leaf) and atom.node is node:
                return slot, atom
    raise Unreadable("an operand that is no tensor")
