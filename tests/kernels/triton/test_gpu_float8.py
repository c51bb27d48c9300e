"""Float8 on a GPU: as exact against float64 as the reference, which rounds weights as the spec lets it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attnfuse.kernels.triton.launch import attend
from attnfuse.reference import attention as reference
from attnfuse.spec import AttentionSpec
from tests.kernels.cases import Case, Sizes, assert_as_exact, case, exact, spec

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]

SPECS = {
    "scale of each head": spec("0.3 * (t0 * s)", "float32[h]", "float32[h]", weight="t1 * p", out_dtype="bfloat16"),
    "scales of each batch and head": spec("0.3 * (t0 * t1 * s)", *["float32[b0,h]"] * 3, weight="t2 * p"),
    "scale of each key": spec("0.3 * (t0 * s)", "float32[b0,h,n]", "float32[b0,h,n]", weight="t1 * p"),
    "causal": spec("where(n <= m, 0.3 * s, -inf)", weight="448.0 * p"),
    "sink": spec("where(n <= m, 0.3 * s, -inf)", "float32[h]", sink="t0"),
}
SIZES = {
    "odd": Sizes((2,), 4, 2, 261, 333, 64, 64),
    "wide": Sizes((1,), 4, 4, 300, 512, 128, 128),
    "wider": Sizes((1,), 2, 1, 256, 512, 256, 256),
    "narrow": Sizes((1,), 2, 1, 256, 512, 32, 32),
    "one row": Sizes((2,), 32, 4, 1, 1008, 128, 128),
    "long": Sizes((1,), 2, 2, 256, 8192, 128, 128),
}


def of(name: str, dtype: str, *, rounded: bool) -> AttentionSpec:
    return replace(SPECS[name], out_dtype="bfloat16", weight_dtype=dtype if rounded else None)


def on_gpu(given: Case, query: torch.dtype, others: torch.dtype, minor: str) -> Case:
    query_, key, value = (
        x.to("cuda", dtype) for x, dtype in zip(given.tensors[:3], (query, others, others), strict=True)
    )
    value = value.mT.contiguous().mT if minor == "n" else value
    return replace(given, query=query_, key=key, value=value, captures=tuple(x.cuda() for x in given.captures))


@pytest.mark.parametrize("minor", ["d", "n"])
@pytest.mark.parametrize("name", SPECS)
def test_every_spec(name: str, minor: str) -> None:
    for rounded in (True, False):
        given = case(of(name, "float8_e4m3fn", rounded=rounded), SIZES["odd"], torch.float32)
        check(on_gpu(given, torch.float8_e4m3fn, torch.float8_e4m3fn, minor))


@pytest.mark.parametrize("minor", ["d", "n"])
@pytest.mark.parametrize("sizes", SIZES)
def test_every_size(sizes: str, minor: str) -> None:
    for dtype in ("float8_e4m3fn", "float8_e5m2"):
        given = case(of("scale of each head", dtype, rounded=True), SIZES[sizes], torch.float32)
        check(on_gpu(given, getattr(torch, dtype), getattr(torch, dtype), minor))


def test_sums_of_many_values_of_one_sign() -> None:
    """Matrix units that summed all of them would lose a seventh."""
    given = case(of("scale of each head", "float8_e4m3fn", rounded=True), SIZES["long"], torch.float32)
    given = replace(given, value=given.value.abs() + 1)
    check(on_gpu(given, torch.float8_e4m3fn, torch.float8_e4m3fn, "n"))


@pytest.mark.parametrize("sizes", ["odd", "one row"])
def test_a_cache(sizes: str) -> None:
    for name in SPECS:
        given = case(of(name, "float8_e4m3fn", rounded=False), SIZES[sizes], torch.float32)
        check(on_gpu(given, torch.bfloat16, torch.float8_e4m3fn, "d"))


def check(given: Case) -> None:
    out, lse = attend(given.spec, given.operands, with_lse=True)
    source, true_lse = reference(given.spec, given.operands)
    # where the reference rounds once, a tile rounds weights, sums and the result, to bfloat16 at the finest
    assert_as_exact([out], [source], [exact(given)], 8.0)
    torch.testing.assert_close(lse, true_lse, rtol=5e-3, atol=5e-3)
