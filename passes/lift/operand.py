"""Query, key and value: seen through views, and for query and key through multiplication by a scalar.

What is dequantised before a product is seen as the float8 tensor that it was: its scale, a number or a tensor that does
not vary along what is summed, is a factor of the product, and to widen a float8 rounds nothing.
"""

from __future__ import annotations

from itertools import takewhile

from torch.fx import Node

from attnfuse.algebra import normalise
from attnfuse.axes import Axis, Unreadable
from attnfuse.graph import facts
from attnfuse.passes.lift.pointwise import CASTS, operand
from attnfuse.passes.lift.product import axes_at
from attnfuse.passes.lift.reader import Arguments, Reader, Rule, Rules
from attnfuse.passes.lift.view import VIEWS
from attnfuse.passes.site import Leaf, Operand, Place
from attnfuse.reference import is_float8
from attnfuse.score import Capture, Const, Expr, Index, apply, rewrite, walk

__all__ = ["comes_from_float8", "factored", "varies", "viewed"]


def _scaling(op: str) -> Rule:
    def rule(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
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


def factored(reader: Reader, node: Node, place: Place, product: Node, inner: tuple[Axis, ...]) -> Operand:
    """Query or key of ``product``, which sums over ``inner``.

    The factor may be moved out of the contraction, which is linear in it.
    """
    found = _dequantised(reader, node, place, product)
    if found is not None and not varies(reader, found.factor, set(reader.space.resolve(inner))):
        return found
    return _followed(reader.limited_to(_FACTORED, product), reader, node, place)


def viewed(reader: Reader, node: Node, place: Place, product: Node, weights: Place) -> Operand:
    """Value of ``product``, whose weights are read at ``weights``; a factor can be had by a weight instead."""
    found = _dequantised(reader, node, place, product)
    if found is not None and not varies(reader, found.factor, axes_at(reader, place) - axes_at(reader, weights)):
        return found
    return _followed(reader.limited_to(VIEWS, product), reader, node, place)


# --- dequantised ------------------------------------------------------------------------------------


def _rescaling(op: str) -> Rule:
    def rule(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
        source, scale = args["self"], args["other"]
        if op == "mul" and not comes_from_float8(source):
            source, scale = scale, source
        if args.get("rounding_mode"):
            raise Unreadable("a quotient that is rounded")
        return apply(op, operand(reader, source, place), _scale(reader, scale, node, place))

    return rule


def _scale(reader: Reader, scale: object, node: Node, place: Place) -> Expr:
    """A number as the logits are read, a tensor as it is: what made it is of no interest to each score."""
    if isinstance(scale, Node) and facts.is_tensor(scale) and facts.rank(scale):
        return operand(reader.limited_to(VIEWS, node), scale, place)
    return reader.unlimited().scalar(scale)


def _widening(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
    if not facts.dtype(node).is_floating_point or facts.dtype(node).itemsize == 1:
        raise Unreadable("a cast that rounds")
    return reader.read(args["self"], place)


_DEQUANTISED: Rules = {**VIEWS, **dict.fromkeys(CASTS, _widening), "mul": _rescaling("mul"), "div": _rescaling("div")}


def comes_from_float8(node: object) -> bool:
    """Whether a node is a float8 tensor, seen through what dequantises one."""
    while isinstance(node, Node) and facts.is_tensor(node):
        if is_float8(facts.dtype(node)):
            return True
        if facts.op_name(node) not in _DEQUANTISED or not node.all_input_nodes:
            return False
        node, *others = node.all_input_nodes
        if any(map(comes_from_float8, others)):
            return True
    return False


def _dequantised(reader: Reader, node: Node, place: Place, product: Node) -> Operand | None:
    """The float8 tensor that an operand is made of, and its scale; None where it is made of something else."""
    if not reader.narrow or not comes_from_float8(node):
        return None
    found = _followed(reader.limited_to(_DEQUANTISED, product), reader, node, place)
    return found if is_float8(facts.dtype(found.source.node)) else None


def varies(reader: Reader, factor: Expr, axes: set[Axis]) -> bool:
    """Whether a factor reads any of the axes."""
    for part in walk(factor):
        match part:
            case Index(axis):
                read = set(reader.space.resolve(reader.axes[axis].axes))
            case Capture(slot) if isinstance(atom := reader.atoms[slot], Leaf):
                read = axes_at(reader, atom.place)
            case Capture():
                return True
            case _:
                read = set()
        if axes & read:
            return True
    return False


# --- the walk ---------------------------------------------------------------------------------------


def _followed(seen: Reader, reader: Reader, node: Node, place: Place) -> Operand:
    found = seen.read(node, place)
    reader.trail += seen.trail
    slot, source = _read_last(seen, found)
    factor = normalise(rewrite(found, lambda e: Const(1.0) if e == Capture(slot) else e), reader.kind_of)
    # past a scaling, the nodes nearer to the contraction hold scaled values, and past a cast wider ones
    same = facts.dtype(source.node) if factor == Const(1.0) else None
    above = takewhile(lambda read: read[0] is not source.node, seen.trail)
    seen_views = [Leaf(n, p) for n, p in above if facts.dtype(n) == same]
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
