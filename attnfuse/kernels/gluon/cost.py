"""What the kernel ``gluon`` costs: seconds on one H200; another kernel says what its own backward does not compute."""

from __future__ import annotations

import math
from dataclasses import replace

from attnfuse.kernels.gpu.cost import ROWS_OF_TILE, STREAMED, TANH, device_of
from attnfuse.kernels.problem import Problem
from attnfuse.kernels.registry import lookup
from attnfuse.kernels.rows import band_of
from attnfuse.kernels.triton import logit_of
from attnfuse.reference import is_float8
from attnfuse.score import S
from attnfuse.target import Target

__all__ = ["backward_seconds", "forward_seconds"]

#: By the widest head's tile, as measured on one H200: operations a second of both products in long sequences;
#: seconds of a block of rows beside them; the share of the rate with a program, and with one that reads a panel.
RATES = {64: 560e12, 128: 720e12, 256: 755e12}
BLOCK = {64: 1.5e-6, 128: 2.0e-6, 256: 5.0e-6}
WITH_PROGRAM, WITH_PANEL = {64: 0.65, 128: 0.82, 256: 0.92}, {64: 0.56, 128: 0.70, 256: 0.80}
#: Multiprocessors.
PROCESSORS = device_of(Target("cuda", "sm90")).processors
#: The same of float8. Value whose rows are contiguous is copied first, at so many bytes a second, read and written.
FLOAT8_RATES, FLOAT8_WITH_PROGRAM, TURNED = {64: 600e12, 128: 930e12}, 0.85, 0.33e12
#: The same of a backward's five products, which are so many times the forward's two; its block is one of keys.
BACKWARD_RATES, BACKWARD_WITH_PROGRAM, PRODUCTS = {64: 440e12, 128: 590e12}, {64: 1.0, 128: 0.8}, 2.5
BACKWARD_BLOCK, BACKWARD_LAUNCHES = 4e-6, 20e-6
#: Seconds of a launch, and bytes a second from memory.
LAUNCH, BANDWIDTH = 12e-6, 4.0e12


def forward_seconds(problem: Problem) -> float:
    """Seconds of a forward."""
    moved = sum(x.bytes for x in (problem.query, problem.key, problem.value, *problem.captures)) / BANDWIDTH
    if is_float8(problem.query.dtype):
        return max(_float8_seconds(problem), moved) + _turned(problem) + LAUNCH
    rate = _of_width(RATES, problem)
    if _has_program(problem):
        rate *= _of_width(WITH_PANEL if problem.captured_bytes else WITH_PROGRAM, problem)
    work = problem.flops + TANH * problem.scores * problem.count("tanh")
    blocks = problem.heads * math.ceil(problem.rows / ROWS_OF_TILE) / PROCESSORS
    return max(work * _reached(problem) / rate + blocks * _of_width(BLOCK, problem), moved) + LAUNCH


def _float8_seconds(problem: Problem) -> float:
    rate = _of_width(FLOAT8_RATES, problem)
    if _has_program(problem):
        rate *= FLOAT8_WITH_PROGRAM
    return problem.flops * _reached(problem) / rate


def _has_program(problem: Problem) -> bool:
    """Whether more is done to the scores of whole tiles than to scale them."""
    return logit_of(problem.spec, rows_kept=problem.rows_kept).core != S


def _turned(problem: Problem) -> float:
    """Seconds in which value is copied with its columns contiguous."""
    return 2 * problem.value.bytes / TURNED if problem.value.minor == "d" else 0.0


def _of_width(table: dict[int, float], problem: Problem) -> float:
    width = max(problem.query.shape[-1], problem.value.shape[-1])
    return next(found for block, found in table.items() if width <= block)


def backward_seconds(problem: Problem, other: str, target: Target, *, own: bool) -> float:
    """Seconds of a backward: our ``own`` body and the other kernel's gradients of captures, or all the other's."""
    if not own:
        return _other_backward(problem, other, target)
    rate = _of_width(BACKWARD_RATES, problem)
    if _has_program(problem):
        rate *= _of_width(BACKWARD_WITH_PROGRAM, problem)
    blocks = math.prod(problem.key.shape[:-2]) * math.ceil(problem.keys / ROWS_OF_TILE) / PROCESSORS
    seconds = PRODUCTS * problem.flops * _reached(problem) / rate + blocks * BACKWARD_BLOCK
    seconds += STREAMED * math.prod(problem.query.shape) / BANDWIDTH + BACKWARD_LAUNCHES
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
    """Scores in tiles that the mask's band does not skip, in whole blocks of rows, over the scores that there are."""
    band = band_of(problem.spec, problem.symbols)
    firsts = range(0, problem.rows, ROWS_OF_TILE)
    if band.open or not problem.scores:
        return len(firsts) * ROWS_OF_TILE / max(problem.rows, 1)
    spans = (band.reach(first, min(first + ROWS_OF_TILE, problem.rows), problem.keys) for first in firsts)
    return sum(ROWS_OF_TILE * (stop - start) for start, stop in spans) / (problem.rows * problem.keys)
