"""On a Hopper GPU: every spec and size that is not refused, as exact as the written-out program."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from attnfuse.kernels import lookup
from attnfuse.op import attention
from attnfuse.operands import Operands
from attnfuse.reference import attention as reference
from attnfuse.score import parse
from attnfuse.spec import AttentionSpec
from attnfuse.target import Target
from tests.kernels.cases import MIN, SIZES, SPECS, Case, Sizes, assert_as_exact, case, exact, spec, written_out
from tests.kernels.gluon.test_random import drawn

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="no Hopper GPU"
    ),
]

WIDE = {
    "64": Sizes(heads=4, kv_heads=2, rows=333, keys=700, width=64, value_width=64),
    "128": Sizes(heads=4, kv_heads=2, rows=700, keys=333, width=128, value_width=128),
    "128, whole tiles": Sizes(batch=(1,), heads=2, kv_heads=2, rows=512, keys=512, width=128, value_width=128),
    "256": Sizes(batch=(1,), heads=2, kv_heads=1, rows=300, keys=301, width=256, value_width=256),
    "192 and 128": Sizes(batch=(1,), heads=2, kv_heads=1, rows=300, keys=301, width=192, value_width=128),
    "96 and 80": Sizes(batch=(2,), heads=2, kv_heads=1, rows=200, keys=129, width=96, value_width=80),
}


#: Sizes in turn in one type and the other: each is a kernel of its own to compile, of every spec.
TRIED = [(sizes, (torch.bfloat16, torch.float16)[place % 2]) for place, sizes in enumerate((*SIZES, *WIDE))]


def run(given: Case, *, with_lse: bool = False) -> tuple[Tensor, Tensor]:
    query, key, value, *captures = (x.cuda() for x in given.tensors)
    out, lse = attention(query, key, value, captures, [], given.spec.to_text(), "gluon", with_lse)
    return out.cpu(), lse.cpu()


@pytest.mark.parametrize(("sizes", "dtype"), TRIED)
@pytest.mark.parametrize("name", SPECS)
def test_as_exact_as_the_written_out_program(name: str, sizes: str, dtype: torch.dtype) -> None:
    given = case(SPECS[name], {**SIZES, **WIDE}[sizes], dtype)
    if lookup("gluon").reasons_against(given.problem(), Target.parse("cuda:sm90")):
        pytest.skip("refused")
    out, _ = run(given)
    assert_as_exact([out], [written_out(given)], [exact(given)])


@pytest.mark.parametrize("name", ["scaled", "causal", "sink", "softcap, causal", "causal, rows without keys"])
def test_lse(name: str) -> None:
    given = case(SPECS[name], WIDE["128"], torch.bfloat16)
    true = given.to(torch.float64)
    _, wanted = reference(true.spec, true.operands)
    # logits are sums of 128 products of halves, exact in float32 to 2^-24 of their size
    torch.testing.assert_close(run(given, with_lse=True)[1], wanted, atol=2e-3, rtol=1e-4, equal_nan=True)


@pytest.mark.parametrize(
    "mask", [None, "n <= m", "n <= m + {offset}", "(n <= m + {offset}) & (n >= m + {offset} - 200)"]
)
@pytest.mark.parametrize("width", [64, 128, 256])
def test_every_number_of_tiles(width: int, mask: str | None) -> None:
    """From none to five, whole and cut: loops of no iteration are where compilers err."""
    for rows in (1, 64, 129, 256, 640):
        for keys in (64, 128, 250, 256, 384, 640):
            score = f"{width**-0.5} * s"
            score = score if mask is None else f"where({mask.format(offset=keys - rows)}, {score}, -inf)"
            spec = AttentionSpec(parse(score))
            query = torch.randn(2, 3, rows, width, device="cuda", dtype=torch.bfloat16)
            key, value = torch.randn(2, 2, 3, keys, width, device="cuda", dtype=torch.bfloat16)
            found = lookup("gluon").run(spec, Operands(query, key, value)).double()
            wanted = reference(spec, Operands(query.double(), key.double(), value.double()))[0]
            assert torch.equal(found.isnan(), wanted.isnan())
            difference = (found - wanted).nan_to_num().norm() / wanted.nan_to_num().norm()
            # weights and output are rounded to bfloat16: 2^-9 each
            assert difference < 2**-8 * math.sqrt(2), (rows, keys)


#: Masks whose tiles are listed before the forward: by ranges, score by score, and where rows may keep nothing.
LISTED = {
    "documents": spec("where((n <= m) & (t0 == t1), 0.1 * s, -inf)", "int32[b0,m]", "int32[b0,n]"),
    "documents and a bias": spec(
        "where(t0 == t1, 0.1 * s + t2, -inf)", "int64[b0,m]", "int64[b0,n]", "bfloat16[h,m,n]"
    ),
    "blocks of each head": spec("where(t0, 0.1 * s, -inf)", "bool[h,m,n]"),
    "blocks, finite fill": spec(f"where(t0, 0.1 * s, {MIN})", "bool[b0,m,n]"),
    "padding, finite fill": spec(f"where((n <= m) & t0, 0.1 * s, {MIN})", "bool[b0,n]"),
    "prefix": spec("where((n <= m) | (n < 200), 0.1 * s, -inf)"),
}


@pytest.mark.parametrize("name", LISTED)
def test_lists_of_tiles(name: str) -> None:
    given = drawn(LISTED[name], Sizes((2,), 4, 2, 1000, 1160, 128, 128), torch.bfloat16, 1)
    true = given.to(torch.float64)
    wanted = reference(given.spec, true.operands)[0]
    out = lookup("gluon").run(given.spec, given.operands)
    assert_as_exact([out], [written_out(given)], [wanted])


def test_any_strides_and_a_shared_batch() -> None:
    given = case(SPECS["causal"], WIDE["128"], torch.bfloat16)
    torch.testing.assert_close(run(given.transposed())[0], run(given)[0], atol=0, rtol=0)
    shared = replace(given, key=given.key[:1], value=given.value[:1])
    spread = replace(given, key=given.key[:1].expand_as(given.key), value=given.value[:1].expand_as(given.value))
    torch.testing.assert_close(run(shared)[0], run(spread)[0], atol=0, rtol=0)


def test_launches_follow_each_other() -> None:
    """The counter of work items is ready for the next launch, whatever its size."""
    spec = SPECS["causal"]
    for rows in (64, 5000, 640, 5000):
        query, key, value = torch.randn(3, 1, 8, rows, 128, device="cuda", dtype=torch.bfloat16)
        first, second = (lookup("gluon").run(spec, Operands(query, key, value)) for _ in range(2))
        assert torch.equal(first, second)
