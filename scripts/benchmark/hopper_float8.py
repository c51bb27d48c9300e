"""The Gluon kernel on float8 beside the Triton kernel on a Hopper GPU: as :mod:`benchmark.hopper` has the half types.

Operands are normal numbers rounded to e4m3, value transposed, weights rounded, the output bfloat16. Errors are against
float64 on the rounded operands. Reached by ``python scripts/bench.py --hopper``.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import torch
from torch import Tensor

from attnfuse.kernels import lookup
from benchmark.hopper import Case, Row, _captures, _error, _spec, _times, _true

__all__ = ["float8_rows"]

DTYPE = torch.float8_e4m3fn
#: What issue 6 asks for is 900 TFLOP/s, 800 behind a causal mask; Triton's kernel had 824 and 753 of this shape.
SHAPE, TARGET, TARGET_CAUSAL = (8, 16, 8192, 128), 900 / 824, 800 / 753
OTHERS = ((4, 16, 4096, 128), (1, 32, 16384, 128), (4, 32, 4096, 64))


def float8_rows(only: str = "") -> list[Row]:
    """Every case whose name, width or length contains ``only``; needs a Hopper GPU and Triton."""
    cases = [case for case in _cases() if not only or only in f"{case.name} {case.shape}"]
    with ProcessPoolExecutor(mp_context=get_context("spawn")) as pool:
        list(pool.map(_build, cases))
    return [_measured(case) for case in cases]


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
    spec = replace(_spec(score, *captures), weight_dtype="float8_e4m3fn", out_dtype="bfloat16")
    return Case(name, shape, spec, "triton", target, causal)


def _build(case: Case) -> None:
    from attnfuse.kernels.gluon.build import build  # noqa: PLC0415 - Triton is imported where it runs
    from attnfuse.kernels.gluon.plan import sourced  # noqa: PLC0415

    operand = torch.empty(case.shape, dtype=DTYPE, device="meta")
    tensors = (operand, operand, operand, *_captures(case, "meta"))
    build(sourced(case.spec, tuple((x.shape, x.stride(), x.dtype) for x in tensors), (), with_lse=False)[0])


def _measured(case: Case) -> Row:
    torch.manual_seed(0)
    query, key, value = (torch.randn(case.shape, device="cuda").to(DTYPE) for _ in range(3))
    value = value.mT.contiguous().mT
    captures = [x.abs() for x in _captures(case, "cuda")]

    def run_by(name: str) -> Tensor:
        return lookup(name).run(case.spec, query, key, value, captures, ())

    true = _true(case, query, key, value, captures)
    names = ("triton", "gluon")
    errors = [_error(run_by(name)[:1, :1], true) for name in names]
    peer_ms, ours_ms = _times([lambda: run_by("triton"), lambda: run_by("gluon")])
    peer_speed, our_speed = (case.flops / ms / 1e9 for ms in (peer_ms, ours_ms))
    case_name = f"{case.name} {case.shape}"
    ratio = peer_ms / ours_ms
    return Row(case_name, case.peer, peer_ms, ours_ms, peer_speed, our_speed, ratio, case.target, *errors)
