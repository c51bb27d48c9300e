"""The rules by which two spellings of one score program become the same program.

Each rule is a function from an expression to an equal one, or None where it does not apply; :data:`RULES`
is tried in order, innermost first, until nothing changes. "Equal" is meant for the arithmetic of
:mod:`attnfuse.score`: reassociating constants is allowed, losing a NaN, an infinity or a fully masked row is not.
The one stated exception is that a masked score contributes nothing even where it is NaN or infinite.
"""

from __future__ import annotations

from collections.abc import Callable

from attnfuse.arithmetic import compute, rounded
from attnfuse.integers import compared
from attnfuse.score import Apply, Capture, Const, Expr, Index, Score, Symbol, apply, rewrite, walk

__all__ = ["Kind", "Kinds", "kind", "normalise"]

#: "bool", "int" or "float".
Kind = str

#: The kind of the tensor in each capture slot.
Kinds = Callable[[int], Kind]

_MASKED = Const(float("-inf"))
_MODERATE = 1e6
_COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
_OPPOSITE = {"lt": "ge", "ge": "lt", "le": "gt", "gt": "le", "eq": "ne", "ne": "eq"}
_LOGIC = ("and", "or", "xor", "not", "bool", "isnan", "isinf", *_COMPARISONS)
_INTEGER = ("add", "sub", "mul", "floordiv", "mod", "neg", "abs", "min", "max")

Rule = Callable[[Expr, Kinds], "Expr | None"]


def normalise(expr: Expr, kinds: Kinds) -> Expr:
    """The normal form of a program whose captures have the given kinds."""
    for _ in range(_PATIENCE):
        after = rewrite(expr, lambda part: _first(part, kinds))
        if after == expr:
            break
        expr = after
    return rewrite(expr, _softcap)


#: Rounds until a program is taken as it is; real ones settle in fewer than ten.
_PATIENCE = 64


def _softcap(expr: Expr) -> Expr:
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


def _first(expr: Expr, kinds: Kinds) -> Expr:
    for rule in RULES:
        found = rule(expr, kinds)
        if found is not None and found != expr:
            return found
    return expr


def kind(expr: Expr, kinds: Kinds) -> Kind:
    """What an expression evaluates to."""
    match expr:
        case Const(value):
            return type(value).__name__
        case Index() | Symbol():
            return "int"
        case Capture(slot):
            return kinds(slot)
        case Apply(op) if op in _LOGIC:
            return "bool"
        case Apply("where", (_, a, b)):
            return _widest(kind(a, kinds), kind(b, kinds))
        case Apply("int"):
            return "int"
        case Apply(op, args) if op in _INTEGER:
            return _widest(*(kind(arg, kinds) for arg in args))
    return "float"


def _widest(*kinds: Kind) -> Kind:
    return max(kinds, key=("bool", "int", "float").index)


def _reads_score(expr: Expr) -> bool:
    return any(isinstance(part, Score) for part in walk(expr))


# --- constants --------------------------------------------------------------------------------------


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
        case Apply(op, args) if op not in _LOGIC and any(isinstance(a, Const) for a in args):
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


def _inverse(expr: Expr, _: Kinds) -> Expr | None:
    """``exp(log(x)) -> x``; ``x * (1 / y) -> x / y``."""
    match expr:
        case Apply("exp", (Apply("log", (x,)),)):
            return x
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
        case Apply("mul", (x, y)) if _reads_score(x) and not _reads_score(y):
            return apply("mul", y, x)
        case Apply("mul", (x, Apply("mul", (y, z)))) if _reads_score(z) and not (_reads_score(x) or _reads_score(y)):
            return apply("mul", apply("mul", x, y), z)
        case Apply("mul", (Const(a) as c, Apply("add", (x, y)))) if _reads_score(x) and abs(a) <= _MODERATE:
            # a huge factor could overflow in one summand and not in the sum
            return apply("add", apply("mul", c, x), apply("mul", c, y))
    return None


def _score_first(expr: Expr, _: Kinds) -> Expr | None:
    """Sums lean left with the score innermost: ``b + s -> s + b``, ``s + (a + b) -> (s + a) + b``."""
    match expr:
        case Apply("add", (x, y)) if _reads_score(y) and not _reads_score(x):
            return apply("add", y, x)
        case Apply("add", (x, Apply("add", (y, z)))) if _reads_score(x):
            return apply("add", apply("add", x, y), z)
    return None


# --- masks ------------------------------------------------------------------------------------------


def _logic(expr: Expr, kinds: Kinds) -> Expr | None:
    """``~~x``, ``~(a < b)``, De Morgan, constants in ``&`` and ``|``."""
    match expr:
        case Apply("not", (Apply("not", (x,)),)):
            return x
        case Apply("not", (Apply(op, args),)) if op in _OPPOSITE and all(kind(a, kinds) != "float" for a in args):
            return apply(_OPPOSITE[op], *args)
        case Apply("not", (Apply("and", (a, b)),)):
            return apply("or", apply("not", a), apply("not", b))
        case Apply("not", (Apply("or", (a, b)),)):
            return apply("and", apply("not", a), apply("not", b))
        case Apply("and", (Const(bool(c)), x)) | Apply("and", (x, Const(bool(c)))):
            return x if c else Const(False)
        case Apply("or", (Const(bool(c)), x)) | Apply("or", (x, Const(bool(c)))):
            return Const(True) if c else x
        case Apply("and", (a, Apply("and", (b, c)))):
            return apply("and", apply("and", a, b), c)
        case Apply("where", (c, Const(True), Const(False))):
            return c
        case Apply("where", (c, Const(False), Const(True))):
            return apply("not", c)
        case Apply("where", (c, x, Const(False))):
            return apply("and", c, x)
    return None


def _asked_bool(expr: Expr, kinds: Kinds) -> Expr | None:
    """``mask != 0 -> mask`` and ``mask == 0 -> ~mask``, for a mask that is a bool."""
    match expr:
        case Apply("ne" | "gt", (x, Const(0))) | Apply("eq" | "ge", (x, Const(1))) if kind(x, kinds) == "bool":
            return x
        case Apply("eq" | "le", (x, Const(0))) | Apply("ne" | "lt", (x, Const(1))) if kind(x, kinds) == "bool":
            return apply("not", x)
    return None


def _numbers_from_bools(expr: Expr, kinds: Kinds) -> Expr | None:
    """``float(mask) -> where(mask, 1.0, 0.0)``, so that ``(1 - mask) * fill`` becomes a choice."""
    match expr:
        case Apply("float", (x,)) if kind(x, kinds) == "bool":
            return apply("where", x, Const(1.0), Const(0.0))
        case Apply("int", (x,)) if kind(x, kinds) == "bool":
            return apply("where", x, Const(1), Const(0))
    return None


def _into_choice(expr: Expr, _: Kinds) -> Expr | None:
    """``f(where(c, x, 2)) -> where(c, f(x), f(2))`` where ``f`` has no other variable."""
    match expr:
        case Apply(op, args) if op not in ("where", "and", "or", "not", "xor", "bool"):
            choices = [i for i, arg in enumerate(args) if isinstance(arg, Apply) and arg.op == "where"]
            rest = [arg for i, arg in enumerate(args) if i not in choices]
            if len(choices) == 1 and all(isinstance(arg, Const) for arg in rest):
                return _pushed(op, args, choices[0])
    return None


def _pushed(op: str, args: tuple[Expr, ...], at: int) -> Expr | None:
    choice = args[at]
    assert isinstance(choice, Apply)
    condition, yes, no = choice.args
    if not (isinstance(yes, Const) or isinstance(no, Const)):
        return None
    inside = [apply(op, *args[:at], branch, *args[at + 1 :]) for branch in (yes, no)]
    return apply("where", condition, *inside)


def _choose_by_keep(expr: Expr, kinds: Kinds) -> Expr | None:
    """The score stands in the first branch, the fill in the second, one mask to a choice."""
    match expr:
        case Apply("where", (c, Const() as fill, x)) if _reads_score(x):
            return apply("where", apply("not", c), x, fill)
        case Apply("where", (c, Apply("where", (d, x, Const() as inner)), Const() as fill)) if inner == fill:
            return apply("where", apply("and", c, d), x, fill)
        case Apply("where", (c, Const() as fill, Apply("where", (d, x, Const() as inner)))) if inner == fill:
            return apply("where", apply("and", apply("not", c), d), x, fill)
        case Apply("where", (Apply("not", (c,)), x, y)) if not _reads_score(expr):
            return apply("where", c, y, x)
    return None


def _added_mask(expr: Expr, _: Kinds) -> Expr | None:
    """``x + where(keep, y, -inf) -> where(keep, x + y, -inf)``.

    A finite fill stays a summand: in a row that keeps nothing the scores still receive a gradient through it.
    """
    match expr:
        case Apply("add", (Apply("where", (before, x, a)), Apply("where", (keep, y, b)))) if a == b == _MASKED:
            return apply("where", apply("and", before, keep), apply("add", x, y), _MASKED)
        case Apply("add", (x, Apply("where", (keep, y, fill)))) if fill == _MASKED and _reads_score(x):
            return apply("where", keep, apply("add", x, y), _MASKED)
        case Apply("add", (x, Apply("where", (keep, fill, y)))) if fill == _MASKED and _reads_score(x):
            return apply("add", x, apply("where", apply("not", keep), y, _MASKED))
        case Apply("add", (Apply("where", (keep, x, fill)), y)) if fill == _MASKED:
            return apply("where", keep, apply("add", x, y), _MASKED)
        case Apply("add", (x, Apply("where", (keep, Const(fill), Const(0.0))))) if fill:
            return apply("add", x, apply("where", apply("not", keep), Const(0.0), Const(fill)))
    return None


def _distance(expr: Expr, kinds: Kinds) -> Expr | None:
    """``abs(x) <= w -> x <= w & x >= -w``, on integers."""
    match expr:
        case Apply(("lt" | "le") as op, (Apply("abs", (x,)), w)) if kind(w, kinds) != "float":
            return apply("and", apply(op, x, w), apply({"lt": "gt", "le": "ge"}[op], x, apply("neg", w)))
        case Apply(("gt" | "ge") as op, (Apply("abs", (x,)), w)) if kind(w, kinds) != "float":
            return apply("or", apply(op, x, w), apply({"gt": "lt", "ge": "le"}[op], x, apply("neg", w)))
    return None


def _comparison(expr: Expr, kinds: Kinds) -> Expr | None:
    """Comparisons of index arithmetic are solved for the key index: ``m - n > 3 -> n <= m + -4``."""
    match expr:
        case Apply(op, (a, b)) if op in _COMPARISONS and kind(a, kinds) == kind(b, kinds) == "int":
            return compared(op, a, b)
    return None


#: Every rule, in the order they are tried.
RULES: tuple[Rule, ...] = (
    _constants,
    _neutral,
    _float_literals,
    _asked_bool,
    _numbers_from_bools,
    _into_choice,
    _logic,
    _constant_first,
    _to_product,
    _inverse,
    _merge_factors,
    _score_first,
    _choose_by_keep,
    _added_mask,
    _distance,
    _comparison,
)
