"""How attention is computed, as data: which loop is outside, tiles, order, pipelining, loads, and a target's knobs.

A schedule never changes what is computed; :mod:`attnfuse.kernels.simulate` carries any of them out in plain torch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal

__all__ = ["Algorithm", "Loading", "Order", "Pipelining", "Schedule"]

#: ``rows outside`` is FlashAttention-2: a program keeps its query rows and walks the keys. ``keys outside`` is
#: FlashAttention-1: the walk over keys is outermost, and out, maximum and sum of every row are read and written
#: again for each tile of keys; a program has a span of a head's rows. ``split keys`` is FlashDecoding: rows outside,
#: each span of keys in a program of its own, and a merge.
Algorithm = Literal["rows outside", "keys outside", "split keys"]
#: In which order tiles of rows, or spans of them, start: as they lie; those with the most keys first; or as many
#: programs as fit, each taking one after another.
Order = Literal["plain", "longest first", "persistent"]
#: What overlaps in the loop: nothing but loads; the next product of query and key is started before this softmax;
#: the product of weights and value is done one tile late (the two schedules of triton-lang/triton#5185).
Pipelining = Literal["none", "query-key ahead", "weight-value behind"]
#: By tensor descriptor (TMA, 2-D block loads), or a pointer for each element, which is how operands are loaded that no
#: descriptor can describe. Triton's block pointers would stand between both: they are deprecated in 3.7, gone in 3.9.
Loading = Literal["descriptor", "pointer"]


@dataclass(frozen=True)
class Schedule:
    """One way to run attention. ``rows`` and ``keys`` are a tile's; powers of two, at least 16.

    ``warps`` of a program (``warps * 32`` threads, 64 on AMD), ``stages`` of the loads' pipeline, ``registers`` at
    most a thread (None: the compiler's choice), ``splits`` of the keys, ``spans`` of the rows where keys are outside,
    ``knobs`` options of one compiler, by name.
    """

    algorithm: Algorithm = "rows outside"
    rows: int = 64
    keys: int = 64
    order: Order = "plain"
    pipelining: Pipelining = "none"
    loading: Loading = "pointer"
    warps: int = 4
    stages: int = 2
    registers: int | None = None
    splits: int = 1
    spans: int = 1
    knobs: tuple[tuple[str, int | str], ...] = ()

    def steps(self) -> Iterator[str]:
        """The schedule as the steps of a lowering, outermost first, one sentence each."""
        yield "tile batch and heads: one of each a program"
        yield from self._keys_outside() if self.algorithm == "keys outside" else self._rows_outside()
        limit = "" if self.registers is None else f", at most {self.registers} registers a thread"
        knobs = "".join(f", {name}={value}" for name, value in self.knobs)
        yield f"lay out over {self.warps} warps{limit}{knobs}"

    def _rows_outside(self) -> Iterator[str]:
        if self.algorithm == "split keys":
            yield f"split keys in {self.splits}; tile rows by {self.rows}; loop over keys by {self.keys}; merge"
        else:
            yield f"tile rows by {self.rows}, outside; loop over keys by {self.keys} with an online softmax"
        yield f"distribute tiles of rows: {self.order}"
        yield f"pipeline the loop: {self.pipelining}; loads {self.stages} deep, by {self.loading}"

    def _keys_outside(self) -> Iterator[str]:
        yield f"split rows in {self.spans}, a span a program; distribute spans: {self.order}"
        yield f"loop over keys by {self.keys}, outside; load each tile of key and value once, by {self.loading}"
        yield f"tile rows by {self.rows}; read and write their sums again for each tile of keys"
        yield f"pipeline the loop over rows: {self.pipelining}; loads {self.stages} deep, by pointer"

    def with_knobs(self, **knobs: int | str) -> Schedule:
        """The same schedule with some options of a compiler set."""
        return replace(self, knobs=tuple(sorted({**dict(self.knobs), **knobs}.items())))
