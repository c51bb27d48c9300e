"""Keys outside: what compilers make of it for devices that are not here, where it is tried, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from attnfuse.errors import BadProgram
from attnfuse.kernels import Operand, Problem, lookup
from attnfuse.kernels.schedule import Schedule
from attnfuse.kernels.triton.memory import Memory
from attnfuse.kernels.triton.planning import plan_of
from attnfuse.target import Target
from tests.kernels.cases import SPECS

if find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

from tests.kernels.triton.offline import Sizes, compiled
from tests.kernels.triton.test_offline import SHARED, products

#: For targets whose tables have none.
SCHEDULES = {
    "cuda:sm80": Schedule("keys outside", rows=64, keys=32, stages=2),
    "cuda:sm90": Schedule("keys outside", rows=64, keys=64, stages=2, loading="descriptor"),
}
AMD = ("rocm:gfx942", "rocm:gfx950")
#: Rows, columns and depth of a matrix instruction; on Hopper of four warps, and with all columns that there are.
INSTRUCTION = {"cuda:sm80": (16, 8, 16), "rocm:gfx942": (16, 16, 16), "rocm:gfx950": (16, 16, 32)}


def problem(width: int = 128, *, heads: int = 8, rows: int = 1024, dtype: torch.dtype = torch.bfloat16) -> Problem:
    key = Operand((1, 2, 1024, width), dtype)
    return Problem(SPECS["causal"], Operand((1, heads, rows, width), dtype), key, key)


def tried(of: Problem, target: str) -> list[Schedule]:
    found = lookup("triton").schedules(of, Target.parse(target))
    return [each for each in found if each.algorithm == "keys outside"]


def multiplying(target: str, schedule: Schedule, width: int) -> int:
    """Matrix instructions of a tile's two products in the code of each warp."""
    if target == "cuda:sm90":
        return schedule.rows // 64 * (width // 16 + schedule.keys // 16)
    rows, columns, depth = INSTRUCTION[target]
    return 2 * schedule.rows * schedule.keys * width // (rows * columns * depth) // schedule.warps


@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("target", [*AMD, *SCHEDULES])
def test_every_loop_multiplies_in_matrix_units_and_nothing_spills(target: str, width: int) -> None:
    schedule = SCHEDULES.get(target) or tried(problem(width), target)[0]
    # of tiles that keep everything; of those on the diagonal too; of those on a window's other edge as well
    for loops, name in enumerate(("scaled", "causal", "window"), 1):
        found = compiled(target, SPECS[name], Sizes(1, 8, 2, 1024, 1024, width, width), schedule)
        assert products(found, target) == loops * multiplying(target, schedule, width)
        assert found.resources()["spills"] == 0
        assert found.shared <= SHARED[target]


@pytest.mark.parametrize("target", AMD)
def test_programs_that_need_registers_spill_nothing_either(target: str) -> None:
    (schedule,) = tried(problem(), target)
    for name in ("sink, finite fill", "dropout", "bias"):
        found = compiled(target, SPECS[name], Sizes(1, 8, 2, 1000, 1000, 128, 128), schedule, with_lse=True)
        assert found.resources()["spills"] == 0


def test_a_tile_of_keys_is_loaded_once_for_every_loop_over_rows() -> None:
    for name in ("scaled", "causal", "window"):
        found = compiled("cuda:sm90", SPECS[name], Sizes(1, 8, 2, 1024, 1024, 128, 128), SCHEDULES["cuda:sm90"])
        assert found.count("ttir", r"tt\.descriptor_load") == 2
        # sums are read by other threads than wrote them: the first, and those of each tile of keys
        assert found.count("ttir", r"(?:gpu|ttg)\.barrier") == 2


def test_it_is_tried_on_amd_where_there_are_rows_to_pass_by() -> None:
    (found,) = tried(problem(), "rocm:gfx942")
    # 304 processors want 38 programs of each of eight heads, but there are 16 tiles of rows
    assert (found.spans, found.order) == (16, "longest first")
    assert [each.spans for each in tried(problem(heads=128), "rocm:gfx942")] == [3]
    for of in (problem(dtype=torch.float32), problem(rows=16), problem(width=256)):
        assert not tried(of, "rocm:gfx942")
    assert not tried(problem(), "cuda:sm90")


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"pipelining": "query-key ahead"}, "leaves nothing to pipeline: 'query-key ahead' must be 'none'"),
        ({"splits": 4}, "rows are split, in spans, and not keys: splits=4 must be 1"),
    ],
)
def test_what_it_cannot_do_is_refused(changed: dict[str, object], reason: str) -> None:
    operand = Memory((1, 2, 64, 32), (4096, 2048, 32, 1), torch.float16, True)
    schedule = replace(Schedule("keys outside"), **changed)
    with pytest.raises(BadProgram, match=reason):
        plan_of(SPECS["causal"], operand, operand, operand, (), (), Target.parse("cuda:sm90"), "ieee", schedule)
