"""Every schedule computes every spec: carried out in torch, tile by tile."""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from typing import get_args

import pytest
import torch

from attnfuse.errors import BadProgram
from attnfuse.kernels.schedule import Algorithm, Order, Pipelining, Schedule
from attnfuse.kernels.simulate import Simulation, simulate
from attnfuse.reference import attention as reference
from attnfuse.score import P
from tests.kernels.cases import COMMON, SIZES, SPECS, assert_as_exact, case, exact, written_out

SCHEDULES = [
    Schedule(algorithm=algorithm, order=order, pipelining=pipelining, rows=16, keys=16, splits=3, spans=2)
    for algorithm, order, pipelining in product(get_args(Algorithm), get_args(Order), get_args(Pipelining))
]


@pytest.mark.parametrize("name", [name for name, spec in COMMON.items() if spec.weight == P])
def test_every_schedule_computes_every_spec(name: str) -> None:
    given = case(SPECS[name], replace(SIZES["grouped heads"], batch=(1,), keys=50), torch.float32)
    true = exact(given)
    source = written_out(given)
    if given.spec.dropout:
        source = reference(given.spec, given.operands)[0]
    for schedule in SCHEDULES:
        out = simulate(given.spec, given.operands, schedule)
        assert_as_exact([out], [source], [true], 8.0)


def test_more_splits_than_tiles_leave_empty_ones_that_weigh_nothing() -> None:
    given = case(SPECS["causal"], SIZES["odd"], torch.float32)
    schedule = Schedule(algorithm="split keys", rows=16, keys=16, splits=9)
    out = simulate(given.spec, given.operands, schedule)
    assert_as_exact([out], [written_out(given)], [exact(given)], 8.0)


def test_half_types() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        given = case(SPECS["softcap, causal"], SIZES["several blocks"], dtype)
        out = simulate(given.spec, given.operands, Schedule(rows=64, keys=32))
        assert_as_exact([out], [written_out(given)], [exact(given)])


def test_tiles_outside_of_the_band_are_not_visited() -> None:
    given = case(SPECS["window"], replace(SIZES["odd"], rows=64, keys=64), torch.float32)
    simulation = Simulation(given.spec, given.operands, Schedule(rows=16, keys=16))
    assert {rows[0]: [keys[0] for keys in simulation.tiles_of_keys(rows)] for rows in simulation.tiles_of_rows()} == {
        0: [0], 16: [0, 16], 32: [16, 32], 48: [32, 48],
    }  # fmt: skip


def test_the_longest_tiles_start_first() -> None:
    given = case(SPECS["causal"], replace(SIZES["odd"], rows=40, keys=40), torch.float32)
    simulation = Simulation(given.spec, given.operands, Schedule(rows=16, keys=16, order="longest first"))
    lengths = [len(simulation.tiles_of_keys(rows)) for rows in simulation.tiles_of_rows()]
    assert lengths == sorted(lengths, reverse=True)


def test_a_weight_program_is_refused() -> None:
    given = case(SPECS["weights squared"], SIZES["odd"], torch.float32)
    with pytest.raises(BadProgram, match="has no weights for the program 'p \\* p \\* t0'"):
        simulate(given.spec, given.operands, Schedule())


def test_a_schedule_says_its_steps() -> None:
    steps = list(
        Schedule(rows=128, keys=64, order="longest first", stages=3, registers=168).with_knobs(kpack=2).steps()
    )
    assert steps == [
        "tile batch and heads: one of each a program",
        "tile rows by 128, outside; loop over keys by 64 with an online softmax",
        "distribute tiles of rows: longest first",
        "pipeline the loop: none; loads 3 deep, by pointer",
        "lay out over 4 warps, at most 168 registers a thread, kpack=2",
    ]
    assert list(Schedule("keys outside", rows=128, keys=64, spans=3, loading="descriptor").steps()) == [
        "tile batch and heads: one of each a program",
        "split rows in 3, a span a program; distribute spans: plain",
        "loop over keys by 64, outside; load each tile of key and value once, by descriptor",
        "tile rows by 128; read and write their sums again for each tile of keys",
        "pipeline the loop over rows: none; loads 2 deep, by pointer",
        "lay out over 4 warps",
    ]
