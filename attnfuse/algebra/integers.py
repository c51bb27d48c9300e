"""Linear index arithmetic: sums of indices, symbolic sizes and integers, and their comparisons."""

from __future__ import annotations

from attnfuse.score import Apply, Capture, Const, Expr, Index, Symbol, apply, text

__all__ = ["Linear", "compared", "linear", "spelled"]

#: Coefficient of each atom; the atom ``None`` is the constant term.
Linear = dict[Expr | None, int]

_MIRROR = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le", "eq": "eq", "ne": "ne"}


def linear(expr: Expr) -> Linear | None:
    """``expr`` as a linear combination; None when it is not one."""
    match expr:
        case Const(value) if isinstance(value, int) and not isinstance(value, bool):
            return {None: value}
        case Index() | Symbol() | Capture():
            return {expr: 1}
        case Apply("add", (a, b)):
            return _sum(linear(a), linear(b), 1)
        case Apply("sub", (a, b)):
            return _sum(linear(a), linear(b), -1)
        case Apply("neg", (a,)):
            return _sum({}, linear(a), -1)
        case Apply("mul", (Const(factor), a)) | Apply("mul", (a, Const(factor))) if isinstance(factor, int):
            return _sum({}, linear(a), factor)
    return None


def _sum(a: Linear | None, b: Linear | None, factor: int) -> Linear | None:
    if a is None or b is None:
        return None
    total = {atom: a.get(atom, 0) + factor * b.get(atom, 0) for atom in (*a, *b)}
    return {atom: count for atom, count in total.items() if count}


def spelled(terms: Linear) -> Expr:
    """The one spelling of a linear combination: atoms by name, then the constant."""
    out: Expr | None = None
    for atom in sorted((atom for atom in terms if atom is not None), key=_rank):
        count = terms[atom]
        term = atom if abs(count) == 1 else apply("mul", Const(abs(count)), atom)
        if out is None:
            out = term if count > 0 else apply("neg", term)
        else:
            out = apply("add" if count > 0 else "sub", out, term)
    constant = terms.get(None, 0)
    if out is None:
        return Const(constant)
    if constant:
        out = apply("add" if constant > 0 else "sub", out, Const(abs(constant)))
    return out


def _rank(atom: Expr) -> tuple[bool, str]:
    return not isinstance(atom, Index), text(atom)


def compared(op: str, a: Expr, b: Expr) -> Expr | None:
    """``a op b`` on integers, solved for the key index (else the row, else the first atom).

    ``<`` and ``>`` become ``<=`` and ``>=``. None when a side is not linear or nothing can be solved for.
    """
    difference = _sum(linear(a), linear(b), -1)
    if difference is None:
        return None
    subject = next((atom for atom in _subjects(difference) if abs(difference[atom]) == 1), None)
    if subject is None:
        return None
    sign = difference[subject]
    rest = _sum({}, {atom: count for atom, count in difference.items() if atom != subject}, -sign) or {}
    op = op if sign > 0 else _MIRROR[op]
    match op:
        case "lt":
            op, rest = "le", _sum(rest, {None: 1}, -1) or {}
        case "gt":
            op, rest = "ge", _sum(rest, {None: 1}, 1) or {}
    return apply(op, subject, spelled(rest))


def _subjects(terms: Linear) -> list[Expr]:
    known = [atom for atom in terms if atom is not None]
    return sorted(known, key=lambda atom: (atom != Index("n"), atom != Index("m"), *_rank(atom)))
