"""Rules for masks: logic, choices, comparisons of indices."""

from __future__ import annotations

from attnfuse.algebra.integers import compared
from attnfuse.algebra.kinds import COMPARISONS, Kinds, Rule, kind
from attnfuse.score import Apply, Capture, Const, Expr, Index, Symbol, apply, reads_score, walk

__all__ = ["MASK_RULES"]

_MASKED = Const(float("-inf"))
_OPPOSITE = {"lt": "ge", "ge": "lt", "le": "gt", "gt": "le", "eq": "ne", "ne": "eq"}


def _asked_bool(expr: Expr, kinds: Kinds) -> Expr | None:
    """``mask != 0 -> mask`` and ``mask == 0 -> ~mask``, for a mask that is a bool."""
    match expr:
        case Apply("ne" | "gt", (x, Const(0))) | Apply("eq" | "ge", (x, Const(1))) if kind(x, kinds) == "bool":
            return x
        case Apply("eq" | "le", (x, Const(0))) | Apply("ne" | "lt", (x, Const(1))) if kind(x, kinds) == "bool":
            return apply("not", x)
    return None


def _numbers_from_bools(expr: Expr, kinds: Kinds) -> Expr | None:
    """``float(mask) -> where(mask, 1.0, 0.0)``, so that ``(1 - mask) * fill`` becomes a choice; ``mask * x`` too."""
    match expr:
        case Apply("mul", (x, y)) if {kind(x, kinds), kind(y, kinds)} == {"bool", "float"}:
            return apply("mul", *(apply("float", a) if kind(a, kinds) == "bool" else a for a in (x, y)))
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


def _same_choice(expr: Expr, _: Kinds) -> Expr | None:
    """``where(c, x, 0) * where(c, y, 0) -> where(c, x * y, 0)``: two choices by one mask are one."""
    match expr:
        case Apply(op, (Apply("where", (c, x, Const(a))), Apply("where", (d, y, Const(b))))) if c == d:
            return apply("where", c, apply(op, x, y), apply(op, Const(a), Const(b)))
    return None


def _pushed(op: str, args: tuple[Expr, ...], at: int) -> Expr | None:
    choice = args[at]
    assert isinstance(choice, Apply)
    condition, yes, no = choice.args
    if not (isinstance(yes, Const) or isinstance(no, Const)):
        return None
    inside = [apply(op, *args[:at], branch, *args[at + 1 :]) for branch in (yes, no)]
    return apply("where", condition, *inside)


def _logic(expr: Expr, kinds: Kinds) -> Expr | None:
    """``~~x``, ``~(a < b)``, De Morgan, constants in ``&`` and ``|``."""
    match expr:
        case Apply("not", (Apply("not", (x,)),)):
            return x
        case Apply("not", (Apply("eq" | "ne" as op, args),)):  # of NaN too
            return apply(_OPPOSITE[op], *args)
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
    return None


def _chosen_bool(expr: Expr, kinds: Kinds) -> Expr | None:
    """``where(c, True, False) -> c``, ``where(c, x, False) -> c & x``, ``where(c, x, True) -> ~c | x``."""
    match expr:
        case Apply("where", (c, Const(True), Const(False))):
            return c
        case Apply("where", (c, Const(False), Const(True))):
            return apply("not", c)
        case Apply("where", (c, x, Const(False))):
            return apply("and", c, x)
        case Apply("where", (c, x, Const(True))) if kind(x, kinds) == "bool":
            return apply("or", apply("not", c), x)
        case Apply("where", (c, Const(bool(yes)), x)) if kind(x, kinds) == "bool":
            return apply("or", c, x) if yes else apply("and", apply("not", c), x)
    return None


def _choose_by_keep(expr: Expr, kinds: Kinds) -> Expr | None:
    """The score stands in the first branch, the fill in the second, one mask to a choice."""
    match expr:
        case Apply("where", (c, Const() as fill, x)) if reads_score(x):
            return apply("where", apply("not", c), x, fill)
        case Apply("where", (c, Apply("where", (d, x, Const() as inner)), Const() as fill)) if inner == fill:
            return apply("where", apply("and", c, d), x, fill)
        case Apply("where", (c, Const() as fill, Apply("where", (d, x, Const() as inner)))) if inner == fill:
            return apply("where", apply("and", apply("not", c), d), x, fill)
        case Apply("where", (Apply("not", (c,)), x, y)) if not reads_score(expr):
            return apply("where", c, y, x)
    return None


def _added_mask(expr: Expr, _: Kinds) -> Expr | None:
    """``x + where(keep, y, -inf) -> where(keep, x + y, -inf)``.

    A finite fill stays a summand: in a row that keeps nothing the scores still receive a gradient through it.
    """
    match expr:
        case Apply("add", (Apply("where", (before, x, a)), Apply("where", (keep, y, b)))) if a == b == _MASKED:
            return apply("where", apply("and", before, keep), apply("add", x, y), _MASKED)
        case Apply("add", (x, Apply("where", (keep, y, fill)))) if fill == _MASKED and reads_score(x):
            return apply("where", keep, apply("add", x, y), _MASKED)
        case Apply("add", (x, Apply("where", (keep, fill, y)))) if fill == _MASKED and reads_score(x):
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


def _of_whole_numbers(expr: Expr, kinds: Kinds) -> Expr | None:
    """``float(m - n) >= 0.0 -> m - n >= 0``."""
    match expr:
        case Apply(op, (a, b)) if op in COMPARISONS and "float" in (kind(a, kinds), kind(b, kinds)):
            found = [_whole(arg, kinds) for arg in (a, b)]
            whole = [arg for arg in found if arg is not None]
            return apply(op, *whole) if len(whole) == 2 else None
    return None


def _whole(expr: Expr, kinds: Kinds) -> Expr | None:
    """The integer that a float is made of."""
    match expr:
        case Const(float(value)) if value.is_integer() and abs(value) < 2**31:
            return Const(int(value))
        case Apply("float", (x,)) if kind(x, kinds) == "int" and not any(isinstance(part, Capture) for part in walk(x)):
            return x  # captured numbers may be too large for a float
    return expr if kind(expr, kinds) == "int" else None


def _comparison(expr: Expr, kinds: Kinds) -> Expr | None:
    """Comparisons of index arithmetic are solved for the key index: ``m - n > 3 -> n <= m + -4``."""
    match expr:
        case Apply(op, (a, b)) if op in COMPARISONS and kind(a, kinds) == kind(b, kinds) == "int":
            return compared(op, a, b)
    return None


def _not_negative(expr: Expr, _: Kinds) -> Expr | None:
    """``m >= 0 -> True``: what libraries write for "every row"."""
    match expr:
        case Apply("ge", (Index() | Symbol(), Const(int(bound)))) if bound <= 0:
            return Const(True)
        case Apply("le", (Index() | Symbol(), Const(int(bound)))) if bound < 0:
            return Const(False)
    return None


#: In the order they are tried.
MASK_RULES: tuple[Rule, ...] = (
    _asked_bool,
    _numbers_from_bools,
    _into_choice,
    _same_choice,
    _logic,
    _chosen_bool,
    _choose_by_keep,
    _added_mask,
    _distance,
    _of_whole_numbers,
    _comparison,
    _not_negative,
)
