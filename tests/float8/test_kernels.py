"""Kernels on float8 operands, as exact against float64 as the written-out program; and what refuses them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch

from attnfuse.kernels import kernels, lookup
from attnfuse.kernels.float8 import product_types, readable
from attnfuse.op import attention
from attnfuse.reference import attention as reference
from attnfuse.reference import is_float8
from attnfuse.spec import FLOAT8, AttentionSpec
from attnfuse.target import Target
from tests.kernels.cases import SIZES, Case, assert_as_exact, case, exact, spec

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
#: What its operands are, and by which weights may be rounded to.
SPECS = {
    "scales": spec("0.3 * t0 * s", "float32[b0,h,m]", "float32[h]", weight="t1 * p", out_dtype="bfloat16"),
    "scale of each key": spec("0.3 * t0 * s", "float32[b0,h,n]", weight="t0 * p", out_dtype="float16"),
    "causal": spec("where(n <= m, 0.3 * s, -inf)", out_dtype="bfloat16"),
    "rounded": spec("0.3 * s", out_dtype="bfloat16", weight_dtype="float8_e4m3fn"),
    "rounded, sink": spec(
        "where(n <= m, 0.3 * s, -inf)", "float32[h]", sink="t0", out_dtype="bfloat16", weight_dtype="float8_e4m3fn"
    ),
    "float32": spec("0.3 * s", out_dtype="float32"),
}


def narrowed(given: Case, dtypes: Mapping[str, torch.dtype]) -> Case:
    """The operands in other dtypes."""
    return replace(given, **{name: getattr(given, name).to(dtype) for name, dtype in dtypes.items()})


EVERY = {"query": E4M3, "key": E4M3, "value": E4M3}
MIXED = {
    "every operand": EVERY,
    "two types": {"query": E5M2, "key": E4M3, "value": E5M2},
    "a cache": {"query": torch.bfloat16, "key": E4M3, "value": E4M3},
    "value alone": {"query": torch.bfloat16, "key": torch.bfloat16, "value": E4M3},
}


@pytest.mark.parametrize("kernel", ["blocked", "direct"])
@pytest.mark.parametrize("mixed", MIXED)
@pytest.mark.parametrize("name", SPECS)
def test_on_the_cpu(name: str, mixed: str, kernel: str) -> None:
    given = narrowed(case(SPECS[name], SIZES["grouped heads"], torch.float32), MIXED[mixed])
    assert lookup(kernel).reasons_against(given.problem(), Target("cpu")) == ()
    out, lse = attention(given.query, given.key, given.value, given.captures, [], given.spec.to_text(), kernel, True)
    source, true_lse = reference(given.spec, given.operands)
    assert out.dtype == getattr(torch, str(given.spec.out_dtype))
    assert_as_exact([out], [source], [exact(given)])
    torch.testing.assert_close(lse, true_lse, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", FLOAT8)
def test_weights_are_rounded_in_units_of_the_largest_of_their_row(dtype: str) -> None:
    """A row of very small weights keeps its relative precision."""
    rounding = replace(AttentionSpec(), weight_dtype=dtype, out_dtype="float32")
    given = case(rounding, replace(SIZES["odd"], keys=4000), torch.float32)
    out, _ = reference(rounding, given.operands)
    true = exact(given)
    error = (out.double() - true).abs().max() / true.abs().max()
    assert 0 < error < torch.finfo(getattr(torch, dtype)).eps


def test_who_reads_float8() -> None:
    problem = narrowed(case(SPECS["causal"], SIZES["odd"], torch.float32), EVERY).problem()
    able = {
        target: {name for name, each in kernels().items() if target.kind in each.devices}
        - {name for name, each in kernels().items() if each.reasons_against(problem, target)}
        for target in (Target("cpu"), Target.parse("cuda:sm90"), Target.parse("cuda:sm80"), Target.parse("rocm:gfx950"))
    }
    assert able[Target("cpu")] == {"blocked", "direct"}
    assert "cudnn" not in able[Target.parse("cuda:sm90")]
    assert able[Target.parse("cuda:sm80")] == set()


def test_the_types_of_products() -> None:
    hopper, ampere = Target.parse("cuda:sm90"), Target.parse("cuda:sm80")
    rounded, every, half = SPECS["rounded"], (E4M3, E4M3, E4M3), torch.bfloat16
    assert product_types(rounded, every, hopper) == (E4M3, E4M3)
    assert product_types(rounded, every, Target.parse("rocm:gfx942")) == (half, half)
    # rows of values that are not turned are widened
    assert product_types(rounded, every, hopper, "d") == (E4M3, half)
    assert product_types(rounded, every, Target.parse("rocm:gfx950"), "d") == (E4M3, E4M3)
    # weights are as exact as the program's, and so are sums
    assert product_types(SPECS["scales"], every, hopper) == (E4M3, half)
    assert product_types(SPECS["float32"], every, hopper) == (half, torch.float32)
    assert product_types(rounded, (torch.float16, E4M3, E4M3), hopper) == (torch.float16, E4M3)
    assert product_types(rounded, (E5M2, E4M3, E5M2), hopper) == (half, half)
    assert product_types(AttentionSpec(), (torch.float32,) * 3, ampere) == (torch.float32, torch.float32)
    assert readable(ampere) == set()


def test_float8_are_the_names_torch_has() -> None:
    assert all(is_float8(getattr(torch, name)) for name in FLOAT8)
    assert not is_float8(torch.bfloat16)
