"""What a backward launches: the plans of its kernels and how captures are summed, worked out once for each geometry."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from typing import Literal

from attnfuse.derivative import pullback
from attnfuse.kernels.rows import masking_band, skips_surely
from attnfuse.kernels.schedule import Schedule
from attnfuse.kernels.triton.logit import logit_of
from attnfuse.kernels.triton.memory import Memory
from attnfuse.kernels.triton.plan import BackwardPlan
from attnfuse.kernels.triton.planning import plan_of
from attnfuse.kernels.triton.tables import BackwardSchedules, Shape, backward_schedules
from attnfuse.score import Capture, Const, Expr, S, apply
from attnfuse.spec import AttentionSpec
from attnfuse.target import Target

__all__ = ["MOST_TURNS", "Launches", "Reduction", "backward_plan", "differentiable", "launches_of"]

ZERO = Const(0.0)
#: A captured tensor's gradient is written for each of so many heads at most, and summed afterwards.
MOST_TURNS = 4
Over = Literal["heads", "keys", "rows"]


@dataclass(frozen=True)
class Reduction:
    """How the gradient of one captured tensor is summed within a program: over heads, keys or rows.

    Of ``[outer, turns, apart]`` heads, ``turns`` are summed one after another and ``stays`` are left; ``shape`` is what
    comes out, to be summed to the tensor's own shape.
    """

    over: Over
    stays: int
    turns: int
    apart: int
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Launches:
    """The plans of the sums of rows, of dQ, and of dK and dV; ``values`` is None where one launch does both of these.

    ``captured`` are plan and reduction of each capture that has a launch of its own, by slot; ``rider`` is the slot of
    the one whose gradient dQ's kernel computes on its way, with its reduction.
    """

    sums: BackwardPlan
    rows: BackwardPlan
    keys: BackwardPlan
    values: BackwardPlan | None
    captured: dict[int, tuple[BackwardPlan, Reduction]]
    rider: tuple[int, Reduction] | None = None


@dataclass(frozen=True)
class _Given:
    """Where in memory query, key, value and captures lie, and what else a plan depends on."""

    spec: AttentionSpec
    memories: tuple[Memory, ...]
    symbols: tuple[int, ...]
    target: Target
    precision: str

    @property
    def extents(self) -> tuple[int, ...]:
        """Batches, query heads and rows."""
        return self.memories[0].shape[:-1]

    @property
    def keys(self) -> int:
        """The number of keys."""
        return self.memories[1].shape[-2]


@lru_cache(maxsize=4096)
def launches_of(
    spec: AttentionSpec,
    memories: tuple[Memory, ...],
    symbols: tuple[int, ...],
    needs: tuple[bool, ...],
    target: Target,
    precision: str,
    schedules: BackwardSchedules | None = None,
) -> Launches:
    """Of query, key, value and captures in ``memories``; ``schedules`` override the table's."""
    given = _Given(spec, memories, symbols, target, precision)
    chosen = schedules or _tabled(given)
    rows = chosen.rows
    # keys that had to be few leave no room for what is loaded ahead, of both products at once
    stages = rows.stages if rows.keys >= 64 else 1
    small = replace(rows, rows=min(rows.rows, 64), keys=min(rows.keys, 64), warps=4, stages=stages)
    sums = _plan(given, small)
    programs = _captured_programs(sums, needs[3:])
    reductions = {slot: _reduction(spec, slot, given.extents, given.keys) for slot in programs}
    rider = next((slot for slot, each in reductions.items() if needs[0] and _rides(each)), None)
    return Launches(
        sums=sums,
        rows=_plan(given, rows) if rider is None else _plan(given, rows, programs[rider], reductions[rider].over),
        keys=_plan(given, chosen.keys),
        values=None if chosen.values is None else _plan(given, chosen.values),
        captured={
            slot: (_plan(given, _alone(each, rows, small), programs[slot], each.over), each)
            for slot, each in reductions.items()
            if slot != rider
        },
        rider=None if rider is None else (rider, _apart(reductions[rider], given)),
    )


def backward_plan(
    spec: AttentionSpec,
    memories: tuple[Memory, ...],
    symbols: tuple[int, ...],
    schedule: Schedule,
    target: Target,
    precision: str,
) -> BackwardPlan:
    """The programs and facts of a backward for a body with a schedule of its own."""
    return _plan(_Given(spec, memories, symbols, target, precision), schedule)


def _tabled(given: _Given) -> BackwardSchedules:
    query, _, value, *captures = given.memories
    width, value_width = (1 << (x.shape[-1] - 1).bit_length() for x in (query, value))
    banded = not masking_band(given.spec, given.symbols).open
    shape = Shape(width, value_width, query.dtype.itemsize, banded, query.shape[-2])
    pairs = zip(captures, given.spec.captures, strict=False)
    crowd = sum(memory.dtype.itemsize for memory, captured in pairs if {"m", "n"} <= set(captured.axes))
    return backward_schedules(given.target, shape, crowd)


def _plan(given: _Given, schedule: Schedule, captured: Expr | None = None, reduce: str = "") -> BackwardPlan:
    query, key, value, *captures = given.memories
    spec, rows = given.spec, query.shape[-2]
    base = plan_of(spec, query, key, value, tuple(captures), given.symbols, given.target, given.precision, schedule)
    surely = skips_surely(spec, rows, given.keys, given.symbols, training=True)
    return BackwardPlan(
        **{each.name: getattr(base, each.name) for each in fields(base)},
        masked_pulled_program=pullback(base.masked_program).get(S, ZERO),
        core_pulled_program=pullback(base.core_program).get(S, ZERO),
        captured_program=captured,
        even_rows=rows % schedule.rows == 0,
        uncertain=base.huge or not surely,
        reduce=reduce,
        upright=any({"m", "n"} <= set(each.axes) for each in spec.captures),
    )


# --- captured tensors -------------------------------------------------------------------------------


def _captured_programs(plan: BackwardPlan, needs: Sequence[bool]) -> dict[int, Expr]:
    """By slot, from the gradient of a logit to that of each captured tensor that scores read and that needs one."""
    pulled = pullback(plan.masked_program)
    slots = (slot for slot, need in enumerate(needs) if need and Capture(slot) in pulled)
    return {slot: apply("mul", Const(plan.factor), pulled[Capture(slot)]) for slot in slots}


def _reduction(spec: AttentionSpec, slot: int, extents: tuple[int, ...], keys: int) -> Reduction:
    axes, (*leading, rows) = set(spec.captures[slot].axes), extents
    if not {"m", "n"} <= axes:
        if "n" in axes:
            return Reduction("rows", math.prod(leading), 1, 1, (*leading, 1, keys))
        return Reduction("keys", math.prod(leading), 1, 1, (*leading, rows, 1))
    absent = [place for place, name in enumerate(spec.axes[:-2]) if name not in axes]
    # only neighbours are summed within a program
    if absent != list(range(absent[0], absent[-1] + 1) if absent else ()):
        absent = []
    turns = math.prod(leading[place] for place in absent)
    apart = math.prod(leading[absent[-1] + 1 :]) if absent else 1
    stays = (1 if place in absent else extent for place, extent in enumerate(leading))
    return Reduction("heads", math.prod(leading) // turns, turns, apart, (*stays, rows, keys))


def _rides(reduction: Reduction) -> bool:
    """Whether dQ's kernel computes it on the way: it walks keys, and a tensor of a few heads' scores has room."""
    return reduction.over == "keys" or (reduction.over == "heads" and reduction.turns <= MOST_TURNS)


def _apart(reduction: Reduction, given: _Given) -> Reduction:
    """The same where no heads are summed within a program."""
    if reduction.over != "heads":
        return reduction
    heads = math.prod(given.extents[:-1])
    return Reduction("heads", heads, 1, 1, (*given.extents, given.keys))


def _alone(reduction: Reduction, rows: Schedule, small: Schedule) -> Schedule:
    """The schedule of a launch of its own; whole tiles of scores are not pipelined, so they may be large.

    Not where dQ's own tiles had to be small: rows and keys of both products are in shared memory at once.
    """
    if reduction.over != "heads" or min(rows.rows, rows.keys) < 64:
        return small
    return replace(rows, rows=128, keys=64, warps=8, stages=2)


def differentiable(spec: AttentionSpec) -> tuple[Expr, ...]:
    """The programs that a backward runs, for asking whether they have a text."""
    logits = (logit_of(spec), logit_of(spec, rows_kept=True))
    pulled = (pullback(program) for logit in logits for program in (logit.masked, logit.core))
    return tuple(dict.fromkeys(program for each in pulled for program in each.values()))
