"""Pointwise operations and casts."""

from __future__ import annotations

import math

import torch
from torch.fx import Node

from attnfuse.axes import Unreadable
from attnfuse.graph import facts
from attnfuse.passes.lift.atoms import Dropped, Place
from attnfuse.passes.lift.reader import Arguments, Reader, Rule
from attnfuse.passes.lift.view import broadcast
from attnfuse.reference import name_of
from attnfuse.score import Apply, Capture, Const, Expr, Index, apply, walk

__all__ = ["CASTS", "POINTWISE", "cast", "operand"]


def operand(reader: Reader, argument: object, place: Place) -> Expr:
    """An argument of a pointwise operation: a tensor broadcast to the result, or a number."""
    if isinstance(argument, Node) and facts.is_tensor(argument):
        return reader.read(argument, broadcast(argument, place))
    return reader.scalar(argument)


def _unary(op: str) -> Rule:
    def rule(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
        return apply(op, operand(reader, args.get("self"), place))

    return rule


def _binary(op: str, other: str = "other") -> Rule:
    def rule(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
        right = operand(reader, args[other], place)
        if args.get("alpha", 1) != 1:
            right = apply("mul", reader.scalar(args["alpha"]), right)
        return apply(op, operand(reader, args["self"], place), right)

    return rule


#: Integers wide enough that index arithmetic does not wrap around.
_EXACT = (torch.int64, torch.int32)


def _arithmetic(op: str) -> Rule:
    """add, sub, mul: on bools torch means or, and; on narrow integers it wraps around. That is left to torch."""
    plain = _binary(op)

    def rule(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
        if facts.dtype(node) not in _EXACT and not facts.dtype(node).is_floating_point:
            raise Unreadable(f"{op} of {name_of(facts.dtype(node))}, which wraps around")
        return plain(reader, node, args, place)

    return rule


def _comparison(op: str) -> Rule:
    """Half types do not have all positions: beyond the last that they count others are compared."""
    plain = _binary(op)

    def rule(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
        for given in (args["self"], args.get("other")):
            if isinstance(given, Node) and facts.is_tensor(given) and _are_positions(operand(reader, given, place)):
                _refuse_uncounted(given)
        return plain(reader, node, args, place)

    return rule


def _are_positions(expr: Expr) -> bool:
    parts = list(walk(expr))
    return any(isinstance(part, Index) for part in parts) and not any(isinstance(part, Capture) for part in parts)


def _refuse_uncounted(positions: Node) -> None:
    dtype = facts.dtype(positions)
    if not dtype.is_floating_point or dtype.itemsize > 2:
        return
    counted = 2 / torch.finfo(dtype).eps
    if not all(isinstance(size, int) and size <= counted for size in facts.shape(positions)):
        raise Unreadable(f"positions are compared in {name_of(dtype)}, which counts to {counted:.0f}")


def _rsub(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
    left = operand(reader, args["self"], place)
    if args.get("alpha", 1) != 1:
        left = apply("mul", reader.scalar(args["alpha"]), left)
    return apply("sub", operand(reader, args["other"], place), left)


def _div(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
    op = {None: "div", "floor": "floordiv"}.get(args.get("rounding_mode"))
    if op is None:
        raise Unreadable("division rounded towards zero")
    return apply(op, operand(reader, args["self"], place), operand(reader, args["other"], place))


def _logical(op: str) -> Rule:
    """``&``, ``|``, ``^``, ``~`` of bools; of ints they are bitwise, which programs do not have."""

    def rule(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
        found = [operand(reader, args[name], place) for name in ("self", "other") if name in args]
        if any(reader.kind(expr) != "bool" for expr in found):
            raise Unreadable(f"bitwise {op} of integers")
        return apply(op, *found)

    return rule


def _where(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
    names = ("condition", "self", "other")
    return apply("where", *(operand(reader, args[name], place) for name in names))


def _masked_fill(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
    mask, fill, kept = (operand(reader, args[name], place) for name in ("mask", "value", "self"))
    return apply("where", mask, _rounded(fill, facts.dtype(node)), kept)


def _extremum(op: str) -> Rule:
    """``max(a, b)`` of two tensors; of one tensor it is a reduction."""

    def rule(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
        if "other" not in args:
            raise Unreadable(f"the {op} of a whole tensor")
        return apply(op, operand(reader, args["self"], place), operand(reader, args["other"], place))

    return rule


def _clamp(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
    out = operand(reader, args["self"], place)
    for bound, op in (("min", "max"), ("max", "min")):
        if args.get(bound) is not None:
            out = apply(op, out, operand(reader, args[bound], place))
    return out


def _cast(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
    source: Node = args["self"]
    return cast(reader, reader.read(source, place), facts.dtype(source), facts.dtype(node))


def cast(reader: Reader, expr: Expr, source: torch.dtype, target: torch.dtype) -> Expr:
    """``expr`` of dtype ``source`` converted to ``target``.

    Programs compute in float32, so rounding is dropped (the result is more precise), but a finite number
    that becomes an infinity is kept: float32's lowest value cast to half is -inf.
    """
    if target == torch.bool:
        return apply("bool", expr)
    if not target.is_floating_point:
        if source.is_floating_point or not _holds(target, source):
            raise Unreadable(f"a cast from {source} to {target}")
        return apply("int", expr)
    if not source.is_floating_point:
        return apply("float", expr)
    if torch.finfo(target).max >= torch.finfo(source).max:
        return expr
    return _narrowed(reader, expr, target)


def _holds(target: torch.dtype, source: torch.dtype) -> bool:
    """Whether one integer type has every number of another."""
    if source == torch.bool:
        return True
    wide, narrow = torch.iinfo(target), torch.iinfo(source)
    return wide.min <= narrow.min and wide.max >= narrow.max


def _narrowed(reader: Reader, expr: Expr, target: torch.dtype) -> Expr:
    match expr:
        case Const():
            return _rounded(expr, target)
        case Apply("where", (condition, a, b)):
            return apply("where", condition, _narrowed(reader, a, target), _narrowed(reader, b, target))
    huge = any(isinstance(part, Const) and abs(part.value) > torch.finfo(target).max for part in walk(expr))
    if huge or not _holds_score(reader, expr):
        raise Unreadable("a narrowing cast that may overflow")
    return expr


def _holds_score(reader: Reader, expr: Expr) -> bool:
    """Whether a score or weight is inside; one that overflows the source's dtype need not overflow ours."""
    return any(isinstance(part, Capture) and reader.is_score_or_weight(part.slot) for part in walk(expr))


def _rounded(expr: Expr, target: torch.dtype) -> Expr:
    if not isinstance(expr, Const) or not target.is_floating_point or math.isnan(expr.value):
        return expr
    return Const(torch.tensor(float(expr.value), dtype=torch.float64).to(target).item())


def _square(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
    x = reader.read(args["self"], place)
    return apply("mul", x, x)


def _outer(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
    return apply("mul", reader.read(args["self"], place[:1]), reader.read(args["vec2"], place[1:]))


def _nan_to_num(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
    limits = torch.finfo(facts.dtype(node))
    given = (args.get(name) for name in ("nan", "posinf", "neginf"))
    nan, high, low = (
        Const(default if value is None else float(value))
        for value, default in zip(given, (0.0, limits.max, limits.min), strict=True)
    )
    x = reader.read(args["self"], place)
    bounded = apply("max", apply("min", x, high), low)
    if high.value < limits.max or low.value > limits.min:
        raise Unreadable("infinities replaced by small numbers")
    return apply("where", apply("isnan", x), nan, bounded)


def _dropout(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
    inner = reader.read(args["input"], place)
    # native_dropout trains unless told otherwise
    if args["train"] is False or args["p"] == 0.0:
        return inner
    return reader.atom(Dropped(node, float(args["p"]), inner))


_UNARY_NAMES = (
    *("abs", "exp", "exp2", "log", "sqrt", "rsqrt", "reciprocal", "tanh", "sigmoid", "relu", "erf"),
    *("sin", "cos", "sign", "floor", "ceil", "log1p", "expm1", "isnan", "isinf", "neg"),
)
_LOGICAL_NAMES = {
    "and": ("__and__", "bitwise_and", "logical_and", "__iand__"),
    "or": ("__or__", "bitwise_or", "logical_or", "__ior__"),
    "xor": ("__xor__", "bitwise_xor", "logical_xor", "__ixor__"),
    "not": ("bitwise_not", "logical_not"),
}

#: Conversions to another dtype, by ATen name.
CASTS = ("to", "_to_copy", "type_as", "float", "half", "bfloat16")

#: Operations on one element at a time, by ATen name.
POINTWISE: dict[str, Rule] = {
    **{name: _unary(name) for name in _UNARY_NAMES},
    **{alias: _logical(op) for op, aliases in _LOGICAL_NAMES.items() for alias in aliases},
    **{op: _arithmetic(op) for op in ("add", "sub", "mul")},
    **{op: _comparison(op) for op in ("lt", "le", "gt", "ge", "eq", "ne")},
    **dict.fromkeys(CASTS, _cast),
    **dict.fromkeys(("div", "true_divide", "divide"), _div),
    **dict.fromkeys(("clamp", "clip", "clamp_min", "clamp_max"), _clamp),
    "subtract": _arithmetic("sub"),
    "multiply": _arithmetic("mul"),
    "rsub": _rsub,
    "floor_divide": _binary("floordiv"),
    "remainder": _binary("mod"),
    **dict.fromkeys(("maximum", "max"), _extremum("max")),
    **dict.fromkeys(("minimum", "min"), _extremum("min")),
    "pow": _binary("pow", "exponent"),
    "where": _where,
    "masked_fill": _masked_fill,
    "dropout": _dropout,
    "square": _square,
    "outer": _outer,
    "nan_to_num": _nan_to_num,
}
