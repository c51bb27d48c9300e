"""How calls are timed on a GPU: by its own events, in turn, or replayed from CUDA graphs."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable, Mapping
from functools import partial

import torch

__all__ = ["Call", "graphed", "in_turn", "interleaved", "seconds"]

#: Rounds, and seconds of a call's turn in each.
ROUNDS, SECONDS = 11, 0.02

Call = Callable[[], object]


def graphed(step: Call) -> Call:
    """Its replay from a CUDA graph."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def interleaved(calls: dict[str, Call]) -> dict[str, float]:
    """Milliseconds of each call: :func:`in_turn`."""
    return in_turn({name: partial(seconds, call) for name, call in calls.items()}, SECONDS)


def in_turn(clocks: Mapping[str, Callable[[int], float]], least: float) -> dict[str, float]:
    """Milliseconds by each clock: medians of rounds in which each has its turn, in an order of the round's own.

    A clock is given how often to call, and says how many seconds a call took; a turn takes ``least`` seconds. The clock
    of a device that is short of power depends on what ran before.
    """
    repeats = {name: max(1, math.ceil(least / clock(3))) for name, clock in clocks.items()}
    order, shuffle = list(clocks), random.Random(0).shuffle
    rounds: list[dict[str, float]] = []
    for _ in range(ROUNDS):
        shuffle(order)
        rounds.append({name: clocks[name](repeats[name]) for name in order})
    return {name: statistics.median(each[name] for each in rounds) * 1e3 for name in clocks}


def seconds(call: Call, repeats: int) -> float:
    """Seconds of a call, by the device's clock, one after another so many times."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    # the device is at work when the clock starts, as it is in a loop: Python's part of the first call is not waited for
    call()
    start.record()
    for _ in range(repeats):
        call()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) / 1e3 / repeats
