"""The forward on float8 operands and with weight programs, as :mod:`tests.kernels.triton.interpreted` has the others.

The interpreter rounds to float8 wrongly, without saying so, so no weights are rounded here.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attnfuse.kernels.schedule import Schedule
from attnfuse.kernels.triton.launch import attend
from attnfuse.reference import attention as reference
from tests.kernels.cases import Sizes, assert_as_exact, case, exact, spec

TILE = Schedule(rows=32, keys=32)
SMALL = Sizes((1,), 2, 1, 37, 70, 32, 32)
E4M3, HALF = torch.float8_e4m3fn, torch.float16
OUT = {"out_dtype": "float16"}
SPECS = {
    "scale of each head": spec("0.3 * t0 * s", "float32[h]", "float32[h]", weight="t1 * p", **OUT),
    "scales of each batch and head": spec("0.3 * (t0 * t1 * s)", *["float32[b0,h]"] * 3, weight="t2 * p", **OUT),
    "scale of each key": spec("0.3 * t0 * s", "float32[b0,h,n]", "float32[b0,h,n]", weight="t1 * p", **OUT),
    "scale of each row": spec("where(n <= m, 0.3 * t0 * s, -inf)", "float32[b0,h,m]", weight="448.0 * p", **OUT),
    "sink": spec("0.3 * s", "float32[h]", sink="t0", weight="2.0 * p", **OUT),
}
MIXED = {"every operand": (E4M3, E4M3, E4M3), "a cache": (HALF, E4M3, E4M3), "none": (HALF, HALF, HALF)}
SCHEDULES = {
    "plain": TILE,
    "descriptors": replace(TILE, loading="descriptor"),
    "split keys": replace(TILE, algorithm="split keys", splits=3),
    "keys outside": replace(TILE, algorithm="keys outside"),
    "weight-value behind": replace(TILE, pipelining="weight-value behind"),
}


@pytest.mark.parametrize("name", SPECS)
def test_every_spec(name: str) -> None:
    check(name, "every operand")


@pytest.mark.parametrize("mixed", MIXED)
def test_any_of_the_operands(mixed: str) -> None:
    check("scale of each key", mixed)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule(schedule: str) -> None:
    check("scale of each row", "every operand", schedule)


def test_batches_have_scales_of_their_own() -> None:
    check("scales of each batch and head", "every operand", sizes=replace(SMALL, batch=(2,), rows=17))


def check(name: str, mixed: str, schedule: str = "plain", sizes: Sizes = SMALL) -> None:
    given = case(SPECS[name], sizes, torch.float32)
    operands = [x.to(dtype) for x, dtype in zip(given.tensors[:3], MIXED[mixed], strict=True)]
    if "descriptor" in schedule:
        operands[2] = operands[2].mT.contiguous().mT
    given = replace(given, query=operands[0], key=operands[1], value=operands[2])
    out, lse = attend(given.spec, given.operands, with_lse=True, schedule=SCHEDULES[schedule])
    source, true_lse = reference(given.spec, given.operands)
    assert out.dtype == HALF
    assert_as_exact([out], [source], [exact(given)], 8.0)
    torch.testing.assert_close(lse, true_lse, rtol=1e-3, atol=1e-3)
