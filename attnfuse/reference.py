"""Attention in plain eager torch: the oracle that kernels are held against, and the fallback.

Nothing is blocked, skipped or fused: the scores exist as one tensor. Arithmetic is float64 when the
query is float64 and float32 otherwise, so for half types it is more exact than the written-out program.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from attnfuse.dropout import kept
from attnfuse.errors import BadProgram
from attnfuse.operands import Operands
from attnfuse.score import Apply, Capture, Const, Expr, Index, Prob, Score, Symbol
from attnfuse.spec import FLOAT8, AttentionSpec

__all__ = [
    "Scope",
    "Span",
    "applied",
    "attention",
    "compute_dtype",
    "evaluate",
    "is_float8",
    "name_of",
    "normalised",
    "out_dtype",
    "repeat_heads",
    "rounded",
    "seed_of",
    "weights",
    "weights_dtype",
]

#: First index and one past the last.
Span = tuple[int, int]


@dataclass(frozen=True)
class Scope:
    """What the variables of a program stand for in one block of the scores.

    ``spans`` is the block, one span for each axis of ``[*B, H, M, N]``; ``captures`` are the *whole*
    captured tensors, cut to the block when they are read; ``score`` and ``weight`` have the block's shape.
    """

    spans: tuple[Span, ...]
    captures: Sequence[Tensor]
    symbols: Sequence[int]
    dtype: torch.dtype
    device: torch.device
    score: Tensor | None = None
    weight: Tensor | None = None

    @staticmethod
    def whole(operands: Operands) -> Scope:
        """The scope of all scores of query and key, without scores yet."""
        query = operands.query
        spans = tuple((0, size) for size in (*query.shape[:-1], operands.key.shape[-2]))
        return Scope(spans, operands.captures, operands.symbols, compute_dtype(query.dtype), query.device)

    def index(self, axis: int) -> Tensor:
        """The indices along one axis of the block, int64, shaped to broadcast against it."""
        first, last = self.spans[axis]
        rank = len(self.spans)
        return torch.arange(first, last, device=self.device).view(*(-1 if i == axis else 1 for i in range(rank)))

    def indices(self) -> tuple[Tensor, ...]:
        """:meth:`index` of every axis."""
        return tuple(self.index(axis) for axis in range(len(self.spans)))

    def capture(self, slot: int) -> Tensor:
        """A captured tensor, cut to the block; axes of size 1 stay."""
        tensor = self.captures[slot]
        for axis, (first, last) in enumerate(self.spans):
            if tensor.shape[axis] != 1:
                tensor = tensor.narrow(axis, first, last - first)
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The type that scores and programs are computed in, for operands of ``dtype``."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def name_of(dtype: torch.dtype) -> str:
    """A type as specs name it: ``"float32"``."""
    return str(dtype).removeprefix("torch.")


def is_float8(dtype: torch.dtype) -> bool:
    """Whether it is one of the types of :data:`attnfuse.spec.FLOAT8`."""
    return name_of(dtype) in FLOAT8


def out_dtype(spec: AttentionSpec, value: torch.dtype) -> torch.dtype:
    """The type of the output: value's, but what the spec says where that is a float8."""
    named: torch.dtype = getattr(torch, spec.out_dtype) if spec.out_dtype and is_float8(value) else value
    return named


def weights_dtype(spec: AttentionSpec, query: torch.dtype) -> torch.dtype:
    """The type of weights that are the result: the spec's ``out_dtype``, else query's."""
    named: torch.dtype = getattr(torch, spec.out_dtype) if spec.out_dtype else query
    return named


# --- programs ---------------------------------------------------------------------------------------

#: Operations that make a float of whatever they are given.
_FLOATING: dict[str, Callable[..., Tensor]] = {
    "exp": torch.exp, "exp2": torch.exp2, "log": torch.log, "sqrt": torch.sqrt, "rsqrt": torch.rsqrt,
    "reciprocal": torch.reciprocal, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "erf": torch.erf,
    "sin": torch.sin, "cos": torch.cos, "log1p": torch.log1p, "expm1": torch.expm1,
    "softplus": F.softplus, "div": torch.true_divide, "float": lambda x: x,
}  # fmt: skip
#: Operations that keep the type of their arguments, or answer in bool.
_KEEPING: dict[str, Callable[..., Tensor]] = {
    "neg": torch.neg, "not": torch.bitwise_not, "abs": torch.abs, "relu": torch.relu, "sign": torch.sign,
    "floor": torch.floor, "ceil": torch.ceil, "isnan": torch.isnan, "isinf": torch.isinf,
    "int": lambda x: x.to(torch.int64), "bool": lambda x: x.to(torch.bool),
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "floordiv": torch.floor_divide,
    "mod": torch.remainder, "pow": torch.pow, "min": torch.minimum, "max": torch.maximum,
    "lt": torch.lt, "le": torch.le, "gt": torch.gt, "ge": torch.ge, "eq": torch.eq, "ne": torch.ne,
    "and": torch.bitwise_and, "or": torch.bitwise_or, "xor": torch.bitwise_xor, "where": torch.where,
}  # fmt: skip


def evaluate(program: Expr, scope: Scope) -> Tensor:
    """The value of a program on a block: a tensor that broadcasts to the block's shape.

    Floats are of ``scope.dtype``, integers int64. Differentiable in scores, weights and floating captures.
    Raises :class:`BadProgram` where the program reads ``s`` or ``p`` and the scope has none.
    """
    match program:
        case Score() if scope.score is not None:
            return scope.score.to(scope.dtype)
        case Prob() if scope.weight is not None:
            return scope.weight.to(scope.dtype)
        case Index(axis):
            rank = len(scope.spans)
            return scope.index(int(axis[1:]) if axis[0] == "b" else rank - 3 + "hmn".index(axis))
        case Symbol(slot):
            return torch.scalar_tensor(scope.symbols[slot], dtype=torch.int64, device=scope.device)
        case Capture(slot):
            return scope.capture(slot)
        case Const(value):
            kind = {bool: torch.bool, int: torch.int64, float: scope.dtype}[type(value)]
            return torch.scalar_tensor(_rounded(value, kind), dtype=kind, device=scope.device)
        case Apply(op, args):
            # derivatives multiply equal parts, such as tanh(x) * tanh(x)
            values = {arg: evaluate(arg, scope) for arg in dict.fromkeys(args)}
            return applied(op, [values[arg] for arg in args], scope.dtype)
    raise BadProgram(f"a program reads {type(program).__name__.lower()} where there is none")


def _rounded(value: bool | int | float, dtype: torch.dtype) -> bool | int | float:
    """A number that a dtype has no room for is infinite in it; torch makes no such scalar."""
    if isinstance(value, float) and math.isfinite(value) and abs(value) > torch.finfo(dtype).max:
        return math.copysign(math.inf, value)
    return value


def applied(op: str, args: Sequence[Tensor], dtype: torch.dtype) -> Tensor:
    """One operation of :data:`attnfuse.score.ARITY` on tensors, its floats of ``dtype``."""
    if op in _FLOATING:
        return _FLOATING[op](*(arg if arg.is_floating_point() else arg.to(dtype) for arg in args))
    return _KEEPING[op](*args)


# --- attention --------------------------------------------------------------------------------------


def attention(spec: AttentionSpec, operands: Operands) -> tuple[Tensor, Tensor]:
    """``out [*B, H, M, Dv]`` in :func:`out_dtype` and ``lse [*B, H, M]``, the natural log of each row's sum, float32.

    Without a softmax there is no sum, and lse is zero. Differentiable by autograd.
    """
    query, key, value = operands.qkv
    scope = Scope.whole(operands)
    logit = _logits(spec, scope, query, key)
    weight = rounded(spec, normalised(spec, logit)[..., : key.shape[-2]])
    shape = weight.shape
    weight = evaluate(spec.weight, replace(scope, weight=weight)).expand(shape)
    if spec.dropout:
        mask = kept(seed_of(spec, operands.captures), spec.dropout, scope.indices())
        # a product, not a where: a dropped NaN stays NaN, as in torch.nn.functional.dropout
        weight = weight * (mask.to(scope.dtype) / (1 - spec.dropout) if spec.dropout < 1 else 0.0)
    out = weight.to(scope.dtype) @ repeat_heads(value, query.shape[-3]).to(scope.dtype)
    if spec.normaliser == "none":
        return out.to(out_dtype(spec, value.dtype)), torch.zeros(shape[:-1], dtype=torch.float32, device=out.device)
    return out.to(out_dtype(spec, value.dtype)), torch.logsumexp(logit, dim=-1).to(torch.float32)


def weights(spec: AttentionSpec, operands: Operands, first: int = 0) -> Tensor:
    """The normalised weights ``[*B, H, M, N]`` in :func:`weights_dtype`; query's rows are those from ``first`` on.

    Differentiable by autograd. The value is not read.
    """
    query, key = operands.query, operands.key
    scope = Scope.whole(operands)
    *outer, rows, keys = scope.spans
    scope = replace(scope, spans=(*outer, (first, first + rows[1]), keys))
    weight = normalised(spec, _logits(spec, scope, query, key))[..., : key.shape[-2]]
    return weight.to(weights_dtype(spec, query.dtype))


def _logits(spec: AttentionSpec, scope: Scope, query: Tensor, key: Tensor) -> Tensor:
    """Rows of logits, the sink's behind them."""
    score = query.to(scope.dtype) @ repeat_heads(key, query.shape[-3]).to(scope.dtype).transpose(-1, -2)
    logit = evaluate(spec.score, replace(scope, score=score)).expand(score.shape)
    if spec.sink is None:
        return logit
    sink = evaluate(spec.sink, scope).to(scope.dtype)
    return torch.cat([logit, sink.expand(*logit.shape[:-1], 1)], dim=-1)


def normalised(spec: AttentionSpec, logit: Tensor) -> Tensor:
    """The weights of rows of logits, the sink's column included."""
    if spec.normaliser == "none":
        return logit
    if spec.empty_rows == "zero":
        safe: Tensor = torch.ops.aten._safe_softmax.default(logit, -1)
        return safe
    return torch.softmax(logit, dim=-1)


def rounded(spec: AttentionSpec, weight: Tensor) -> Tensor:
    """Normalised weights, rounded where the spec lets them be; those of float64 are exact."""
    if spec.weight_dtype is None or weight.dtype == torch.float64:
        return weight
    dtype = getattr(torch, spec.weight_dtype)
    # in these units the largest weight of a row is as near to the type's largest number as a power of two can be
    units = 2.0 ** math.floor(math.log2(torch.finfo(dtype).max)) / weight.amax(dim=-1, keepdim=True)
    units = torch.where(units.isfinite(), units, 1.0)
    return (weight * units).to(dtype).to(weight.dtype) / units


def seed_of(spec: AttentionSpec, captures: Sequence[Tensor]) -> Tensor:
    """Dropout's seed: an int64 tensor of one element, one capture after those that the spec names."""
    if len(captures) != len(spec.captures) + 1:
        raise BadProgram(f"dropout needs its seed as capture {len(spec.captures)}; there are {len(captures)} captures")
    return captures[-1]


def repeat_heads(tensor: Tensor, heads: int) -> Tensor:
    """Key or value ``[*B, Hkv, N, D]`` as each query head sees it: ``[*B, heads, N, D]``."""
    repeats = heads // max(tensor.shape[-3], 1)
    return tensor if repeats == 1 else tensor.repeat_interleave(repeats, dim=-3)
