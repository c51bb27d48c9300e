"""Rows that are normalised, given a sink, or scaled, after the product with the values.

``(exp(x) @ v) / sum(exp(x))`` is a softmax, and ``(softmax(x) @ v) * sigmoid(logsumexp(x) - c)`` one with the sink c,
since ``sigmoid(l - c) = exp(l) / (exp(l) + exp(c))``: but for a sink as low as a masked score, in a row of nothing
else, where rounding has made the logsumexp forget how many there are.

Attention of float8 values ends in ``(softmax(x) @ v) * c``, with what weights and values were divided by. As a factor
of each weight it costs kernels nothing; outside it is a pass over the result, and a second where that is copied next.
"""

from __future__ import annotations

from dataclasses import replace

from torch.fx import Node

from attnfuse.axes import Index
from attnfuse.graph import facts
from attnfuse.passes.lift.assemble import assembled, softmax_over
from attnfuse.passes.lift.atoms import Dot, Leaf, Reduced, Softmax
from attnfuse.passes.lift.normaliser import divided_by_sum
from attnfuse.passes.lift.operand import comes_from_float8, varies
from attnfuse.passes.lift.product import axes_at
from attnfuse.passes.lift.reader import Reader
from attnfuse.passes.lift.reduction import read_whole
from attnfuse.passes.site import Site
from attnfuse.score import Apply, Capture, Const, Expr, apply, joined, parted, rewrite, walk

__all__ = ["read_rescaled"]


def read_rescaled(reader: Reader, node: Node) -> Site | None:
    """The attention that a quotient or a product of an attention's result is; None where it is no such thing."""
    if any(size == 0 for size in facts.shape(node)):
        return None
    place = tuple(map(reader.space.fresh, facts.shape(node)))
    match reader.read(node, place):
        case Apply("div" as op, (Capture(slot), by)) if isinstance(outer := reader.atoms[slot], Dot):
            pass
        case Apply("mul" as op, _) as scaled if (parts := _of_product(reader, scaled)) is not None:
            outer, by = parts
        case _:
            return None
    sides = ((outer.left, outer.left_place), (outer.right, outer.right_place))
    for (weights, weight_place), (values, value_place) in (sides, sides[::-1]):
        read = reader.read(weights, weight_place)
        found = _quotient(reader, read, by, outer) if op == "div" else _with_sink(reader, read, by)
        factor: Expr = Const(1.0)
        columns = axes_at(reader, value_place) - axes_at(reader, weight_place)
        if found is None and _dequantises(node, outer, values) and not varies(reader, by, columns):
            found, factor = read, by if op == "mul" else apply("div", Const(1.0), by)
        if found is not None and (softmax := softmax_over(reader, found, outer)) is not None:
            sides_read = (weight_place, values, value_place)
            return assembled(reader, node, place, outer, softmax, found, sides_read, factor)
    return None


def _of_product(reader: Reader, scaled: Expr) -> tuple[Dot, Expr] | None:
    """The one contraction that is a factor, and the product of the others."""
    factors = list(parted("mul", scaled))
    products = [each for each in factors if isinstance(each, Capture) and isinstance(reader.atoms[each.slot], Dot)]
    if len(products) != 1:
        return None
    factors.remove(products[0])
    outer = reader.atoms[products[0].slot]
    assert isinstance(outer, Dot)
    return outer, joined("mul", factors)


def _dequantises(node: Node, product: Dot, values: Node) -> bool:
    """Whether what scales the product of float8 values is best had by their weights: nobody sees the product itself,
    and nothing is differentiated, which few kernels do through a weight's program.
    """
    unseen = len(product.node.users) == 1 and facts.dtype(node) == facts.dtype(product.node)
    return unseen and not facts.tensor(node).requires_grad and comes_from_float8(values)


def _quotient(reader: Reader, weights: Expr, divisor: Expr, outer: Dot) -> Expr | None:
    found = divided_by_sum(reader, weights, divisor, Index(outer.axes), outer.node)
    return None if found is None else reader.atom(found)


def _with_sink(reader: Reader, weights: Expr, gate: Expr) -> Expr | None:
    """The weights with the sink that their gate gives them."""
    slots = {part.slot for part in walk(weights) if isinstance(part, Capture)}
    softmaxes = [(slot, atom) for slot in slots if isinstance(atom := reader.atoms[slot], Softmax)]
    match gate:
        case Apply("sigmoid", (Apply("add", (Capture(total), Apply("mul", (Const(-1.0), sink)))),)):
            sums = reader.atoms[total]
        case _:
            return None
    if len(softmaxes) != 1 or not isinstance(sums, Reduced) or sums.kind != "logsumexp":
        return None
    slot, softmax = softmaxes[0]
    logit = read_whole(reader, sums, softmax.key)
    same = reader.normal(logit) == reader.normal(softmax.logit)
    if softmax.extra or not same or not _is_finite(reader, logit):
        return None
    with_sink = reader.atom(replace(softmax, extra=(sink,)))
    return rewrite(weights, lambda part: with_sink if part == Capture(slot) else part)


def _is_finite(reader: Reader, logit: Expr) -> bool:
    """Whether finite scores make a finite logit: an empty row would be NaN, and with a sink it is zero."""
    for part in walk(logit):
        match part:
            case Const(value) if abs(value) == float("inf"):
                return False
            case Capture(slot) if isinstance(atom := reader.atoms[slot], Leaf) and facts.kind(atom.node) == "float":
                return False
    return True
