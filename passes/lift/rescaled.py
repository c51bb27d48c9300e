"""Rows that are normalised, or given a sink, after the product with the values.

``(exp(x) @ v) / sum(exp(x))`` is a softmax, and ``(softmax(x) @ v) * sigmoid(logsumexp(x) - c)`` one with the sink c,
since ``sigmoid(l - c) = exp(l) / (exp(l) + exp(c))``: but for a sink as low as a masked score, in a row of nothing
else, where rounding has made the logsumexp forget how many there are.
"""

from __future__ import annotations

from dataclasses import replace

from torch.fx import Node

from attnfuse.axes import Index
from attnfuse.graph import facts
from attnfuse.passes.lift.assemble import assembled, softmax_over
from attnfuse.passes.lift.atoms import Dot, Leaf, Reduced, Softmax
from attnfuse.passes.lift.normaliser import divided_by_sum
from attnfuse.passes.lift.reader import Reader
from attnfuse.passes.lift.reduction import read_whole
from attnfuse.passes.site import Site
from attnfuse.score import Apply, Capture, Const, Expr, rewrite, walk

__all__ = ["read_rescaled"]


def read_rescaled(reader: Reader, node: Node) -> Site | None:
    """The attention that a quotient or a product of an attention's result is; None where it is no such thing."""
    if any(size == 0 for size in facts.shape(node)):
        return None
    place = tuple(map(reader.space.fresh, facts.shape(node)))
    match reader.read(node, place):
        case Apply("div" | "mul" as op, (Capture(slot), by)) if isinstance(outer := reader.atoms[slot], Dot):
            pass
        case Apply("mul" as op, (by, Capture(slot))) if isinstance(outer := reader.atoms[slot], Dot):
            pass
        case _:
            return None
    sides = ((outer.left, outer.left_place), (outer.right, outer.right_place))
    for (weights, weight_place), (values, value_place) in (sides, sides[::-1]):
        read = reader.read(weights, weight_place)
        found = _quotient(reader, read, by, outer) if op == "div" else _with_sink(reader, read, by)
        if found is not None and (softmax := softmax_over(reader, found, outer)) is not None:
            return assembled(reader, node, place, outer, softmax, found, (weight_place, values, value_place))
    return None


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
