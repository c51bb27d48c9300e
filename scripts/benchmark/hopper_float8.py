"""The Gluon kernel on float8 beside the Triton kernel on a Hopper GPU: as :mod:`benchmark.hopper` has the half types.

Operands are normal numbers rounded to e4m3, value transposed, weights rounded, the output bfloat16. Errors are against
float64 on the rounded operands. Reached by ``python scripts/bench.py --hopper``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from attnfuse.kernels import lookup
from attnfuse.operands import Operands
from benchmark.ahead import Prepare
from benchmark.hopper import Case, Row, captures_of, chosen, error_of, spec_of, times_of, truth_of

__all__ = ["float8_rows", "float8_to_compile"]

DTYPE = torch.float8_e4m3fn
#: Wanted are 900 TFLOP/s, 800 behind a causal mask, where Triton's kernel had 824 and 753.
SHAPE, TARGET, TARGET_CAUSAL = (8, 16, 8192, 128), 900 / 824, 800 / 753
OTHERS = ((4, 16, 4096, 128), (1, 32, 16384, 128), (4, 32, 4096, 64))


def float8_rows(only: str = "") -> Iterator[Row]:
    """The rows of the cases that are chosen; needs a Hopper GPU and Triton."""
    yield from map(_measured, chosen(tuple(_cases()), only))


def float8_to_compile(only: str = "") -> dict[str, Prepare]:
    """What is to be compiled of them."""
    return {f"{case.name} {case.shape}": partial(_prepared, case) for case in chosen(tuple(_cases()), only)}


def _cases() -> Iterator[Case]:
    for shape in (SHAPE, *OTHERS):
        scale, asked = shape[3] ** -0.5, shape == SHAPE
        full, causal = f"{scale} * s", f"where(n <= m, {scale} * s, -inf)"
        yield _case("float8 full", shape, full, TARGET if asked else 1.0, causal=False)
        yield _case("float8 causal", shape, causal, TARGET_CAUSAL if asked else 1.0)
    scaled = f"where(n <= m, {SHAPE[3] ** -0.5} * (t0 * t1 * s), -inf)"
    yield _case("float8 token scales", SHAPE, scaled, 1.0, "float32[b0,h,m]", "float32[b0,h,n]")


def _case(
    name: str, shape: tuple[int, int, int, int], score: str, target: float, *captures: str, causal: bool = True
) -> Case:
    spec = replace(spec_of(score, *captures), weight_dtype="float8_e4m3fn", out_dtype="bfloat16")
    return Case(name, shape, spec, "triton", target, causal)


def _operands(case: Case) -> list[Tensor]:
    """Query, key, value whose columns are contiguous, and the captures."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(case.shape, device="cuda").to(DTYPE) for _ in range(3))
    return [query, key, value.mT.contiguous().mT, *(x.abs() for x in captures_of(case, "cuda"))]


def _runs(case: Case, operands: list[Tensor]) -> list[Callable[[], Tensor]]:
    """The Triton kernel's call and ours."""
    query, key, value, *captures = operands
    given = Operands(query, key, value, tuple(captures))
    return [partial(lookup(name).run, case.spec, given) for name in ("triton", "gluon")]


def _prepared(case: Case) -> Callable[[], object]:
    runs = _runs(case, _operands(case))
    return lambda: [run() for run in runs]


def _measured(case: Case) -> Row:
    query, key, value, *captures = operands = _operands(case)
    runs = _runs(case, operands)
    true = truth_of(case, query, key, value, captures)
    errors = [error_of(run()[:1, :1], true) for run in runs]
    peer_ms, ours_ms = times_of(runs)
    peer_speed, our_speed = (case.flops / ms / 1e9 for ms in (peer_ms, ours_ms))
    case_name = f"{case.name} {case.shape}"
    ratio = peer_ms / ours_ms
    return Row(case_name, case.peer, peer_ms, ours_ms, peer_speed, our_speed, ratio, case.target, *errors)
