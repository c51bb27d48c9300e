"""What a backward launches: whose gradient rides with dQ's, and schedules that have room."""

from __future__ import annotations

import pytest
import torch

from attnfuse.kernels.triton.differentiating import Launches, launches_of
from attnfuse.kernels.triton.memory import Memory
from attnfuse.kernels.triton.tables import Shape, backward_schedules
from attnfuse.target import Target
from tests.kernels.cases import spec

HOPPER = Target.parse("cuda:sm90")
BATCH, HEADS, ROWS, KEYS = 2, 8, 256, 512


def memory(*shape: int) -> Memory:
    strides = torch.empty(shape, device="meta").stride()
    return Memory(tuple(shape), strides, torch.bfloat16, aligned=True)


def launches(score: str, *captures: str, batch: int = BATCH, query: bool = True) -> Launches:
    made = spec(score, *captures)
    extent = dict(zip(made.axes, (batch, HEADS, ROWS, KEYS), strict=True))
    captured = [memory(*(extent[axis] if axis in each.axes else 1 for axis in made.axes)) for each in made.captures]
    operands = (memory(batch, HEADS, ROWS, 64), memory(batch, HEADS, KEYS, 64), memory(batch, HEADS, KEYS, 64))
    needs = (query, True, True, *(True for _ in captured))
    return launches_of(made, (*operands, *captured), (), needs, HOPPER, "ieee")


@pytest.mark.parametrize(
    ("capture", "shape"),
    [
        ("float32[h]", (BATCH, HEADS, ROWS, 1)),
        ("float32[h,m]", (BATCH, HEADS, ROWS, 1)),
        ("float32[h,m,n]", (BATCH, HEADS, ROWS, KEYS)),
        ("float32[b0,h,m,n]", (BATCH, HEADS, ROWS, KEYS)),
    ],
)
def test_what_dq_walks_over_rides_along(capture: str, shape: tuple[int, ...]) -> None:
    found = launches("0.3 * s + t0", capture)
    assert found.rider is not None
    assert (found.rider[0], found.rider[1].shape) == (0, shape)
    assert not found.captured
    assert found.rows.captured_program is not None


def test_what_does_not_ride_has_a_launch_of_its_own() -> None:
    along_keys = launches("0.3 * s + t0", "float32[b0,n]")
    assert (along_keys.rider, along_keys.captured[0][1].over) == (None, "rows")
    two = launches("0.3 * s + t0 + t1", "float32[h,m,n]", "float32[h]")
    assert two.rider is not None
    assert (two.rider[0], list(two.captured)) == (0, [1])
    assert list(launches("0.3 * s + t0", "float32[h]", query=False).captured) == [0]


def test_scores_of_many_batches_are_summed_within_a_program() -> None:
    found = launches("0.3 * s + t0", "float32[h,m,n]", batch=16)
    assert found.rider is None
    reduction = found.captured[0][1]
    assert (reduction.stays, reduction.turns, reduction.apart) == (HEADS, 16, HEADS)
    assert reduction.shape == (1, HEADS, ROWS, KEYS)


@pytest.mark.parametrize("target", ["cuda:sm80", "cuda:sm90", "cuda:sm100", "rocm:gfx942", "rocm:gfx950", "xpu:pvc"])
@pytest.mark.parametrize("crowd", [0, 2, 4, 12])
@pytest.mark.parametrize("width", [64, 128, 256, 512])
@pytest.mark.parametrize("itemsize", [2, 4])
def test_tiles_have_room(target: str, crowd: int, width: int, itemsize: int) -> None:
    room = {"cuda:sm80": 163, "cuda:sm90": 227, "cuda:sm100": 227, "rocm:gfx942": 64, "rocm:gfx950": 160}.get(
        target, 128
    )
    chosen = backward_schedules(Target.parse(target), Shape(width, width, itemsize, False, 4096), crowd)
    number = width * itemsize
    # rows keep query and the gradient of out, keys key and value; where values are apart, key alone
    kept = [(chosen.rows, chosen.rows.rows, 2), (chosen.keys, chosen.keys.keys, 2)]
    kept += [] if chosen.values is None else [(chosen.values, chosen.values.keys, 1)]
    for found, stay, operands in kept:
        scores = found.rows * found.keys
        passing = scores // stay
        weights = 2 * scores * itemsize if found is not chosen.rows and crowd else 0
        used = stay * operands * number + weights + found.stages * (passing * 2 * number + scores * crowd)
        assert used <= room << 10 or scores <= 16 * 16
