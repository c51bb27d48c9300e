"""Measures one row: every peer of one case, in one process of its own, side by side."""

from __future__ import annotations

import ctypes
import math
import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

import attnfuse
from benchmark.byhand import Tensors
from benchmark.cases import Case
from benchmark.failures import reason_of
from benchmark.peers import OURS, PEERS, Call

__all__ = ["Effort", "Figure", "Row", "measure", "peak_bytes"]

#: What attnfuse is held against: the program as it was written, and what PyTorch's compiler makes of it.
RIVALS = ("eager", "inductor")


@dataclass(frozen=True)
class Effort:
    """How long to measure: seconds for a row's timing in all, and the fewest and most rounds."""

    seconds: float = 8.0
    fewest: int = 5
    most: int = 25
    #: A shorter call is repeated until it fills this, for the clock and the scheduler are no finer.
    block: float = 0.02


@dataclass(frozen=True)
class Figure:
    """One peer on one row: median milliseconds, peak bytes above the inputs, errors against float64."""

    milliseconds: float
    peak: int | None
    mean_error: float
    max_error: float


@dataclass(frozen=True)
class Row:
    """One row of the table. ``absent`` says why a peer has no figure; ``kernel`` is what attnfuse chose.

    ``ratio`` is attnfuse's time over the best rival's, the median of the ratios of single rounds: both
    stand in one round, so that a machine that slows down slows both.
    """

    case: Case
    figures: dict[str, Figure]
    absent: dict[str, str]
    kernel: str
    ratio: float
    speedup: float


def measure(case: Case, effort: Effort) -> Row:
    """The row of ``case``. Needs a fresh process: what ran before would be in its caches and its memory."""
    given = case.inputs()
    with torch.no_grad():
        calls, absent = _prepared(case, given)
        exact = _exact(case, given)
        errors = {name: _errors(call(), exact) for name, call in calls.items()}
        del exact
        peaks = {name: peak_bytes(call) for name, call in calls.items()}
        rounds = _interleaved(calls, effort)
    figures = {name: Figure(statistics.median(rounds[name]) * 1e3, peaks[name], *errors[name]) for name in calls}
    best = min((name for name in RIVALS if name in figures), key=lambda name: figures[name].milliseconds)
    return Row(
        case,
        figures,
        absent,
        _kernel(case, given),
        ratio=_paired(rounds.get(OURS), rounds[best]),
        speedup=_paired(rounds.get("inductor"), rounds.get(OURS)),
    )


def _prepared(case: Case, given: Tensors) -> tuple[dict[str, Call], dict[str, str]]:
    calls: dict[str, Call] = {}
    absent: dict[str, str] = {}
    for name, prepare in PEERS.items():
        try:
            call = prepare(case, given)
            if call is None:
                absent[name] = "cannot express it"
                continue
            for _ in range(3):  # compiles, then fills caches
                call()
            calls[name] = call
        except Exception as error:  # noqa: BLE001 - a peer's failure is a result, and is printed as one
            absent[name] = reason_of(error)
    return calls, absent


def _exact(case: Case, given: Tensors) -> Tensor:
    wide = {name: tensor.double() for name, tensor in given.items()}
    # head by head: in one piece the scores alone would take gigabytes
    return torch.cat([case.variant.program(**part) for part in case.groups(wide)], dim=1)


def _errors(got: Tensor, exact: Tensor) -> tuple[float, float]:
    off = (got.double() - exact).abs()
    return off.mean().item(), off.max().item()


def _interleaved(calls: dict[str, Call], effort: Effort) -> dict[str, list[float]]:
    threads = torch.get_num_threads()
    timers = {name: Timer("call()", globals={"call": call}, num_threads=threads) for name, call in calls.items()}
    single = {name: timer.timeit(2).mean for name, timer in timers.items()}
    repeats = {name: max(1, math.ceil(effort.block / seconds)) for name, seconds in single.items()}
    one_round = sum(single[name] * repeats[name] for name in timers)
    count = min(effort.most, max(effort.fewest, int(effort.seconds / one_round)))
    rounds: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(count):
        for name, timer in timers.items():
            rounds[name].append(timer.timeit(repeats[name]).mean)
    return rounds


def _paired(above: list[float] | None, below: list[float] | None) -> float:
    if not above or not below:
        return math.nan
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def peak_bytes(call: Callable[[], object]) -> int | None:
    """Bytes of physical memory that one call adds at its highest; None where the system does not tell.

    Linux keeps a process's high-water mark and lets it be reset, so the mark is set to what is resident
    after free memory was handed back. That counts all of it: the allocator's, OpenMP's and MKL's scratch,
    which the profiler of PyTorch's own allocator would not see.
    """
    if sys.platform != "linux":
        return None
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _status("VmRSS")
    call()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(), re.MULTILINE)
    assert found is not None, f"/proc/self/status has no {field}"
    return int(found[1]) * 1024


def _kernel(case: Case, given: Tensors) -> str:
    with torch.no_grad():
        report = attnfuse.explain(case.variant.program, **given)
    names = [site.kernel for site in report.fused] + ["unfused"] * len(report.refused)
    return ", ".join(names) or "no site"
