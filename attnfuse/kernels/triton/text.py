"""A program as the source text of a small jit function, for a kernel body to take as a ``constexpr``.

The text reads ``tl``, which is ``triton.language`` or ``triton.experimental.gluon.language``; and ``@jit``, which
is either's decorator: the same text serves both. The function is::

    program(s, p, b, h, m, n, captures, strides, symbols)

``s`` the raw scores and ``p`` the weights or a gradient, float32 ``[BM, BN]`` (whatever the program does not read
may be anything); ``b`` a tuple of int64 batch indices, ``h`` the query head, int64, a scalar or ``[BM, 1]``; ``m
[BM, 1]`` and ``n [1, BN]`` int32 indices that lie inside the tensors; ``captures`` a tuple of pointers,
``strides`` their strides in elements, one for each axis of :attr:`attnfuse.spec.Captured.axes`, slot after slot;
``symbols`` a tuple of integers. It returns a tensor that broadcasts to ``[BM, BN]``: float32 where the program is a
float.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from attnfuse.algebra import Kind, kind
from attnfuse.score import Apply, Capture, Const, Expr, Index, Prob, Score, Symbol, text, walk
from attnfuse.spec import Captured

__all__ = ["PARAMETERS", "function_text", "untranslatable"]

PARAMETERS = ("s", "p", "b", "h", "m", "n", "captures", "strides", "symbols")

#: Whole exponents of pow up to this one become products.
_LARGEST_POWER = 16

#: Functions that the language lacks, by the name that programs call them; each may call those before it.
_HELPERS: dict[str, str] = {
    "_tanh": """
        # 1 - 2 / (exp(2|x|) + 1) loses relative precision near zero, where the series has it
        a = tl.abs(x)
        far = 1.0 - 2.0 / (tl.exp2(a * 2.8853900817779268) + 1.0)
        q = x * x
        t = 0.1333333333 + q * (-0.0539682540 + q * (0.0218694885 - q * 0.0088632355))
        near = 1.0 + q * (-0.3333333333 + q * t)
        return tl.where(a < 0.35, x * near, tl.where(x < 0.0, -far, far))
    """,
    "_sigmoid": """
        return 1.0 / (1.0 + tl.exp2(x * -1.4426950408889634))
    """,
    "_sign": """
        return tl.where(x > 0, 1.0, tl.where(x < 0, -1.0, x * 0.0))
    """,
    "_log1p": """
        u = 1.0 + x
        return tl.where(u == 1.0, x, tl.where(u == float("inf"), u, tl.log(u) * (x / (u - 1.0))))
    """,
    "_expm1": """
        u = tl.exp(x)
        w = u - 1.0
        return tl.where(u == 1.0, x, tl.where((w == -1.0) | (u == float("inf")), w, w * (x / tl.log(u))))
    """,
    "_softplus": """
        return tl.where(x > 20.0, x, _log1p(tl.exp(tl.where(x > 20.0, 0.0, x))))
    """,
    "_floordiv": """
        q = x // y
        r = x - q * y
        return tl.where((r != 0) & ((r < 0) != (y < 0)), q - 1, q)
    """,
}  # fmt: skip
_NEEDS = {"_softplus": ("_log1p",)}
_TWO_ARGUMENTS = ("_floordiv",)
#: One instruction in place of a series, exact to 2^-11: as good as scores of a half type are.
FAST_TANH = """
        return tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
"""

_UNARY: dict[str, str] = {
    "abs": "tl.abs({0})", "exp": "tl.exp({0})", "exp2": "tl.exp2({0})", "log": "tl.log({0})",
    "sqrt": "tl.sqrt({0})", "rsqrt": "tl.rsqrt({0})", "reciprocal": "1.0 / {0}", "tanh": "_tanh({0})",
    "sigmoid": "_sigmoid({0})", "erf": "tl.erf({0})", "sin": "tl.sin({0})", "cos": "tl.cos({0})",
    "log1p": "_log1p({0})", "expm1": "_expm1({0})", "softplus": "_softplus({0})",
    "isnan": "{0} != {0}", "isinf": 'tl.abs({0}) == float("inf")', "float": "{0}", "neg": "-{0}",
    "bool": "{0} != 0", "not": "{0} == 0",
    # a where passes NaN on, maximum does not
    "relu": "tl.where({0} < 0, 0.0, {0})", "sign": "_sign({0})",
    "floor": "tl.floor({0})", "ceil": "tl.ceil({0})",
}  # fmt: skip
_BINARY: dict[str, str] = {
    "add": "+", "sub": "-", "mul": "*", "div": "/", "and": "&", "or": "|", "xor": "^",
    "lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!=",
}  # fmt: skip
#: Operations whose arguments become floats first.
_FLOATING = (
    *("exp", "exp2", "log", "sqrt", "rsqrt", "reciprocal", "tanh", "sigmoid", "erf", "sin", "cos"),
    *("log1p", "expm1", "softplus", "div", "float"),
)


def untranslatable(program: Expr) -> tuple[str, ...]:
    """Why a program has no text, one sentence a reason; empty where it has."""
    powers = [part for part in walk(program) if isinstance(part, Apply) and part.op == "pow" and not _is_product(part)]
    return tuple(f"its program raises to a power that is no small whole number: {text(each)}" for each in powers)


def _is_product(power: Apply) -> bool:
    exponent = power.args[1]
    whole = isinstance(exponent, Const) and float(exponent.value).is_integer()
    return whole and isinstance(exponent, Const) and abs(exponent.value) <= _LARGEST_POWER


def function_text(
    program: Expr, captures: tuple[Captured, ...], *, name: str = "program", fast: bool = False, wide: bool = False
) -> str:
    """The source of ``name``, and of the functions it calls, as the module docstring has it.

    ``fast`` allows NVIDIA's approximate tanh, for scores of half types; ``wide`` makes offsets along the keys
    64-bit, for captures of more than 2^31 elements between the first key and the last.
    """
    writer = _Writer(captures, wide=wide)
    result = writer.value(program)
    body = "\n".join(f"    {line}" for line in (*writer.lines, f"return {result}"))
    called = [helper for helper in _HELPERS if any(helper + "(" in line for line in (*writer.lines, result))]
    wanted = dict.fromkeys(each for helper in called for each in (*_NEEDS.get(helper, ()), helper))
    parts = [_helper(each, FAST_TANH if fast and each == "_tanh" else _HELPERS[each]) for each in wanted]
    return "\n\n".join((*parts, f"@jit\ndef {name}({', '.join(PARAMETERS)}):\n{body}\n"))


def _helper(name: str, body: str) -> str:
    lines = "\n".join(line[4:] for line in body.strip("\n").splitlines() if line.strip())
    return f"@jit\ndef {name}({'x, y' if name in _TWO_ARGUMENTS else 'x'}):\n{lines}\n"


@dataclass
class _Writer:
    """Writes each distinct part of a program once, innermost first."""

    captures: tuple[Captured, ...]
    wide: bool
    lines: list[str] = field(default_factory=list)
    known: dict[Expr, str] = field(default_factory=dict)

    def kind(self, expr: Expr) -> Kind:
        return kind(expr, lambda slot: self.captures[slot].kind)

    def value(self, expr: Expr) -> str:
        """An expression's text, a name or a literal, whose lines are written."""
        match expr:
            case Const(value):
                return literal(value)
            case Score():
                return "s"
            case Prob():
                return "p"
            case Index(axis):
                return f"b[{axis[1:]}]" if axis[0] == "b" else axis
            case Symbol(slot):
                return f"symbols[{slot}]"
        if expr not in self.known:
            line = self._load(expr.slot) if isinstance(expr, Capture) else self._apply(expr)
            self.known[expr] = f"v{len(self.known)}"
            self.lines.append(f"{self.known[expr]} = {line}")
        return self.known[expr]

    def _load(self, slot: int) -> str:
        first = sum(len(each.axes) for each in self.captures[:slot])
        captured = self.captures[slot]
        terms = {axis: self._offset(axis, first + place) for place, axis in enumerate(captured.axes)}
        rows = [term for axis, term in terms.items() if axis != "n"]
        pointer = f"captures[{slot}]"
        # rows first: their part is the same for every tile of keys
        for offset in (" + ".join(rows), terms.get("n", "")):
            pointer = f"({pointer} + ({offset}))" if offset else pointer
        load = f"tl.load({pointer})"
        return f"{load}.to(tl.float32)" if captured.kind == "float" else load

    def _offset(self, axis: str, place: int) -> str:
        index = f"b[{axis[1:]}]" if axis[0] == "b" else axis
        index = f"{index}.to(tl.int64)" if axis == "m" or (axis == "n" and self.wide) else index
        return f"{index} * strides[{place}]"

    def _apply(self, expr: Apply) -> str:
        op, args = expr.op, expr.args
        given = [self._float(arg) if op in _FLOATING else self.value(arg) for arg in args]
        if op in _UNARY:
            exact = op in ("floor", "ceil") and self.kind(args[0]) != "float"
            return given[0] if exact else _UNARY[op].format(*given)
        if op in _BINARY:
            return f"{given[0]} {_BINARY[op]} {given[1]}"
        return _OTHERS[op](self, expr, given)

    def _float(self, expr: Expr) -> str:
        """An expression as float32; a product works on Python's own numbers too."""
        found = self.value(expr)
        return found if self.kind(expr) == "float" else f"({found} * 1.0)"

    def where(self, expr: Apply, given: list[str]) -> str:
        """Both arms of a choice of floats are floats."""
        if self.kind(expr) == "float":
            given = [given[0], *(self._float(arm) for arm in expr.args[1:])]
        return f"tl.where({', '.join(given)})"

    def extreme(self, expr: Apply, given: list[str]) -> str:
        """Of two floats, where NaN wins, as in torch; of two integers."""
        sign = {"min": "<", "max": ">"}[expr.op]
        left, right = given
        if self.kind(expr) == "float":
            left, right = map(self._float, expr.args)
            return f"tl.where({left} != {left}, {left}, tl.where({left} {sign} {right}, {left}, {right}))"
        return f"tl.where({left} {sign} {right}, {left}, {right})"

    def floor_divided(self, expr: Apply, given: list[str]) -> str:
        """Towards minus infinity, where the language's integers go towards zero."""
        if self.kind(expr) == "float":
            left, right = map(self._float, expr.args)
            return f"tl.floor({left} / {right})"
        return f"_floordiv({given[0]}, {given[1]})"

    def remainder(self, expr: Apply, given: list[str]) -> str:
        """With the sign of the divisor."""
        quotient = self.floor_divided(expr, given)
        return f"{given[0]} - {quotient} * {given[1]}"

    def power(self, expr: Apply, given: list[str]) -> str:
        """A whole power as products. Others are :func:`untranslatable`."""
        exponent = expr.args[1]
        assert isinstance(exponent, Const)
        count = int(exponent.value)
        product = " * ".join([given[0]] * abs(count)) or f"{given[0]} * 0 + 1"
        return f"1.0 / ({product})" if count < 0 else product

    def whole(self, expr: Apply, given: list[str]) -> str:
        """A cast to int64."""
        return f"({given[0]} + 0).to(tl.int64)"


_OTHERS: dict[str, Callable[[_Writer, Apply, list[str]], str]] = {
    "where": _Writer.where,
    "min": _Writer.extreme,
    "max": _Writer.extreme,
    "floordiv": _Writer.floor_divided,
    "mod": _Writer.remainder,
    "pow": _Writer.power,
    "int": _Writer.whole,
}


def literal(value: bool | int | float) -> str:
    """A constant as the language reads it."""
    if isinstance(value, float) and not math.isfinite(value):
        return '-float("inf")' if value < 0 else f'float("{value}")'
    return f"({value!r})" if value < 0 else repr(value)
