"""The body that writes weights, at small sizes; see :mod:`tests.kernels.triton.interpreted`."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from attnfuse.kernels.schedule import Schedule
from attnfuse.kernels.triton.weighing import weights
from tests.kernels.cases import COMMON, Sizes, assert_as_exact, case
from tests.kernels.test_weights import SOFTMAXES, exact, of_type, written_out
from tests.kernels.triton.interpreted import SMALL, TILE


def check(name: str, sizes: Sizes, schedule: Schedule = TILE, dtype: torch.dtype = torch.float32) -> None:
    given = case(of_type(SOFTMAXES[name], dtype), sizes, dtype)
    found = weights(given.spec, given.operands, schedule)
    # sums are taken tile by tile, each rounding once more
    assert_as_exact([found], [written_out(given, dtype)], [exact(given)], 8.0)


@pytest.mark.parametrize("name", [name for name in COMMON if name not in ("dropout", "weights squared")])
def test_every_spec(name: str) -> None:
    check(name, SMALL)


@pytest.mark.parametrize("name", ["causal", "window, finite fill", "sink"])
@pytest.mark.parametrize(
    "schedule",
    [
        replace(TILE, loading="descriptor"),
        # what another body would overlap, split or order, this one does not
        replace(TILE, algorithm="split keys", splits=3, pipelining="weight-value behind", order="persistent"),
        Schedule(rows=16, keys=64),
    ],
)
def test_every_schedule(name: str, schedule: Schedule) -> None:
    check(name, SMALL, schedule)


@pytest.mark.parametrize(
    "sizes",
    [
        Sizes((), 3, 1, 5, 32, 16, 8),
        Sizes((2, 2), 2, 1, 17, 20, 24, 8),
        # query heads that the forward would put into one tile
        Sizes((2,), 6, 2, 3, 40, 8, 8),
    ],
)
def test_every_size(sizes: Sizes) -> None:
    for name in ("causal, rows without keys", "alibi"):
        check(name, sizes)


def test_a_half_type() -> None:
    check("causal", SMALL, dtype=torch.float16)
