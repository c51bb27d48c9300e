"""Specs, shapes and operands that kernels are tried on, and the written-out program they are measured against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from attnfuse.kernels import Operand, Problem, rows_kept
from attnfuse.operands import Operands
from attnfuse.reference import Scope, attention, compute_dtype, evaluate, repeat_heads
from attnfuse.score import P, parse
from attnfuse.spec import AttentionSpec, Captured

FULL = ("b0", "h", "m", "n")
MIN = torch.finfo(torch.float32).min
HALF_MIN = torch.finfo(torch.bfloat16).min


def spec(
    score: str, *captures: str, sink: str | None = None, weight: str = "p", dropout: float = 0.0, **facts: Any
) -> AttentionSpec:
    """A spec from texts; captures as ``"float32[h,m]"``; ``facts`` are the spec's normaliser and empty rows."""
    return AttentionSpec(
        parse(score),
        parse(weight),
        None if sink is None else parse(sink),
        dropout,
        tuple(Captured(tuple(filter(None, c[:-1].split("[")[1].split(","))), c.split("[")[0]) for c in captures),
        **facts,
    )


SPECS = {
    "plain": spec("s"),
    "scaled": spec("0.3 * s"),
    "negative scale": spec("-0.3 * s"),
    "scale of each head": spec("t0 * s", "float32[h]"),
    "causal": spec("where(n <= m, 0.3 * s, -inf)"),
    "causal, finite fill": spec(f"where(n <= m, 0.3 * s, {MIN})"),
    "causal, bottom right": spec("where(n <= m + 4, 0.3 * s, -inf)"),
    "causal, offset of each batch": spec("where(n <= m + t0, 0.3 * s, -inf)", "int64[b0]"),
    "causal, rows without keys": spec("where(n <= m - 3, 0.3 * s, -inf)"),
    "causal, rows of equal weights": spec(f"where(n <= m - 3, 0.3 * s, {MIN})"),
    "causal, mild fill": spec("where(n <= m, 0.3 * s, -10000.0)"),
    "fill of one": spec("where(n <= m, 0.3 * s, 1.0)"),
    "window": spec("where((n <= m) & (n >= m - 5), 0.3 * s, -inf)"),
    "window beside the keys": spec("where((n <= m + 90) & (n >= m + 80), 0.3 * s, -inf)"),
    "window, finite fill": spec(f"where((n <= m + 2) & (n >= m - 5), 0.3 * s, {MIN})"),
    "window, added fill": spec(f"0.3 * s + where((n <= m + 2) & (n >= m - 5), 0.0, {HALF_MIN})"),
    "causal, added mild fill": spec("0.3 * s + where(n <= m, 0.0, -2.0)"),
    "causal, some scores three": spec("where(n <= m, where(t0, 0.3 * s, 3.0), -inf)", "bool[n]"),
    "causal, some keys preferred": spec("where(n <= m, 0.3 * s + where(n < 7, 0.0, -2.0), -inf)"),
    "padding": spec("where(t0, 0.3 * s, -inf)", "bool[b0,n]"),
    "padding and causal, finite fill": spec(f"where((n <= m) & t0, 0.3 * s, {MIN})", "bool[b0,n]"),
    "documents": spec("where(t0 == t1, 0.3 * s, -inf)", "int64[b0,m]", "int64[b0,n]"),
    "prefix": spec("where((n <= m) | (n < 7), 0.3 * s, -inf)"),
    "causal, first keys as low as its fill": spec(f"where(n <= m, 0.3 * s + where(n >= 7, 0.0, {MIN}), {MIN})"),
    "a number added": spec("0.3 * s + -2.0"),
    "bias": spec("0.3 * s + t0", "float32[h,m,n]"),
    "bias of everything": spec("0.3 * s + t0", "float32[b0,h,m,n]"),
    "two biases": spec("0.3 * s + t0 + t1", "float32[h,m,n]", "float32[b0,n]"),
    "alibi": spec("where(n <= m, 0.3 * s + t0 * (n - m), -inf)", "float32[h]"),
    "softcap": spec("5.0 * tanh(0.3 * s / 5.0)"),
    "softcap, causal": spec(f"where(n <= m, 5.0 * tanh(0.3 * s / 5.0), {MIN})"),
    "no form, causal": spec("where(n <= m, 2.0 * tanh(0.3 * s), -inf)"),
    "no form, rows of equal weights": spec("where(n <= m - 3, 2.0 * tanh(0.3 * s), -1000000000.0)"),
    "sink": spec("where(n <= m - 3, 0.3 * s, -inf)", "float32[h]", sink="t0"),
    "sink, finite fill": spec(f"where(n <= m - 3, 0.3 * s, {MIN})", "float32[h]", sink="t0"),
    "sink of a half type": spec(f"0.3 * s + where(n <= m, 0.0, {HALF_MIN})", "bfloat16[h]", sink="t0"),
    "sink of each row": spec("0.3 * s", "float32[b0,h,m]", sink="2.0 * t0"),
    "reads the score twice": spec("where(s > 0, s, 0.1 * s) + 0.01 * m", "float32[h]"),
    "weights squared": spec("0.3 * s", "float32[h]", weight="p * p * t0"),
    "dropout": spec("0.3 * s", dropout=0.4),
    "empty rows zero": spec("where(n <= m - 3, 0.3 * s, -inf)", empty_rows="zero"),
    "empty rows zero, padding": spec("where((n <= m) & t0, 0.3 * s, -inf)", "bool[b0,n]", empty_rows="zero"),
    "empty rows zero, sink": spec(
        "where(n <= m - 3, 0.3 * s, -inf)", "float32[h]", sink="where(h < 2, t0, -inf)", empty_rows="zero"
    ),
    "empty rows zero, none empty": spec("0.3 * s", empty_rows="zero"),
    "empty rows zero, bias": spec("0.3 * s + where(t1, t0, -inf)", "float32[h,m,n]", "bool[b0,m]", empty_rows="zero"),
    "exact scores": spec("where(n <= m, 0.3 * s, -inf)", exact_scores=True),
    "linear": spec("s", normaliser="none"),
    "linear, causal": spec("where(n <= m, 0.3 * s, 0.0)", normaliser="none"),
    "linear, causal, decay": spec("where(n <= m, 0.3 * s * 0.9 ** (m - n), 0.0)", normaliser="none"),
    "sigmoid": spec("sigmoid(0.3 * s - 2.0)", normaliser="none"),
    "sigmoid, window": spec(
        "where((n <= m) & (n >= m - 5), sigmoid(0.3 * s + t0), 0.0)", "float32[h,m,n]", normaliser="none"
    ),
    "squared relu, padding": spec(
        "where(t0, relu(0.3 * s) * relu(0.3 * s), 0.0)", "bool[b0,n]", normaliser="none", dropout=0.3
    ),
    "linear, filled with one": spec("where(n <= m - 3, 0.3 * s, 1.0)", normaliser="none"),
    "everything": spec(
        f"where((n <= m) & t0, 5.0 * tanh(0.3 * s / 5.0) + t1 * (n - m), {MIN})",
        "bool[b0,n]", "float32[h]", "float32[h]", sink="t2", weight="max(p - 0.01, 0.0)", dropout=0.2,
    ),
}  # fmt: skip


#: What is computed by kernels that know neither weights without a softmax nor rows that are zero where they are empty.
COMMON = {name: spec for name, spec in SPECS.items() if spec.normaliser == "softmax" and spec.empty_rows == "nan"}


@dataclass(frozen=True)
class Sizes:
    """The sizes of one call; ``batch`` may have no, one or two dimensions."""

    batch: tuple[int, ...] = (2,)
    heads: int = 4
    kv_heads: int = 4
    rows: int = 19
    keys: int = 23
    width: int = 8
    value_width: int = 8


SIZES = {
    "odd": Sizes(),
    "grouped heads": Sizes(heads=6, kv_heads=2, rows=31, keys=31),
    "one key head, narrow value": Sizes(heads=3, kv_heads=1, rows=7, keys=40, value_width=5),
    "more rows than keys": Sizes(batch=(1,), rows=41, keys=13),
    "one row": Sizes(batch=(3,), heads=4, kv_heads=2, rows=1, keys=29),
    "one key": Sizes(rows=5, keys=1),
    "several blocks": Sizes(batch=(1,), heads=2, kv_heads=1, rows=301, keys=307, width=16, value_width=16),
}
BATCHES = {
    "no batch": Sizes(batch=(), rows=11, keys=11),
    "two batches": Sizes(batch=(2, 3), heads=2, kv_heads=1, rows=9),
}


@dataclass(frozen=True)
class Case:
    """Operands of one call; ``captures`` ends with the seed where the spec drops out."""

    spec: AttentionSpec
    query: Tensor
    key: Tensor
    value: Tensor
    captures: tuple[Tensor, ...]

    @property
    def operands(self) -> Operands:
        return Operands(self.query, self.key, self.value, self.captures)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.operands.tensors

    def to(self, dtype: torch.dtype) -> Case:
        """The same values; only what is float changes."""
        cast = [x.detach().to(dtype) if x.is_floating_point() else x for x in self.tensors]
        return Case(self.spec, *cast[:3], tuple(cast[3:]))

    def transposed(self) -> Case:
        """The same values, query, key and value stored as ``[*B, H, D, M]``."""
        stored = (x.mT.contiguous().mT for x in (self.query, self.key, self.value))
        return Case(self.spec, *stored, self.captures)

    def leaves(self) -> Case:
        """The same values, each float asking for its gradient."""
        fresh = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in self.tensors]
        return Case(self.spec, *fresh[:3], tuple(fresh[3:]))

    def problem(self) -> Problem:
        described = [Operand(tuple(x.shape), x.dtype, x.requires_grad) for x in self.tensors]
        captures = tuple(described[3 : 3 + len(self.spec.captures)])
        kept = rows_kept(self.spec, self.query.shape[-2], self.key.shape[-2])
        return Problem(self.spec, *described[:3], captures, rows_kept=kept)


def case(of: AttentionSpec, sizes: Sizes, dtype: torch.dtype, seed: int = 0) -> Case:
    """Random operands; queries and keys lie in memory as a model's projections leave them."""
    of = replace(of, batch=len(sizes.batch))
    generator = torch.Generator().manual_seed(seed)

    def projected(heads: int, length: int, width: int) -> Tensor:
        shape = (*sizes.batch, length, heads, width)
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).transpose(-3, -2)

    captures = [_captured(c, of, sizes, dtype, generator) for c in of.captures]
    if of.dropout:
        captures.append(torch.tensor([1234567 + seed]))
    query = projected(sizes.heads, sizes.rows, sizes.width)
    key = projected(sizes.kv_heads, sizes.keys, sizes.width)
    return Case(of, query, key, projected(sizes.kv_heads, sizes.keys, sizes.value_width), tuple(captures))


def _captured(
    captured: Captured, of: AttentionSpec, sizes: Sizes, dtype: torch.dtype, generator: torch.Generator
) -> Tensor:
    extent = dict(zip(of.axes, (*sizes.batch, sizes.heads, sizes.rows, sizes.keys), strict=True))
    shape = [extent[axis] if axis in captured.axes else 1 for axis in of.axes]
    match captured.dtype:
        case "bool":
            return torch.rand(shape, generator=generator) > 0.3
        case "int64":
            return torch.randint(0, 3, shape, generator=generator)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


def exact(given: Case) -> Tensor:
    """The output in float64."""
    wide = given.to(torch.float64)
    return attention(wide.spec, wide.operands)[0]


def written_out(given: Case) -> Tensor:
    """The output as a careful user writes it: products in the operands' type, softmax in float32."""
    of, query, heads = given.spec, given.query, given.query.shape[-3]
    scope = Scope.whole(given.operands)
    score = (query @ repeat_heads(given.key, heads).transpose(-1, -2)).to(compute_dtype(query.dtype))
    logit = evaluate(of.score, replace(scope, score=score)).expand(score.shape)
    if of.sink is not None:
        logit = torch.cat([logit, evaluate(of.sink, scope).expand(*logit.shape[:-1], 1)], dim=-1)
    weight = logit
    if of.normaliser == "softmax":
        weight = torch.softmax(logit, dim=-1)[..., : score.shape[-1]]
    if of.empty_rows == "zero":
        weight = weight.masked_fill(logit.isneginf().all(dim=-1, keepdim=True), 0.0)
    if of.weight != P:
        weight = evaluate(of.weight, replace(scope, weight=weight))
    return weight.to(given.value.dtype) @ repeat_heads(given.value, heads)


def conditioning(given: Case) -> float:
    """By how many roundings of a weight its logit may be off: as many as the largest finite logit is great."""
    wide = given.to(torch.float64)
    scope = Scope.whole(wide.operands)
    score = wide.query @ repeat_heads(wide.key, wide.query.shape[-3]).transpose(-1, -2)
    logit = evaluate(wide.spec.score, replace(scope, score=score)).abs()
    finite = logit[logit < 1e6]
    return finite.amax().item() if finite.numel() else 0.0


def cancelling(given: Case, grad_out: Tensor) -> list[Tensor]:
    """By operand that is a float, how large the terms are that cancel in each number of its gradient; in float64.

    A logit's gradient is ``p * (dp - delta)``, two sums of products of the output's gradient, by value and by output.
    They are float32's, and alike where a row has one key: what is left is their roundings, times key, query or what a
    capture is multiplied by.
    """
    if given.spec.normaliser != "softmax" or given.spec.weight != P:
        return [x.new_zeros((), dtype=torch.float64) for x in given.tensors if x.is_floating_point()]
    wide, heads = given.to(torch.float64).leaves(), given.query.shape[-3]
    captures = [x for x in wide.captures if x.requires_grad]
    scope = Scope.whole(wide.operands)
    key, value = (repeat_heads(x.detach(), heads) for x in (wide.key, wide.value))
    score = (wide.query.detach() @ key.mT).requires_grad_()
    logit = evaluate(wide.spec.score, replace(scope, score=score)).expand(score.shape)
    (slope,) = torch.autograd.grad(logit.sum(), score, retain_graph=True)
    with torch.no_grad():
        out, lse = attention(wide.spec, wide.operands)
        weight = torch.exp(logit - lse[..., None]).nan_to_num()
        grad = grad_out.double().abs()
        of_logit = weight * (grad @ value.abs().mT + (grad * out.abs()).sum(-1, keepdim=True)).nan_to_num()
        terms = of_logit * slope.abs()
        of_key = (terms.mT @ wide.query.abs()).unflatten(-3, (given.key.shape[-3], -1)).sum(-3)
    of_captures = torch.autograd.grad(logit, captures, of_logit, materialize_grads=True) if captures else ()
    return [terms @ key.abs(), of_key, torch.zeros_like(value[..., :1, :1]), *(x.abs() for x in of_captures)]


def assert_as_exact(
    found: Sequence[Tensor],
    source: Sequence[Tensor],
    truth: Sequence[Tensor],
    roundings: float = 4.0,
    cancelled: Sequence[Tensor] | None = None,
) -> None:
    """NaN at the same positions; errors against ``truth`` at most twice those of ``source``, plus ``roundings``.

    Behind float64 there is no more exact type: truth has rounding errors of its own, of sums over the keys, which
    count as 64 ``roundings`` more. Where terms as large as ``cancelled`` cancel, so many roundings of float32 are left:
    of sums of 128 products, which tensor cores add in steps of 16.
    """
    cancelled = cancelled or [torch.zeros((), dtype=torch.float64)] * len(found)
    for mine, theirs, true, terms in zip(found, source, truth, cancelled, strict=True):
        assert mine.shape == true.shape
        assert torch.equal(mine.isnan(), true.isnan()), "NaN at other positions"
        size = true.nan_to_num().abs().amax().item() if true.numel() else 0.0
        floor = (roundings + 64.0 * (mine.dtype == torch.float64)) * torch.finfo(mine.dtype).eps * size
        errors = [(x.double() - true).nan_to_num().abs() for x in (mine, theirs)]
        for measure in (torch.mean, torch.amax):
            ours, limit, left = (measure(e).item() if e.numel() else 0.0 for e in (*errors, terms))
            least = floor + roundings * torch.finfo(torch.float32).eps * left
            assert ours <= 2 * limit + least, (
                f"{measure.__name__} error {ours:.3g}, source {limit:.3g}, floor {least:.3g}"
            )
