"""The score program: the pointwise expression between the two contractions of attention.

A program maps one score to one logit. Its variables are

========== ==================================================================================
``s``      the raw dot product of one query row and one key row
``p``      (weight programs only) the normalised weight
``b0``...  batch indices, ``h`` head, ``m`` query row, ``n`` key row: integers
``t0``...  captured tensors, each read at this element's own indices (:class:`attnfuse.spec.Captured`)
``z0``...  symbolic sizes, integers known when the program runs
========== ==================================================================================

A program has a text form, which is Python expression syntax, so that ``parse(text(e)) == e``::

    where((n <= m) & t0, 0.125 * s, -inf)

Arithmetic on floats is carried out in float32 (float64 for float64 attention), on integers in
int64. This module knows nothing of torch.
"""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from functools import cached_property, partial, reduce

from attnfuse.errors import BadProgram

__all__ = [
    "ARITY",
    "Apply",
    "Capture",
    "Const",
    "Expr",
    "Index",
    "P",
    "Prob",
    "S",
    "Score",
    "Symbol",
    "apply",
    "joined",
    "parse",
    "parted",
    "reads_score",
    "rewrite",
    "text",
    "walk",
]


@dataclass(frozen=True)
class Score:
    """``s``, the raw dot product."""


@dataclass(frozen=True)
class Prob:
    """``p``, the normalised weight; only weight programs read it."""


@dataclass(frozen=True)
class Index:
    """An integer index: ``b0``, ``b1``, ..., ``h``, ``m`` or ``n``."""

    axis: str


@dataclass(frozen=True)
class Symbol:
    """``z<slot>``: a size that is only known when the program runs."""

    slot: int


@dataclass(frozen=True)
class Capture:
    """``t<slot>``: a captured tensor at this element's indices."""

    slot: int


@dataclass(frozen=True)
class Const:
    """A literal; its Python type (bool, int, float) is its type."""

    value: bool | int | float

    # 1, 1.0 and True are three different literals, and nan is itself.
    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Const) or type(self.value) is not type(other.value):
            return False
        return self.value is other.value or repr(self.value) == repr(other.value)

    def __hash__(self) -> int:
        return hash(self.value) if self.value == self.value else 0


@dataclass(frozen=True)
class Apply:
    """A pointwise operation of :data:`ARITY` on arguments."""

    op: str
    args: tuple[Expr, ...]

    # programs are deep, and keys of caches that every call of a kernel asks
    @cached_property
    def _hash(self) -> int:
        return hash((self.op, self.args))

    def __hash__(self) -> int:
        return self._hash

    def __reduce__(self) -> tuple[type[Apply], tuple[str, tuple[Expr, ...]]]:
        # another process hashes strings otherwise
        return Apply, (self.op, self.args)


Expr = Score | Prob | Index | Symbol | Capture | Const | Apply
S, P = Score(), Prob()

#: Every pointwise operation and its number of arguments. ``float``/``int``/``bool`` are casts.
ARITY: dict[str, int] = {
    **dict.fromkeys(("neg", "not", "abs", "exp", "exp2", "log", "sqrt", "rsqrt", "reciprocal"), 1),
    **dict.fromkeys(("tanh", "sigmoid", "relu", "erf", "sin", "cos", "sign", "floor", "ceil"), 1),
    **dict.fromkeys(("log1p", "expm1", "softplus", "isnan", "isinf"), 1),
    **dict.fromkeys(("float", "int", "bool"), 1),
    **dict.fromkeys(("add", "sub", "mul", "div", "floordiv", "mod", "pow", "min", "max"), 2),
    **dict.fromkeys(("lt", "le", "gt", "ge", "eq", "ne", "and", "or", "xor"), 2),
    "where": 3,
}

_BINARY: dict[type[ast.operator], str] = {
    ast.Add: "add", ast.Sub: "sub", ast.Mult: "mul", ast.Div: "div", ast.FloorDiv: "floordiv",
    ast.Mod: "mod", ast.Pow: "pow", ast.BitAnd: "and", ast.BitOr: "or", ast.BitXor: "xor",
}  # fmt: skip
_COMPARE: dict[type[ast.cmpop], str] = {
    ast.Lt: "lt", ast.LtE: "le", ast.Gt: "gt", ast.GtE: "ge", ast.Eq: "eq", ast.NotEq: "ne",
}  # fmt: skip
_UNARY: dict[type[ast.unaryop], str] = {ast.USub: "neg", ast.Invert: "not"}

# infix symbol and binding strength, loosest first, as in Python
_INFIX: dict[str, tuple[str, int]] = {
    **dict.fromkeys(("lt", "le", "gt", "ge", "eq", "ne"), ("", 1)),
    "or": ("|", 2), "xor": ("^", 3), "and": ("&", 4), "add": ("+", 6), "sub": ("-", 6),
    "mul": ("*", 7), "div": ("/", 7), "floordiv": ("//", 7), "mod": ("%", 7), "pow": ("**", 9),
}  # fmt: skip
_COMPARE_SIGN = {"lt": "<", "le": "<=", "gt": ">", "ge": ">=", "eq": "==", "ne": "!="}
_PREFIX = {"neg": "-", "not": "~"}
_PREFIX_STRENGTH = 8
_ATOM = 10


def apply(op: str, *args: Expr) -> Apply:
    """``Apply`` with its arity checked. Raises :class:`BadProgram`."""
    if ARITY.get(op) != len(args):
        raise BadProgram(f"no operation {op!r} with {len(args)} arguments")
    return Apply(op, args)


def joined(op: str, parts: Sequence[Expr]) -> Expr:
    """One program of an operation over at least one part, from the left."""
    return reduce(partial(apply, op), parts)


def parted(op: str, expr: Expr) -> Iterator[Expr]:
    """What an operation of two arguments was applied to, however it was nested."""
    match expr:
        case Apply(name, (left, right)) if name == op:
            yield from parted(op, left)
            yield from parted(op, right)
        case _:
            yield expr


def walk(expr: Expr) -> Iterator[Expr]:
    """``expr`` and everything inside it, parents first."""
    yield expr
    if isinstance(expr, Apply):
        for arg in expr.args:
            yield from walk(arg)


def reads_score(expr: Expr) -> bool:
    """Whether the raw score is in it."""
    return any(isinstance(part, Score) for part in walk(expr))


def rewrite(expr: Expr, rule: Callable[[Expr], Expr], settled: AbstractSet[Expr] = frozenset()) -> Expr:
    """``expr`` with ``rule`` applied to every part once, innermost first, but for what is ``settled``."""
    if not isinstance(expr, Apply):
        return rule(expr)
    if expr in settled:
        return expr
    args = tuple([rewrite(arg, rule, settled) for arg in expr.args])
    if any(map(operator.is_not, args, expr.args)):
        expr = Apply(expr.op, args)
    return rule(expr)


def text(expr: Expr) -> str:
    """The program as one line that :func:`parse` reads back."""
    return _text(expr)[0]


def _text(expr: Expr) -> tuple[str, int]:
    match expr:
        case Score():
            return "s", _ATOM
        case Prob():
            return "p", _ATOM
        case Index(axis):
            return axis, _ATOM
        case Symbol(slot):
            return f"z{slot}", _ATOM
        case Capture(slot):
            return f"t{slot}", _ATOM
        case Const(value):
            # a negative literal binds like a prefixed minus
            return repr(value), _ATOM if _is_plain(value) else _PREFIX_STRENGTH
        case Apply(op, (arg,)) if op in _PREFIX and not (op == "neg" and isinstance(arg, Const)):
            return _PREFIX[op] + _wrapped(arg, _PREFIX_STRENGTH), _PREFIX_STRENGTH
        case Apply(op, (left, right)) if op in _INFIX:
            sign, strength = _INFIX[op]
            # pow groups to the right and comparisons do not chain: both sides in brackets
            tight = op == "pow" or op in _COMPARE_SIGN
            lhs = _wrapped(left, strength + 1 if tight else strength)
            rhs = _wrapped(right, strength + 1)
            return f"{lhs} {sign or _COMPARE_SIGN[op]} {rhs}", strength
        case Apply(op, args):
            return f"{op}({', '.join(map(text, args))})", _ATOM


def _is_plain(value: bool | int | float) -> bool:
    return math.isnan(value) or math.copysign(1.0, value) > 0


def _wrapped(expr: Expr, at_least: int) -> str:
    inner, strength = _text(expr)
    return inner if strength >= at_least else f"({inner})"


def parse(source: str) -> Expr:
    """The program that ``source`` spells. Raises :class:`BadProgram`, naming what was not understood."""
    try:
        return _parse(ast.parse(source, mode="eval").body)
    except SyntaxError as error:
        raise BadProgram(f"not an expression: {source[:80]!r} ({error.msg})") from None
    # NUL and lone surrogates; nesting that the parser or we cannot follow
    except (ValueError, MemoryError, RecursionError) as error:
        raise BadProgram(f"not an expression: {source[:80]!r} ({type(error).__name__})") from None


def _parse(node: ast.expr) -> Expr:
    match node:
        case ast.Constant(value=bool() | int() | float() as value):
            return Const(value)
        case ast.Name(id=name):
            return _parse_name(name)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            inner = _parse(operand)
            literal = isinstance(inner, Const) and not isinstance(inner.value, bool)
            return Const(-inner.value) if literal and isinstance(inner, Const) else apply("neg", inner)
        case ast.UnaryOp(op=sign, operand=operand) if type(sign) in _UNARY:
            return apply(_UNARY[type(sign)], _parse(operand))
        case ast.BinOp(left=left, op=sign, right=right) if type(sign) in _BINARY:
            return apply(_BINARY[type(sign)], _parse(left), _parse(right))
        case ast.Compare(left=left, ops=[sign], comparators=[right]) if type(sign) in _COMPARE:
            return apply(_COMPARE[type(sign)], _parse(left), _parse(right))
        case ast.Call(func=ast.Name(id=op), args=args, keywords=[]):
            return apply(op, *map(_parse, args))
    raise BadProgram(f"not part of a score program: {ast.unparse(node)!r}")


def _parse_name(name: str) -> Expr:
    head, digits = name[:1], name[1:]
    match head:
        case "s" if not digits:
            return S
        case "p" if not digits:
            return P
        case "h" | "m" | "n" if not digits:
            return Index(name)
        case "b" if digits.isdigit():
            return Index(name)
        case "t" if digits.isdigit():
            return Capture(int(digits))
        case "z" if digits.isdigit():
            return Symbol(int(digits))
    if name in ("inf", "nan"):
        return Const(float(name))
    raise BadProgram(f"unknown name {name!r} in a score program")
