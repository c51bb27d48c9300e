"""The Gluon kernel on a Hopper GPU beside cuDNN and FlexAttention: speed, ratio and error, one process, random data.

Speeds are medians of ``triton.testing.do_bench`` over rounds in which every peer has its turn, launches included. A
masked score counts no operations: behind a causal mask half of them. Errors are against float64, of one head:
``norm(out - true) / norm(true)``. Reached by ``python scripts/bench.py --hopper``.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from attnfuse.kernels import lookup
from attnfuse.operands import Operands
from attnfuse.reference import attention
from attnfuse.score import parse
from attnfuse.spec import AttentionSpec, Captured
from benchmark.ahead import Prepare

__all__ = [
    "CASES",
    "Case",
    "Row",
    "by_cudnn",
    "by_flex",
    "captures_of",
    "chosen",
    "error_of",
    "hopper",
    "spec_of",
    "times_of",
    "to_compile",
    "truth_of",
]

ROUNDS, WARMUP, REPEAT = 3, 10, 80


@dataclass(frozen=True)
class Case:
    """One attention. ``shape`` is batch, heads, keys, width; ``target`` the least ratio to ``peer`` that is wanted."""

    name: str
    shape: tuple[int, int, int, int]
    spec: AttentionSpec
    peer: str
    target: float
    causal: bool = True

    @property
    def flops(self) -> float:
        batch, heads, keys, width = self.shape
        return 4.0 * batch * heads * keys * keys * width * (0.5 if self.causal else 1.0)


@dataclass(frozen=True)
class Row:
    """What was measured of a case: milliseconds, TFLOP/s, errors."""

    case: str
    peer: str
    peer_ms: float
    ours_ms: float
    peer_tflops: float
    ours_tflops: float
    ratio: float
    target: float
    peer_error: float
    ours_error: float


# --- cases ------------------------------------------------------------------------------------------


def spec_of(score: str, *captures: str, sink: str | None = None) -> AttentionSpec:
    found = tuple(Captured(tuple(c[:-1].split("[")[1].split(",")), c.split("[")[0]) for c in captures)
    return AttentionSpec(parse(score), sink=None if sink is None else parse(sink), captures=found)


def _plain() -> Iterator[Case]:
    shapes = [
        (1.05, (4, 16, 4096, 128)), (1.05, (8, 16, 8192, 128)), (1.05, (1, 32, 16384, 128)),
        (1.15, (4, 32, 4096, 64)), (1.15, (1, 32, 16384, 64)), (1.05, (4, 8, 4096, 256)), (1.05, (1, 16, 16384, 256)),
        (1.0, (16, 8, 512, 128)), (1.0, (8, 16, 1024, 128)),
    ]  # fmt: skip
    for target, shape in shapes:
        scale = shape[3] ** -0.5
        yield Case("full", shape, spec_of(f"{scale} * s"), "cudnn", target, causal=False)
        yield Case("causal", shape, spec_of(f"where(n <= m, {scale} * s, -inf)"), "cudnn", target)


def _programs() -> Iterator[Case]:
    shape, scale = (2, 16, 8192, 128), 128**-0.5
    programs = {
        "softcap": spec_of(f"where(n <= m, 50.0 * tanh({scale} * s / 50.0), -inf)"),
        "alibi": spec_of(f"where(n <= m, {scale} * s + t0 * (n - m), -inf)", "float32[h]"),
        "bias": spec_of(f"where(n <= m, {scale} * s + t0, -inf)", "bfloat16[h,m,n]"),
        "window": spec_of(f"where((n <= m) & (n >= m - 1023), {scale} * s, -inf)"),
        "document": spec_of(f"where((n <= m) & (t0 == t1), {scale} * s, -inf)", "int32[b0,m]", "int32[b0,n]"),
        "sinks": spec_of(f"where(n <= m, {scale} * s, -inf)", "bfloat16[h]", sink="t0"),
    }
    yield Case("causal", shape, spec_of(f"where(n <= m, {scale} * s, -inf)"), "flex", 1.3)
    for name, spec in programs.items():
        yield Case(name, shape, spec, "flex", 1.3)


CASES = (*_plain(), *_programs())
DOCUMENTS = 6


def captures_of(case: Case, device: str) -> list[Tensor]:
    """Random slopes, biases and sinks; documents of equal length."""
    batch, heads, keys, _ = case.shape
    sizes = {"b0": batch, "h": heads, "m": keys, "n": keys}
    found = []
    for captured in case.spec.captures:
        shape = [sizes[axis] if axis in captured.axes else 1 for axis in ("b0", "h", "m", "n")]
        dtype = getattr(torch, captured.dtype)
        if captured.dtype == "int32":
            ids = torch.arange(keys, device=device, dtype=dtype) * DOCUMENTS // keys
            found.append(ids.view([1, 1, *shape[2:]]).expand(shape).contiguous())
        else:
            drawn = (
                torch.rand(shape, device=device) * -0.1 if case.name == "alibi" else torch.randn(shape, device=device)
            )
            found.append(drawn.to(dtype))
    return found


# --- peers ------------------------------------------------------------------------------------------


def by_cudnn(case: Case, query: Tensor, key: Tensor, value: Tensor) -> Callable[[], Tensor]:
    """ATen's call of it."""

    def run() -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return F.scaled_dot_product_attention(query, key, value, is_causal=case.causal)

    return run


def by_flex(case: Case, query: Tensor, key: Tensor, value: Tensor, captures: list[Tensor]) -> Callable[[], Tensor]:
    """FlexAttention as its users write it; sinks by the lse, which it returns."""
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention  # noqa: PLC0415

    def keep(b: Tensor, h: Tensor, m: Tensor, n: Tensor) -> Tensor:
        kept = m >= n
        if case.name == "window":
            kept = kept & (m - n < 1024)
        if case.name == "document":
            kept = kept & (captures[0][b, 0, m, 0] == captures[1][b, 0, 0, n])
        return kept

    def score(s: Tensor, b: Tensor, h: Tensor, m: Tensor, n: Tensor) -> Tensor:
        match case.name:
            case "softcap":
                return 50.0 * torch.tanh(s / 50.0)
            case "alibi":
                return s + captures[0][0, h, 0, 0] * (n - m)
            case "bias":
                return s + captures[0][0, h, m, n]
        return s

    batch, heads, keys, _ = case.shape
    mask = create_block_mask(keep, batch if case.name == "document" else None, None, keys, keys, device="cuda")
    modified = score if case.name in ("softcap", "alibi", "bias") else None
    if case.name != "sinks":
        return lambda: _compiled(flex_attention)(query, key, value, score_mod=modified, block_mask=mask)

    def sunk() -> Tensor:
        out, lse = flex_attention(query, key, value, block_mask=mask, return_lse=True)
        return out * torch.sigmoid(lse - captures[0].view(1, heads, 1)).to(out.dtype)[..., None]

    return _compiled(sunk)


def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False, fullgraph=True)


# --- measuring --------------------------------------------------------------------------------------


def chosen(cases: Sequence[Case], only: str) -> list[Case]:
    """Those whose name, width or length contains ``only``."""
    return [case for case in cases if not only or only in f"{case.name} {case.shape}"]


def hopper(only: str = "") -> Iterator[Row]:
    """The rows of the cases that are chosen; needs a Hopper GPU and Triton."""
    yield from map(_measured, chosen(CASES, only))


def to_compile(only: str = "") -> dict[str, Prepare]:
    """What :func:`benchmark.ahead.compile_ahead` is to compile of them."""
    return {f"{case.name} {case.shape}": partial(_prepared, case) for case in chosen(CASES, only)}


def _operands(case: Case) -> tuple[list[Tensor], list[Tensor]]:
    """Query, key and value; and the captures."""
    torch.manual_seed(0)
    torch.compiler.reset()
    operands = [torch.randn(case.shape, device="cuda", dtype=torch.bfloat16) for _ in range(3)]
    return operands, captures_of(case, "cuda")


def _runs(case: Case, operands: list[Tensor], captures: list[Tensor]) -> tuple[Callable[[], Tensor], ...]:
    """The peer's call and ours."""
    query, key, value = operands
    peer = by_cudnn(case, query, key, value) if case.peer == "cudnn" else by_flex(case, query, key, value, captures)
    return peer, partial(lookup("gluon").run, case.spec, Operands(query, key, value, tuple(captures)))


def _prepared(case: Case) -> Callable[[], object]:
    runs = _runs(case, *_operands(case))
    return lambda: [run() for run in runs]


def _measured(case: Case) -> Row:
    (query, key, value), captures = _operands(case)
    peer, ours = _runs(case, [query, key, value], captures)
    true = truth_of(case, query, key, value, captures)
    errors = [error_of(run()[:1, :1], true) for run in (peer, ours)]
    peer_ms, ours_ms = times_of([peer, ours])
    peer_speed, our_speed = (case.flops / ms / 1e9 for ms in (peer_ms, ours_ms))
    name, ratio = f"{case.name} {case.shape}", peer_ms / ours_ms
    return Row(name, case.peer, peer_ms, ours_ms, peer_speed, our_speed, ratio, case.target, errors[0], errors[1])


def times_of(runs: Sequence[Callable[[], object]]) -> list[float]:
    from triton.testing import do_bench  # noqa: PLC0415

    rounds = [[do_bench(run, warmup=WARMUP, rep=REPEAT, return_mode="median") for run in runs] for _ in range(ROUNDS)]
    return [statistics.median(times) for times in zip(*rounds, strict=True)]


def truth_of(case: Case, query: Tensor, key: Tensor, value: Tensor, captures: list[Tensor]) -> Tensor:
    """The first head of the first batch, in float64."""
    first_query, first_key, first_value = (x[:1, :1].double() for x in (query, key, value))
    cut = tuple(x[:1, :1].double() if x.is_floating_point() else x[:1, :1] for x in captures)
    return attention(case.spec, Operands(first_query, first_key, first_value, cut))[0]


def error_of(found: Tensor, true: Tensor) -> float:
    return float((found.double() - true).norm() / true.norm())
