"""Float8 on a Hopper GPU: as exact against float64 as the reference, which rounds weights as the spec lets it."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attnfuse.kernels import lookup
from attnfuse.reference import attention as reference
from attnfuse.spec import AttentionSpec
from attnfuse.target import Target
from tests.kernels.cases import MIN, Case, Sizes, assert_as_exact, case, exact, spec

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="no Hopper GPU"
    ),
]

SPECS = {
    "scaled": spec("0.3 * s"),
    "scale of each head": spec("0.3 * (t0 * s)", "float32[h]", "float32[h]", weight="t1 * p"),
    "scale of each token": spec("0.3 * (t0 * (t1 * s))", "float32[b0,h,m]", "float32[b0,h,n]", weight="0.5 * p"),
    "factor of each row": spec("0.3 * s", "float32[b0,h,m]", weight="t0 * p"),
    "causal": spec("where(n <= m, 0.3 * s, -inf)", weight="448.0 * p"),
    "causal, rows without keys": spec("where(n <= m - 3, 0.3 * s, -inf)"),
    "causal, rows of equal weights": spec(f"where(n <= m - 3, 0.3 * s, {MIN})"),
    "window": spec("where((n <= m) & (n >= m - 70), 0.3 * s, -inf)"),
    "softcap": spec("5.0 * tanh(0.3 * s / 5.0)"),
    "alibi": spec("where(n <= m, 0.3 * s + t0 * (n - m), -inf)", "float32[h]"),
    "bias": spec("0.3 * s + t0", "bfloat16[h,m,n]"),
    "padding": spec("where(t0, 0.3 * s, -inf)", "bool[b0,n]"),
    "documents": spec("where(t0 == t1, 0.3 * s, -inf)", "int64[b0,m]", "int64[b0,n]"),
    "sink": spec("where(n <= m, 0.3 * s, -inf)", "float32[h]", sink="t0"),
}
SIZES = {
    "odd": Sizes((2,), 4, 2, 261, 333, 64, 64),
    "wide": Sizes((1,), 4, 4, 300, 512, 128, 128),
    "wide, odd": Sizes((2,), 4, 1, 700, 701, 128, 128),
    "64 and 128": Sizes((2,), 2, 1, 130, 260, 64, 128),
    "96 and 80": Sizes((1,), 2, 2, 140, 200, 96, 80),
    "one row": Sizes((2,), 8, 4, 1, 1008, 128, 128),
    "lists": Sizes((2,), 2, 2, 1030, 1100, 128, 128),
    "long": Sizes((1,), 2, 2, 256, 8192, 128, 128),
}


def of(name: str, dtype: str) -> AttentionSpec:
    return replace(SPECS[name], out_dtype="bfloat16", weight_dtype=dtype)


def on_gpu(given: Case, dtype: torch.dtype, minor: str) -> Case:
    query, key, value = (x.to("cuda", dtype) for x in given.tensors[:3])
    value = value.mT.contiguous().mT if minor == "n" else value
    return replace(given, query=query, key=key, value=value, captures=tuple(x.cuda() for x in given.captures))


@pytest.mark.parametrize("sizes", ["odd", "wide", "wide, odd", "lists"])
@pytest.mark.parametrize("name", SPECS)
def test_every_spec(name: str, sizes: str) -> None:
    check(on_gpu(case(of(name, "float8_e4m3fn"), SIZES[sizes], torch.float32), torch.float8_e4m3fn, "n"))


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "float8_e5m2"])
@pytest.mark.parametrize("minor", ["d", "n"])
@pytest.mark.parametrize("sizes", SIZES)
def test_every_size(sizes: str, minor: str, dtype: str) -> None:
    check(on_gpu(case(of("scale of each head", dtype), SIZES[sizes], torch.float32), getattr(torch, dtype), minor))


def test_sums_of_many_values_of_one_sign() -> None:
    """Matrix units that summed all of them would lose a seventh."""
    given = case(of("scale of each head", "float8_e4m3fn"), SIZES["long"], torch.float32)
    check(on_gpu(replace(given, value=given.value.abs() + 1), torch.float8_e4m3fn, "n"))


@pytest.mark.parametrize("mask", [None, "n <= m + {offset}", "(n <= m + {offset}) & (n >= m + {offset} - 200)"])
def test_every_number_of_tiles(mask: str | None) -> None:
    """From none to five, whole and cut."""
    for rows in (1, 64, 129, 256, 640):
        for keys in (4, 64, 128, 250, 256, 384, 640):
            score = "0.1 * s" if mask is None else f"where({mask.format(offset=keys - rows)}, 0.1 * s, -inf)"
            of = spec(score, out_dtype="bfloat16", weight_dtype="float8_e4m3fn")
            given = case(of, Sizes((1,), 2, 1, rows, keys, 128, 128), torch.float32)
            check(on_gpu(given, torch.float8_e4m3fn, "n"))


def check(given: Case) -> None:
    assert lookup("gluon").reasons_against(given.problem(), Target.parse("cuda:sm90")) == ()
    out, lse = lookup("gluon").run_with_lse(given.spec, given.operands)
    source, true_lse = reference(given.spec, given.operands)
    assert out.dtype == torch.bfloat16
    # where the reference rounds once, a tile rounds weights, sums and the result, to bfloat16 at the finest
    assert_as_exact([out], [source], [exact(given)], 8.0)
    torch.testing.assert_close(lse, true_lse, rtol=5e-3, atol=5e-3, equal_nan=True)
