"""Tables of layout prices: shipped for each target, measured ones first, and read by the cost model."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from attnfuse.errors import BadInput
from attnfuse.kernels import Operand, Problem, lookup
from attnfuse.kernels.prices import factor, measured_path, prices_of
from attnfuse.spec import AttentionSpec
from attnfuse.target import Target

SHIPPED = ("cpu", "cuda:sm90", "rocm:gfx942", "rocm:gfx950", "xpu:pvc")
CPU = Target("cpu")


def problem(dtype: torch.dtype, minor: str = "d") -> Problem:
    columns = Operand((1, 2, 256, 64), dtype)
    return Problem(AttentionSpec(), columns, columns, replace(columns, minor=minor))


@pytest.mark.parametrize("name", SHIPPED)
def test_each_target_has_a_table_that_names_its_source(name: str) -> None:
    table = prices_of(Target.parse(name))
    assert table.target == name
    assert len(table.source) > 60
    # a copy that transposes is slower than one that does not
    assert all(table.stream > bandwidth > 0 for bandwidth in table.copy.values())


def test_an_unknown_target_has_the_most_cautious() -> None:
    slowest = min(min(prices_of(Target.parse(name)).copy.values()) for name in SHIPPED if name != "cpu")
    assert max(prices_of(Target.parse("cuda:sm120")).copy.values()) <= slowest


def test_the_figures_of_the_h200() -> None:
    """In float8 a transposed value is worth a copy, and of keys it costs half as much again; in bfloat16 neither."""
    hopper = Target.parse("cuda:sm90")
    rounded = AttentionSpec(weight_dtype="float8_e4m3fn", out_dtype="bfloat16")
    narrow = replace(problem(torch.float8_e4m3fn, "n"), spec=rounded)
    assert factor("triton", narrow, hopper) == pytest.approx(488 / 824, rel=0.01)
    assert factor("triton", replace(narrow, key=replace(narrow.key, minor="n")), hopper) > 0.8
    # weights that may not be rounded are multiplied in bfloat16
    assert factor("triton", replace(narrow, spec=AttentionSpec(out_dtype="bfloat16")), hopper) == 1.0
    assert factor("triton", problem(torch.bfloat16, "n"), hopper) == 1.0
    seconds, elements = 4 * 8 * 16 * 8192**2 * 128 / 824e12, 8 * 16 * 8192 * 128
    assert prices_of(hopper).copy_seconds(elements, torch.float8_e4m3fn) < 0.05 * seconds


def test_sdpa_is_slower_with_rows_contiguous_and_blocked_is_not() -> None:
    seconds = {(name, minor): lookup(name).cost(problem(torch.float32, minor), CPU)
               for name in ("sdpa", "blocked", "direct") for minor in ("d", "n")}  # fmt: skip
    assert seconds["sdpa", "n"] > 1.5 * seconds["sdpa", "d"]
    assert seconds["blocked", "n"] == seconds["blocked", "d"]
    assert seconds["direct", "n"] == seconds["direct", "d"]


def test_what_was_measured_goes_before_what_ships(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prices_of.cache_clear()
    monkeypatch.setenv("ATTNFUSE_CACHE", str(tmp_path))
    mine = replace(prices_of(CPU), stream=123.0)
    measured_path(CPU).write_text(json.dumps(asdict(mine)))
    prices_of.cache_clear()
    assert prices_of(CPU).stream != 123.0  # conftest says that nothing is to depend on the machine
    monkeypatch.delenv("ATTNFUSE_CALIBRATE")
    prices_of.cache_clear()
    assert prices_of(CPU).stream == 123.0
    measured_path(CPU).write_text("{}")
    prices_of.cache_clear()
    with pytest.raises(BadInput, match="is no table of layout prices"):
        prices_of(CPU)
    prices_of.cache_clear()
