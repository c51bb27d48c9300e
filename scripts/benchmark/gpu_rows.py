"""Measures the GPU's rows: prepared side by side in processes, many at a time; timed one after another on each GPU.

While rows are timed nothing else runs: the next are prepared when all that were prepared are timed.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmark.batches import batches, need
from benchmark.gpu import GpuCase, GpuRow, Prepared
from benchmark.workers import Absent, Answers, Worker

__all__ = ["Machine", "measure_rows", "prepare"]

#: Seconds that rows of a batch have to be ready, and that a row has to be timed.
PATIENCE, TURN = 240.0, 120.0
#: Of a GPU's memory what rows may be estimated to take; processes for each processor, and for each GPU at most.
SHARE, PER_PROCESSOR, MOST = 0.85, 2, 32
#: What is said where a peer found no memory, which may be others'.
_NO_MEMORY = ("out of memory", "ALLOC_FAILED")

#: Prepares a case on the GPU of this number; the file is for its processes to lock.
Prepare = Callable[[GpuCase, int, str], Answers]


@dataclass(frozen=True)
class Machine:
    """How many GPUs there are, bytes that rows may take of each, and how many processes each serves at a time."""

    gpus: int
    room: float
    processes: int

    @staticmethod
    def here() -> Machine:
        """This machine, of GPUs that are alike."""
        gpus = torch.cuda.device_count()
        room = SHARE * torch.cuda.get_device_properties(0).total_memory
        return Machine(gpus, room, max(1, min(MOST, PER_PROCESSOR * (os.cpu_count() or 1) // gpus)))

    def dealt(self, cases: Sequence[GpuCase], peers: Sequence[str]) -> list[list[list[GpuCase]]]:
        """Batches, of each the rows of each GPU."""
        needs = {case: need(case, peers) for case in cases}
        parts = batches(needs, self.room, self.processes, self.gpus)
        return [parts[at : at + self.gpus] for at in range(0, len(parts), self.gpus)]


def prepare(case: GpuCase, gpu: int, lock: str) -> Answers:
    """What a row's process can be asked."""
    # not CUDA_VISIBLE_DEVICES: importing this has asked CUDA for its devices, and torch would count others
    torch.cuda.set_device(gpu)
    # the processes are the parallelism
    torch._inductor.config.compile_threads = 1
    prepared = Prepared(case, lock)
    return {"add": prepared.add, "row": prepared.row}


def measure_rows(
    cases: Sequence[GpuCase], peers: Sequence[str], machine: Machine, prepare: Prepare = prepare
) -> Iterator[GpuRow]:
    """The row of each case, as they come; one that found no memory beside others is measured again alone."""
    crowded: list[GpuCase] = []
    with TemporaryDirectory() as folder:
        start = partial(_making, tuple(peers), prepare, Path(folder))
        for parts in machine.dealt(cases, peers):
            alone = {part[0] for part in parts if len(part) == 1}
            for row in _measured(parts, start):
                if row.case not in alone and _found_no_memory(row):
                    crowded.append(row.case)
                else:
                    yield row
        for at in range(0, len(crowded), machine.gpus):
            yield from _measured([[case] for case in crowded[at : at + machine.gpus]], start)


def _found_no_memory(row: GpuRow) -> bool:
    return any(sign in reason for reason in row.absent.values() for sign in _NO_MEMORY)


@dataclass
class _Making:
    """A row on its way: its process, anew whenever a peer leaves it unable to go on."""

    case: GpuCase
    peers: tuple[str, ...]
    make: Callable[[], Answers]
    until: float
    absent: dict[str, str] = field(default_factory=dict)
    worker: Worker | None = None

    def prepare(self) -> None:
        """All peers that can be."""
        asked = [peer for peer in self.peers if peer not in self.absent]
        self.worker = Worker(self.make)
        if (failure := self.worker.wait(self.until)) is not None:
            self.absent |= dict.fromkeys(asked, failure)
            return
        for peer in asked:
            try:
                reason = self.worker.ask("add", peer, until=self.until)
            except Absent as broken:
                self.absent[peer] = str(broken)
                self.worker.end()
                self.prepare()
                return
            if reason:
                self.absent[peer] = reason

    def timed(self) -> GpuRow:
        """The row, after which its process ends."""
        assert self.worker is not None
        try:
            row: GpuRow = self.worker.ask("row", until=time.monotonic() + TURN)
        except Absent as failure:
            row = GpuRow(self.case, {}, "-", absent=dict.fromkeys(self.peers, str(failure)))
        self.worker.end()
        return replace(row, absent={**row.absent, **self.absent})

    def end(self) -> None:
        """Ends its process, and lets no other start."""
        self.until = 0.0
        if self.worker is not None:
            self.worker.end()


def _making(peers: tuple[str, ...], prepare: Prepare, folder: Path, case: GpuCase, gpu: int) -> _Making:
    make = partial(prepare, case, gpu, str(folder / f"gpu{gpu}"))
    return _Making(case, peers, make, time.monotonic() + PATIENCE)


def _measured(parts: Sequence[Sequence[GpuCase]], start: Callable[[GpuCase, int], _Making]) -> Iterator[GpuRow]:
    """The rows of one batch, a part of it for each GPU."""
    making = [[start(case, gpu) for case in part] for gpu, part in enumerate(parts)]
    rows = [row for part in making for row in part]
    with ExitStack() as stack:
        pool, *clocks = (stack.enter_context(ThreadPoolExecutor(size)) for size in (len(rows), *(1 for _ in parts)))
        try:
            list(pool.map(_Making.prepare, rows))
            turns = [clock.submit(row.timed) for clock, part in zip(clocks, making, strict=True) for row in part]
            for turn in as_completed(turns):
                yield turn.result()
        finally:
            for row in rows:
                row.end()
