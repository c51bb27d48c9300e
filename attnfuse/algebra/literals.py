"""Constants of score programs, computed as torch would compute them."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

from attnfuse.score import Const

__all__ = ["compute", "rounded"]

_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "neg": operator.neg, "not": operator.not_, "abs": abs, "exp": math.exp, "log": math.log, "sqrt": math.sqrt,
    "rsqrt": lambda x: 1.0 / math.sqrt(x), "reciprocal": lambda x: 1.0 / x, "tanh": math.tanh,
    "sigmoid": lambda x: 1.0 / (1.0 + math.exp(-x)) if x >= 0 else math.exp(x) / (1.0 + math.exp(x)),
    "relu": lambda x: max(x, type(x)(0)), "sign": lambda x: type(x)((x > 0) - (x < 0)),
    "float": float, "int": int, "bool": bool,
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv,
    "floordiv": operator.floordiv, "mod": operator.mod, "pow": operator.pow, "min": min, "max": max,
    "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge, "eq": operator.eq, "ne": operator.ne,
    "and": operator.and_, "or": operator.or_, "xor": operator.xor,
}  # fmt: skip


def compute(op: str, args: tuple[bool | int | float, ...]) -> Const | None:
    """The operation on literals; None where Python has no value for it (``1 / 0``, ``log(-1)``)."""
    if op == "where":
        return Const(args[1] if args[0] else args[2])
    if op not in _FUNCTIONS or any(map(math.isnan, args)):
        return None
    try:
        value = _FUNCTIONS[op](*args)
    except (ArithmeticError, ValueError, TypeError):
        return None
    if isinstance(value, float):
        value += 0.0  # a negative zero is not worth a spelling of its own
    return Const(value) if isinstance(value, (bool, int, float)) else None


def rounded(value: float) -> float:
    """``value``, or the number of at most 14 digits within 4 units in the last place of it.

    ``0.125 / 30 * 30`` thus is 0.125 again, so that a scale folded through a softcap has one name.
    """
    if not math.isfinite(value):
        return value
    short = float(f"{value:.14g}")
    return short if abs(short - value) <= 4 * math.ulp(value) else value
