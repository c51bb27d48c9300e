"""Attention without a softmax: two products with something pointwise between them.

A multi-layer perceptron has that shape too. What tells them apart is that queries, keys and values are all computed
and have an axis in common (a batch, a head), while the weights of a perceptron are parameters. Where nothing but a
factor stands between the products, they are better reassociated than fused.
"""

from __future__ import annotations

from collections.abc import Callable

from torch.fx import Node

from attnfuse.algebra import WEIGHT_RULES, normalise
from attnfuse.graph import facts
from attnfuse.passes.lift.assemble import Parts, site_of, weight_program
from attnfuse.passes.lift.atoms import Dot, Place, Softmax
from attnfuse.passes.lift.operand import factored, viewed
from attnfuse.passes.lift.product import axes_at, query_and_key, score_product
from attnfuse.passes.lift.reader import Reader
from attnfuse.passes.lift.reduction import is_product_sum
from attnfuse.passes.site import Operand, Site
from attnfuse.score import Apply, Capture, Expr, S, Score, apply, rewrite, walk

__all__ = ["can_hold", "read_unnormalised"]

IsParameter = Callable[[Node], bool]

#: A matrix product of operands with an axis in common has at least so many dimensions.
_LEAST_RANK = 3


def can_hold(node: Node) -> bool:
    """Whether a contraction may be one of the two: each of its operands has room for an axis that all share."""
    product = node.all_input_nodes[0] if is_product_sum(node) else node
    tensors = [arg for arg in product.all_input_nodes if facts.is_tensor(arg)]
    return len(tensors) >= 2 and all(facts.rank(arg) >= _LEAST_RANK for arg in tensors)


def read_unnormalised(reader: Reader, node: Node, is_parameter: IsParameter) -> Site | None:
    """The attention whose result ``node`` is; None where it is none.

    Raises :class:`Unreadable` and :class:`Refused` where it is and cannot be lifted.
    """
    if any(size == 0 for size in facts.shape(node)):
        return None
    place = tuple(map(reader.space.fresh, facts.shape(node)))
    outer = _contraction(reader, reader.read(node, place))
    if outer is None:
        return None
    sides = ((outer.left, outer.left_place), (outer.right, outer.right_place))
    for weights, values in (sides, sides[::-1]):
        read = reader.read(*weights)
        if any(isinstance(part, Capture) and isinstance(reader.atoms[part.slot], Softmax) for part in walk(read)):
            return None
        inner = score_product(reader, read, outer.axes, values[1])
        if inner is not None and (found := _site(reader, node, place, outer, inner, read, weights, values)):
            computed = not any(is_parameter(operand.source.node) for operand in found.operands[1:])
            return found if computed else None
    return None


def _contraction(reader: Reader, read: Expr) -> Dot | None:
    match read:
        case Capture(slot) if isinstance(atom := reader.atoms[slot], Dot):
            return atom
    return None


def _site(
    reader: Reader,
    node: Node,
    place: Place,
    outer: Dot,
    inner: Dot,
    read: Expr,
    weights: tuple[Node, Place],
    values: tuple[Node, Place],
) -> Site | None:
    sides = query_and_key(reader, inner, outer.axes)
    shared = set.intersection(*(axes_at(reader, at) for _, at in (*sides, values)))
    if not shared:
        return None
    query, key = (factored(reader, *side, inner.node, inner.axes) for side in sides)
    dropout, weight = weight_program(reader, read, inner.node)
    score = _score(reader, inner, weight, query, key)
    if _only_scaled(score):
        return None
    parts = Parts(
        node=node,
        product=inner.node,
        softmax=inner.node,
        place=place,
        weight_place=weights[1],
        keys=outer.axes,
        inner=inner.axes,
        operands=(query, key, viewed(reader, *values, outer.node, weights[1])),
        score=score,
        dropout=dropout,
        normaliser="none",
    )
    return site_of(reader, parts)


def _score(reader: Reader, inner: Dot, weight: Expr, query: Operand, key: Operand) -> Expr:
    dot = apply("mul", apply("mul", query.factor, key.factor), S)
    slot = reader.atom(inner)
    return normalise(rewrite(weight, lambda e: dot if e == slot else e), reader.kind_of, WEIGHT_RULES)


def _only_scaled(score: Expr) -> bool:
    match score:
        case Score():
            return True
        case Apply("mul", (factor, Score())):
            return not any(isinstance(part, Capture) for part in walk(factor))
    return False
