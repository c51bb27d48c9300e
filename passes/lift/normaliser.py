"""Normalisers: softmax as one operation, or written out as ``exp(x) / sum(exp(x))`` or ``exp(x - logsumexp(x))``."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TypeGuard

from torch.fx import Node

from attnfuse.axes import Index, Size, Unreadable
from attnfuse.graph import facts
from attnfuse.passes.lift.atoms import Atom, Place, Reduced, Softmax
from attnfuse.passes.lift.pointwise import POINTWISE, cast
from attnfuse.passes.lift.reader import Arguments, Reader, Rule
from attnfuse.passes.lift.reduction import read_whole
from attnfuse.score import Apply, Capture, Const, Expr, apply, rewrite, walk

__all__ = ["NORMALISERS", "NORMALISER_NAMES", "divided_by_sum"]

#: What a chain of operations that makes weights begins with.
NORMALISER_NAMES = ("softmax", "_softmax", "special_softmax", "_safe_softmax", "log_softmax", "_log_softmax", "exp")

#: More columns than this beside the keys are not sinks.
_MAX_EXTRA = 4


def _softmax(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
    source: Node = args["self"]
    dim = args["dim"] % len(place)
    key = reader.space.resolved(place[dim])

    def logit(at: Index) -> Expr:
        there = (*place[:dim], at, *place[dim + 1 :])
        read = cast(reader, reader.read(source, there), facts.dtype(source), facts.dtype(node))
        return _unshifted(reader, read, dim, there)

    extra = tuple(map(logit, _beyond(key, facts.shape(source)[dim])))
    return reader.atom(Softmax(node, key, logit(key), extra))


def _safe_softmax(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
    """A softmax whose empty rows are zero."""
    return _with_zero_rows(reader, _softmax(reader, node, args, place))


def _with_zero_rows(reader: Reader, weight: Expr) -> Expr:
    match weight:
        case Capture(slot) if isinstance(softmax := reader.atoms[slot], Softmax):
            return reader.atom(replace(softmax, empty_rows="zero"))
    raise Unreadable("a safe softmax of which a part is used")


def _where(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
    """``where(any(x != -inf), softmax(x), 0)``, as export spells the safe softmax."""
    expr = reader.normal(POINTWISE["where"](reader, node, args, place))
    match expr:
        case Apply("where", (Capture(some), Capture(slot) as weight, Const(0.0))):
            softmax, found = reader.atoms[slot], reader.atoms[some]
            if isinstance(softmax, Softmax) and isinstance(found, Reduced) and not softmax.extra:
                kept = apply("ne", softmax.logit, Const(float("-inf")))
                if found.kind == "any" and _same(reader, read_whole(reader, found, softmax.key), kept):
                    return _with_zero_rows(reader, weight)
    return expr


def _log_softmax(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
    return apply("log", _softmax(reader, node, args, place))


def _beyond(key: Index, size: Size) -> list[Index]:
    """The columns of a normalised dimension of ``size`` that ``key`` does not run over."""
    if key.axes and key.covers(size):
        return []
    if size == 1:
        raise Unreadable("there is a single key, whose weight is 1")
    if not key.axes or not isinstance(size, int) or not isinstance(key.extent, int):
        raise Unreadable("a part of a softmax of unknown size")
    if key.offset != 0 or size - key.extent > _MAX_EXTRA:
        raise Unreadable("a softmax of which an inner part is used")
    return [Index((), at) for at in range(key.extent, size)]


def _unshifted(reader: Reader, logit: Expr, dim: int, place: Place) -> Expr:
    """The logit, without a subtracted row maximum: softmax does not change under a shift of its row.

    Only a multiple of the logits' own maximum is dropped, as in ``x - max(x)`` or ``c * (x / c - max(x / c))``.
    It is finite wherever any result is, and where it is not, the shifted row and the unshifted one are NaN alike.
    Whether it has a gradient is all the same, since that is zero.
    """
    row = reader.final((*place[:dim], Index(), *place[dim + 1 :]))
    for part in {part for part in walk(logit) if isinstance(part, Capture)}:
        atom = reader.atoms[part.slot]
        factor = _factor(logit, part) if _is_row(atom, reader, "max", dim, row) else None
        if factor is not None and factor < 0 and isinstance(atom, Reduced):
            plain = reader.normal(rewrite(logit, partial(_dropped, part)))
            found = (each.read(atom.operand, place) for each in (reader, reader.of_values()))
            if any(_same(reader, apply("mul", Const(-factor), own), plain) for own in found):
                return plain
    return logit


def _dropped(summand: Expr, expr: Expr) -> Expr:
    return Const(0.0) if expr == summand else expr


def _factor(expr: Expr, part: Capture) -> float | None:
    """What ``part`` is multiplied by in ``expr``, a linear function of it; None where it is none."""
    match expr:
        case Capture():
            return 1.0 if expr == part else 0.0
        case Apply("mul", (Const(factor), x)):
            inner = _factor(x, part)
            return None if inner is None else factor * inner
        case Apply("add", (x, y)):
            left, right = _factor(x, part), _factor(y, part)
            return None if left is None or right is None else left + right
    return None if part in walk(expr) else 0.0


def _is_row(atom: Atom, reader: Reader, kind: str, dim: int, row: Place) -> TypeGuard[Reduced]:
    return isinstance(atom, Reduced) and (atom.kind, atom.dim, reader.final(atom.place)) == (kind, dim, row)


def _same(reader: Reader, a: Expr, b: Expr) -> bool:
    return reader.normal(a) == reader.normal(b)


# --- written out ------------------------------------------------------------------------------------


def divided_by_sum(reader: Reader, numerator: Expr, divisor: Expr, key: Index, node: Node) -> Softmax | None:
    """``exp(x) / sum(exp(x))`` as the softmax that it is, read at ``key``; None where it is not one.

    ``1 + sum(exp(x))`` is a softmax with one more column, of logit 0.
    """
    one_more = False
    match divisor:
        case Apply("add", (Capture() as total, Const(1.0))):
            divisor, one_more = total, True
    match numerator, divisor:
        case Apply("exp", (shifted,)), Capture(slot):
            atom = reader.atoms[slot]
            if not isinstance(atom, Reduced) or atom.kind != "sum":
                return None
            if not _same(reader, read_whole(reader, atom, key), numerator):
                return None
            logit = _logit_in(reader, atom, key)
            extra = [_logit_in(reader, atom, at) for at in _beyond(key, facts.shape(atom.operand)[atom.dim])]
            if one_more and (extra or logit != shifted):
                raise Unreadable("1 is added to a sum of shifted exponentials")
            return Softmax(node, key, logit, (Const(0.0),) if one_more else tuple(extra))
    return None


def _logit_in(reader: Reader, total: Reduced, key: Index) -> Expr:
    """The logit whose exponential is summed, read at ``key``."""
    place = (*total.place[: total.dim], key, *total.place[total.dim + 1 :])
    match reader.read(total.operand, place):
        case Apply("exp", (logit,)):
            return _unshifted(reader, logit, total.dim, place)
    raise Unreadable("a sum over keys of which some are no exponentials")


def _div(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
    quotient = reader.normal(POINTWISE["div"](reader, node, args, place))
    return _as_softmax(reader, quotient, node, place)


def _mul(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
    product = reader.normal(POINTWISE["mul"](reader, node, args, place))
    return _as_softmax(reader, product, node, place)


def _as_softmax(reader: Reader, expr: Expr, node: Node, place: Place) -> Expr:
    match expr:
        case Apply("div", (numerator, divisor)):
            for slot in (part.slot for part in walk(divisor) if isinstance(part, Capture)):
                atom = reader.atoms[slot]
                if isinstance(atom, Reduced) and len(place) == len(atom.place):
                    found = divided_by_sum(reader, numerator, divisor, place[atom.dim], node)
                    return expr if found is None else reader.atom(found)
    return expr


def _exp(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
    """``exp(x - logsumexp(x))``, and ``exp(log_softmax(x))``."""
    expr = reader.normal(POINTWISE["exp"](reader, node, args, place))
    match expr:
        case Apply("exp", (Apply("log", (Capture(slot) as weight,)),)) if isinstance(reader.atoms[slot], Softmax):
            return weight
        case Apply("exp", (Apply("add", (logit, Apply("mul", (Const(-1.0), Capture(slot))))),)):
            atom = reader.atoms[slot]
            if isinstance(atom, Reduced) and atom.kind == "logsumexp" and len(place) == len(atom.place):
                key = place[atom.dim]
                if _same(reader, read_whole(reader, atom, key), logit):
                    beyond = _beyond(key, facts.shape(atom.operand)[atom.dim])
                    extra = tuple(read_whole(reader, atom, at) for at in beyond)
                    return reader.atom(Softmax(node, key, logit, extra))
    return expr


#: Softmax and what it is written out with, by ATen name. They come before the rules of the same names.
NORMALISERS: dict[str, Rule] = {
    **dict.fromkeys(("softmax", "_softmax", "special_softmax"), _softmax),
    **dict.fromkeys(("log_softmax", "_log_softmax"), _log_softmax),
    "_safe_softmax": _safe_softmax,
    "where": _where,
    "div": _div,
    "mul": _mul,
    "exp": _exp,
}
