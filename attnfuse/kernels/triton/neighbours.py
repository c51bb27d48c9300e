"""Schedules near the one that a target's table has, for ``attnfuse tune`` to measure on the device that is there."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from attnfuse.kernels.problem import Problem
from attnfuse.kernels.schedule import Schedule
from attnfuse.kernels.triton.planning import filled, shape_of, shipped
from attnfuse.kernels.triton.tables import keys_outside_for
from attnfuse.target import Target

__all__ = ["neighbours"]

#: Sides of a tile, warps and stages that are tried at all.
SMALLEST, LARGEST, MOST_WARPS, MOST_STAGES = 16, 256, 8, 4


def neighbours(problem: Problem, target: Target) -> tuple[Schedule, ...]:
    """The table's schedule, those that differ from it in one choice, or in rows and warps, and keys outside."""
    spec, query, key, value, symbols = problem.spec, problem.query, problem.key, problem.value, problem.symbols
    base = shipped(spec, query, key, value, symbols, target)
    outside = keys_outside_for(target, shape_of(spec, query, key, value, symbols, target))
    near = (filled(each, spec, query, key, symbols, target) for each in (base, *_steps(base), outside) if each)
    return tuple(dict.fromkeys(near))


def _steps(base: Schedule) -> Iterator[Schedule]:
    warps = base.warps // 2 if base.warps >= MOST_WARPS else base.warps * 2
    for rows in (base.rows // 2, base.rows, base.rows * 2):
        if SMALLEST <= rows <= LARGEST:
            yield replace(base, rows=rows)
            yield replace(base, rows=rows, warps=warps)
    for keys in (base.keys // 2, base.keys * 2):
        if SMALLEST <= keys <= LARGEST:
            yield replace(base, keys=keys)
    for stages in (base.stages - 1, base.stages + 1):
        if 1 <= stages <= MOST_STAGES:
            yield replace(base, stages=stages)
    yield replace(base, loading="pointer" if base.loading == "descriptor" else "descriptor")
    for pipelining in ("query-key ahead", "weight-value behind"):
        yield replace(base, pipelining=pipelining)
