"""What an expression evaluates to: a bool, an integer, a float."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from attnfuse.score import Apply, Capture, Const, Expr, Index, Symbol

__all__ = ["COMPARISONS", "LOGIC", "Kind", "Kinds", "Rule", "differentiated", "kind"]

#: "bool", "int" or "float".
Kind = str

#: The kind of the tensor in each capture slot.
Kinds = Callable[[int], Kind]

#: An expression as an equal one; None where the rule does not apply.
Rule = Callable[[Expr, Kinds], "Expr | None"]

COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
LOGIC = ("and", "or", "xor", "not", "bool", "isnan", "isinf", *COMPARISONS)
_INTEGER = ("add", "sub", "mul", "floordiv", "mod", "neg", "abs", "min", "max")


def kind(expr: Expr, kinds: Kinds) -> Kind:
    """What an expression evaluates to."""
    match expr:
        case Const(value):
            return type(value).__name__
        case Index() | Symbol():
            return "int"
        case Capture(slot):
            return kinds(slot)
        case Apply(op) if op in LOGIC:
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


def differentiated(expr: Expr) -> Iterator[Capture]:
    """The captures that a gradient of the program's value flows back to: not those that it only compares."""
    match expr:
        case Capture():
            yield expr
        case Apply("where", (_, *values)):
            for value in values:
                yield from differentiated(value)
        case Apply(op, args) if op not in LOGIC:
            for arg in args:
                yield from differentiated(arg)
