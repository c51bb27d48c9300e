"""Derivatives of score programs, as score programs: reverse mode, so that a masked score gets exactly zero.

``pullback(program)[leaf]`` maps the gradient that reaches a program to the gradient of one of its leaves.
It reads that gradient as the variable of the other kind: ``p`` where the program is of ``s``, ``s``
where it is of ``p``::

    pullback(where(n <= m, 0.5 * s, -inf))[s]  ==  where(n <= m, p, 0.0) * 0.5

A ``where`` passes the gradient through a ``where``, never through a product: a gradient of NaN (a fully masked
row) leaves zero behind the mask, as torch's autograd does. Ties of min and max share it equally.
"""

from __future__ import annotations

from functools import lru_cache
from types import MappingProxyType

from attnfuse.score import Apply, Capture, Const, Expr, P, Prob, S, Score, apply, parse, rewrite, walk

__all__ = ["pullback"]

ZERO, ONE = Const(0.0), Const(1.0)

#: The partial derivatives of an operation of ``t0`` and ``t1``, one for each argument. No entry: no gradient.
_PARTIAL: dict[str, tuple[Expr, ...]] = {
    op: tuple(map(parse, partials))
    for op, *partials in (
        ("neg", "-1.0"),
        ("float", "1.0"),
        ("abs", "sign(t0)"),
        ("exp", "exp(t0)"),
        ("exp2", "0.6931471805599453 * exp2(t0)"),
        ("log", "reciprocal(t0)"),
        ("sqrt", "0.5 * rsqrt(t0)"),
        ("rsqrt", "-0.5 * rsqrt(t0) / t0"),
        ("reciprocal", "-(reciprocal(t0) * reciprocal(t0))"),
        ("tanh", "1.0 - tanh(t0) * tanh(t0)"),
        ("sigmoid", "sigmoid(t0) * (1.0 - sigmoid(t0))"),
        ("relu", "float(t0 > 0)"),
        ("erf", "1.1283791670955126 * exp(-(t0 * t0))"),
        ("sin", "cos(t0)"),
        ("cos", "-sin(t0)"),
        ("log1p", "reciprocal(1.0 + t0)"),
        ("expm1", "exp(t0)"),
        ("softplus", "sigmoid(t0)"),
        ("add", "1.0", "1.0"),
        ("sub", "1.0", "-1.0"),
        ("mul", "t1", "t0"),
        ("div", "1.0 / t1", "-(t0 / t1) / t1"),
        ("mod", "1.0", "-floor(t0 / t1)"),
        ("pow", "where(t1 == 0, 0.0, t1 * t0 ** (t1 - 1))", "where(t0 == 0, 0.0, t0 ** t1 * log(t0))"),
        ("min", "0.5 * (float(t0 < t1) + float(t0 <= t1))", "0.5 * (float(t1 < t0) + float(t1 <= t0))"),
        ("max", "0.5 * (float(t0 > t1) + float(t0 >= t1))", "0.5 * (float(t1 > t0) + float(t1 >= t0))"),
    )
}


@lru_cache(maxsize=1024)
def pullback(program: Expr) -> MappingProxyType[Expr, Expr]:
    """For each leaf (``s`` or ``p``, and captures) that the program depends on, the program of its gradient."""
    of_weight = any(isinstance(part, Prob) for part in walk(program))
    found: dict[Expr, Expr] = {}
    _pull(program, S if of_weight else P, found)
    return MappingProxyType(found)


def _pull(program: Expr, grad: Expr, found: dict[Expr, Expr]) -> None:
    match program:
        case Score() | Prob() | Capture():
            found[program] = apply("add", found[program], grad) if program in found else grad
        case Apply("where", (condition, kept, other)):
            for arm, passed in ((kept, (grad, ZERO)), (other, (ZERO, grad))):
                if _depends(arm):
                    _pull(arm, apply("where", condition, *passed), found)
        case Apply(op, args) if op in _PARTIAL:
            for arg, partial in zip(args, _PARTIAL[op], strict=True):
                if _depends(arg):
                    _pull(arg, _times(grad, _filled(partial, args)), found)


def _depends(program: Expr) -> bool:
    return any(isinstance(part, (Score, Prob, Capture)) for part in walk(program))


def _times(grad: Expr, factor: Expr) -> Expr:
    match factor:
        case Const(1.0):
            return grad
        case Const(-1.0):
            return apply("neg", grad)
    return apply("mul", grad, factor)


def _filled(partial: Expr, args: tuple[Expr, ...]) -> Expr:
    """A partial derivative with the arguments themselves in place of ``t0`` and ``t1``."""
    return rewrite(partial, lambda part: args[part.slot] if isinstance(part, Capture) else part)
