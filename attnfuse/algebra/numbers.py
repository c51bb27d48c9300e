"""Rules for numbers: constants, factors, sums."""

from __future__ import annotations

from attnfuse.algebra.kinds import LOGIC, Kinds, Rule, kind
from attnfuse.algebra.literals import compute, rounded
from attnfuse.score import Apply, Const, Expr, Prob, apply, reads_score

__all__ = ["NUMBER_RULES", "named_softcap"]

#: A factor that cannot make a sum of ordinary numbers overflow.
_MODERATE = 1e6


def _constants(expr: Expr, _: Kinds) -> Expr | None:
    """``2 * 3 -> 6``."""
    match expr:
        case Apply(op, args) if all(isinstance(arg, Const) for arg in args):
            return compute(op, tuple(arg.value for arg in args if isinstance(arg, Const)))
    return None


def _neutral(expr: Expr, kinds: Kinds) -> Expr | None:
    """``x + 0``, ``x * 1``, ``x / 1``, ``float(x)`` of a float, ``where(c, x, x)``."""
    match expr:
        case Apply("add", (x, Const(0))) | Apply("add", (Const(0), x)) | Apply("sub", (x, Const(0))):
            return x
        case Apply("mul", (x, Const(1))) | Apply("mul", (Const(1), x)) | Apply("div" | "floordiv", (x, Const(1))):
            return x
        case Apply("where", (_, a, b)) if a == b:
            return a
        case Apply("where", (Const(bool(keep)), a, b)):
            return a if keep else b
        case Apply(cast, (x,)) if cast == kind(x, kinds):
            return x
    return None


def _float_literals(expr: Expr, kinds: Kinds) -> Expr | None:
    """``30 * x -> 30.0 * x`` where ``x`` is a float."""
    match expr:
        case Apply(op, args) if op not in LOGIC and any(isinstance(a, Const) for a in args):
            values = args[1:] if op == "where" else args
            if any(kind(arg, kinds) == "float" for arg in values):
                floats = [Const(float(a.value)) if isinstance(a, Const) else a for a in values]
                return apply(op, *args[: len(args) - len(values)], *floats)
    return None


def _constant_first(expr: Expr, _: Kinds) -> Expr | None:
    """``x * 2 -> 2 * x``; ``2 + x -> x + 2``."""
    match expr:
        case Apply("mul", (x, Const() as c)) if not isinstance(x, Const):
            return apply("mul", c, x)
        case Apply("add", (Const() as c, x)) if not isinstance(x, Const):
            return apply("add", x, c)
    return None


def _to_product(expr: Expr, kinds: Kinds) -> Expr | None:
    """``x / c -> (1 / c) * x``; ``-x -> -1.0 * x`` and ``x - y -> x + -1.0 * y`` on floats."""
    match expr:
        case Apply("div", (x, Const(c))) if c and kind(x, kinds) == "float":
            return apply("mul", Const(rounded(1.0 / c)), x)
        case Apply("neg", (x,)) if kind(x, kinds) == "float":
            return apply("mul", Const(-1.0), x)
        case Apply("sub", (x, y)) if kind(expr, kinds) == "float":
            return apply("add", x, apply("mul", Const(-1.0), y))
    return None


def _square(expr: Expr, _: Kinds) -> Expr | None:
    """``x ** 2 -> x * x``, which is exact, and whose derivative has no special case."""
    match expr:
        case Apply("pow", (x, Const(2))):
            return apply("mul", x, x)
    return None


def _saturated(expr: Expr, _: Kinds) -> Expr | None:
    """``min(448.0 * p, 448.0) -> 448.0 * p``, as quantising saturates: a weight is between 0 and 1."""
    match expr:
        case Apply("min", (x, Const(bound))) | Apply("min", (Const(bound), x)):
            largest = _largest_weight(x)
            return x if largest is not None and largest <= bound else None
        case Apply("max", (x, Const(bound))) | Apply("max", (Const(bound), x)) if bound <= 0:
            return x if _largest_weight(x) is not None else None
    return None


def _largest_weight(expr: Expr) -> float | None:
    """The largest value of a multiple of a weight; None of anything else."""
    match expr:
        case Prob():
            return 1.0
        case Apply("mul", (Const(factor), Prob())) if factor >= 0:
            return float(factor)
    return None


def _inverse(expr: Expr, _: Kinds) -> Expr | None:
    """``x * (1 / y) -> x / y``."""
    match expr:
        case Apply("reciprocal", (x,)):
            return apply("div", Const(1.0), x)
        case Apply("mul", (x, Apply("div", (Const(1.0), y)))) | Apply("mul", (Apply("div", (Const(1.0), y)), x)):
            return apply("div", x, y)
    return None


def _merge_factors(expr: Expr, kinds: Kinds) -> Expr | None:
    """``a * (b * x) -> (a b) * x``; factors free of the score come together, the score last."""
    match expr:
        case Apply("mul", (Const(a), Apply("mul", (Const(b), x)))):
            return apply("mul", Const(rounded(a * b)), x)
        case Apply("mul", (x, Apply("mul", (Const() as c, y)))) if not isinstance(x, Const):
            return apply("mul", c, apply("mul", x, y))
        case Apply("mul", (Apply("mul", (Const() as c, x)), y)):
            return apply("mul", c, apply("mul", x, y))
        case Apply("mul", (x, y)) if reads_score(x) and not reads_score(y):
            return apply("mul", y, x)
        case Apply("mul", (x, Apply("mul", (y, z)))) if reads_score(z) and not (reads_score(x) or reads_score(y)):
            return apply("mul", apply("mul", x, y), z)
        case Apply("mul", (Const(a) as c, Apply("add", (x, y)))) if reads_score(x) and abs(a) <= _MODERATE:
            # a huge factor could overflow in one summand and not in the sum
            return apply("add", apply("mul", c, x), apply("mul", c, y))
    return None


def _score_first(expr: Expr, _: Kinds) -> Expr | None:
    """Sums lean left with the score innermost: ``b + s -> s + b``, ``s + (a + b) -> (s + a) + b``."""
    match expr:
        case Apply("add", (x, y)) if reads_score(y) and not reads_score(x):
            return apply("add", y, x)
        case Apply("add", (x, Apply("add", (y, z)))) if reads_score(x):
            return apply("add", apply("add", x, y), z)
    return None


def named_softcap(expr: Expr) -> Expr:
    """``c * tanh(k * x)`` as people write it, ``c * tanh((k c * x) / c)``. Last, since `_to_product` undoes it."""
    match expr:
        case Apply("mul", (Const(cap), Apply("tanh", (inner,)))) if cap > 0:
            grown = _times(inner, cap)
            return expr if grown is None else apply("mul", Const(cap), apply("tanh", apply("div", grown, Const(cap))))
    return expr


def _times(product: Expr, factor: float) -> Expr | None:
    """A product with its literal multiplied by ``factor``; None where it has none."""
    match product:
        case Apply("mul", (Const(literal), x)):
            whole = rounded(literal * factor)
            return x if whole == 1.0 else apply("mul", Const(whole), x)
        case Apply("mul", (a, x)):
            grown = _times(a, factor)
            return None if grown is None else apply("mul", grown, x)
    return None


#: In the order they are tried.
NUMBER_RULES: tuple[Rule, ...] = (
    _constants,
    _neutral,
    _float_literals,
    _constant_first,
    _to_product,
    _square,
    _saturated,
    _inverse,
    _merge_factors,
    _score_first,
)
