"""What the kernel ``gluon`` costs: seconds on one H200; another kernel says what its own backward does not compute."""

from __future__ import annotations

import math
from dataclasses import replace

from attnfuse.kernels.problem import Operand, Problem
from attnfuse.kernels.registry import lookup
from attnfuse.kernels.rows import band_of
from attnfuse.kernels.triton import logit_of
from attnfuse.reference import is_float8
from attnfuse.score import S
from attnfuse.target import Target

__all__ = ["backward_seconds", "forward_seconds"]

#: Operations a second of both products, by the widest head's tile, and the share of it with a program; measured on one
#: H200, long sequences.
RATES = {64: 480e12, 128: 640e12, 256: 680e12}
WITH_PROGRAM = 0.75
#: The same of float8. Value whose rows are contiguous is copied first, at so many bytes a second, read and written.
FLOAT8_RATES, FLOAT8_WITH_PROGRAM, TURNED = {64: 600e12, 128: 930e12}, 0.85, 0.33e12
#: The same of a backward's five products, which are so many times the forward's two; seconds of its launches.
BACKWARD_RATES = {64: 400e12, 128: 550e12}
BACKWARD_WITH_PROGRAM, PRODUCTS, BACKWARD_LAUNCH = 0.7, 2.5, 100e-6
#: Seconds of a launch, and bytes a second from memory.
LAUNCH, BANDWIDTH = 12e-6, 4.0e12


def forward_seconds(problem: Problem) -> float:
    """Seconds of a forward."""
    narrow = is_float8(problem.query.dtype)
    width = max(problem.query.shape[-1], problem.value.shape[-1])
    rate = next(rate for block, rate in (FLOAT8_RATES if narrow else RATES).items() if width <= block)
    if logit_of(problem.spec, rows_kept=problem.rows_kept).core != S:
        rate *= FLOAT8_WITH_PROGRAM if narrow else WITH_PROGRAM
    operands = (problem.query, problem.key, problem.value, *problem.captures)
    moved = sum(map(_bytes, operands))
    copied = 2 * _bytes(problem.value) / TURNED if narrow and problem.value.minor == "d" else 0.0
    return max(problem.flops * _reached(problem) / rate, moved / BANDWIDTH) + copied + LAUNCH


def _bytes(operand: Operand) -> int:
    return math.prod(operand.shape) * operand.dtype.itemsize


def backward_seconds(problem: Problem, other: str, target: Target, *, own: bool) -> float:
    """Seconds of a backward: our ``own`` body and the other kernel's gradients of captures, or all the other's."""
    if not own:
        return _other_backward(problem, other, target)
    width = max(problem.query.shape[-1], problem.value.shape[-1])
    rate = next(rate for block, rate in BACKWARD_RATES.items() if width <= block)
    if logit_of(problem.spec).core != S:
        rate *= BACKWARD_WITH_PROGRAM
    seconds = PRODUCTS * problem.flops * _reached(problem) / rate + BACKWARD_LAUNCH
    # gradients of captures are the other kernel's
    bare = _with_gradients(problem, operands=True, captures=False)
    captures = _with_gradients(problem, operands=True)
    return seconds + _other_backward(captures, other, target) - _other_backward(bare, other, target)


def _other_backward(problem: Problem, other: str, target: Target) -> float:
    without = _with_gradients(problem, operands=False, captures=False)
    return lookup(other).cost(problem, target) - lookup(other).cost(without, target)


def _with_gradients(problem: Problem, *, operands: bool, captures: bool = True) -> Problem:
    """The same attention, gradients being asked for of query, key and value or not, and of captures no longer."""
    query, key, value = (replace(x, requires_grad=operands) for x in (problem.query, problem.key, problem.value))
    read = tuple(replace(x, requires_grad=captures and x.requires_grad) for x in problem.captures)
    return replace(problem, query=query, key=key, value=value, captures=read)


def _reached(problem: Problem) -> float:
    """The share of scores in tiles that the mask's band does not skip."""
    band = band_of(problem.spec, problem.symbols)
    if band.open or not problem.scores:
        return 1.0
    spans = (band.reach(first, min(first + 128, problem.rows), problem.keys) for first in range(0, problem.rows, 128))
    return min(1.0, sum(128 * (stop - start) for start, stop in spans) / (problem.rows * problem.keys))
