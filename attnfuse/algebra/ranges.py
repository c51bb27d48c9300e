"""What a mask can be on a tile: interval arithmetic on programs, as programs of the tile's bounds.

Masks of document ids, paddings and indices are decided for a whole tile by the least and the greatest value that
each variable has in it (Moore 1966, Interval Analysis): ``t0 == t1`` cannot hold where the ranges are apart, and
holds throughout where both are one and the same value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from attnfuse.score import Apply, Capture, Const, Expr, Index, Symbol, apply

__all__ = ["Bounds", "bounds_of"]

TRUE, FALSE = Const(True), Const(False)


@dataclass(frozen=True)
class Bounds:
    """Two programs of a tile's bounds: whether the mask may keep a key of the tile, and whether it keeps all."""

    some: Expr
    every: Expr


#: The least and the greatest value of a variable; None where they are not known.
Range = tuple[Expr, Expr]
Ranges = Callable[[Capture | Index | Symbol], Range | None]


def bounds_of(mask: Expr, ranges: Ranges) -> Bounds:
    """Bounds of a mask whose variables have these ranges: ``(True, False)`` of what is not understood.

    ``some`` is true where the mask is true anywhere, and ``every`` only where it is true everywhere.
    """
    match mask:
        case Const(bool() as value):
            return Bounds(Const(value), Const(value))
        case Apply("and", (left, right)):
            return _joined("and", bounds_of(left, ranges), bounds_of(right, ranges))
        case Apply("or", (left, right)):
            return _joined("or", bounds_of(left, ranges), bounds_of(right, ranges))
        case Apply("not", (inner,)):
            found = bounds_of(inner, ranges)
            return Bounds(_not(found.every), _not(found.some))
        case Apply("ne", (left, right)):
            return bounds_of(apply("not", apply("eq", left, right)), ranges)
        case Apply("lt" | "le" | "gt" | "ge" | "eq" as op, (left, right)):
            first, second = _range(left, ranges), _range(right, ranges)
            return Bounds(TRUE, FALSE) if first is None or second is None else _compared(op, first, second)
        case Capture():
            known = ranges(mask)
            return (
                Bounds(TRUE, FALSE) if known is None else Bounds(*(apply("ne", end, Const(0)) for end in known[::-1]))
            )
    return Bounds(TRUE, FALSE)


def _joined(op: str, left: Bounds, right: Bounds) -> Bounds:
    return Bounds(_logical(op, left.some, right.some), _logical(op, left.every, right.every))


def _logical(op: str, left: Expr, right: Expr) -> Expr:
    absorbing = Const(op == "or")
    if absorbing in (left, right):
        return absorbing
    neutral = Const(op == "and")
    if neutral in (left, right):
        return right if left == neutral else left
    return apply(op, left, right)


def _not(inner: Expr) -> Expr:
    return Const(not inner.value) if isinstance(inner, Const) else apply("not", inner)


def _compared(op: str, left: Range, right: Range) -> Bounds:
    (low, high), (other_low, other_high) = left, right
    match op:
        case "lt" | "le":
            return Bounds(apply(op, low, other_high), apply(op, high, other_low))
        case "gt" | "ge":
            return Bounds(apply(op, high, other_low), apply(op, low, other_high))
    meet = apply("and", apply("le", low, other_high), apply("le", other_low, high))
    same = apply("and", apply("eq", low, other_high), apply("eq", other_low, high))
    # low == other_high and other_low == high leave room for nothing else only where neither range has any
    single = apply("and", apply("eq", low, high), apply("eq", other_low, other_high))
    return Bounds(meet, apply("and", same, single))


def _range(number: Expr, ranges: Ranges) -> Range | None:
    """The least and greatest value of an integer program."""
    match number:
        case Const(int() as value) if not isinstance(value, bool):
            return number, number
        case Index() | Symbol() | Capture():
            return ranges(number)
        case Apply("neg", (inner,)):
            found = _range(inner, ranges)
            return None if found is None else (apply("neg", found[1]), apply("neg", found[0]))
        case Apply("mul" | "floordiv" as op, (inner, Const(int() as factor))) if factor > 0:
            found = _range(inner, ranges)
            return None if found is None else (apply(op, found[0], number.args[1]), apply(op, found[1], number.args[1]))
        case Apply("add" | "sub" | "min" | "max" as op, (left, right)):
            first, second = _range(left, ranges), _range(right, ranges)
            if first is None or second is None:
                return None
            low, high = second[::-1] if op == "sub" else second
            return apply(op, first[0], low), apply(op, first[1], high)
    return None
