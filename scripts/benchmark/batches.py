"""Which rows of a GPU are prepared at the same time: as many as its memory holds."""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import TypeVar

from benchmark.gpu import HEADS, GpuCase

__all__ = ["Need", "batches", "need"]

#: Bytes of a process that has done nothing yet: CUDA's context, code, workspaces of libraries.
CONTEXT = 1.2e9
#: Results of peers that one process may hold at a time.
AT_ONCE = 3

Key = TypeVar("Key", bound=Hashable)


@dataclass(frozen=True)
class Need:
    """Bytes that a row takes while it is prepared; and those of its float64 run, which only one row has at a time."""

    held: float
    exact: float


def batches(needs: Mapping[Key, Need], room: float, most: int, gpus: int = 1) -> list[list[Key]]:
    """Rows by batch: each has ``most`` rows and ``room`` bytes at most, or is a single row.

    As few as can be of a number that ``gpus`` divides, and all about as large: beside a row that takes half of the GPU
    there are many small ones, so that no processor waits.
    """
    fewest = math.ceil(len(needs) / (most * gpus)) * gpus
    for number in count(fewest, gpus):
        found = _spread(needs, number, most)
        if all(len(batch) < 2 or _bytes(needs, batch) <= room for batch in found):
            break
    return [batch for batch in found if batch]


def _spread(needs: Mapping[Key, Need], number: int, most: int) -> list[list[Key]]:
    found: list[list[Key]] = [[] for _ in range(number)]
    for key in sorted(needs, key=lambda key: needs[key].held, reverse=True):
        open_ones = (batch for batch in found if len(batch) < most)
        min(open_ones, key=lambda batch: sum(needs[each].held for each in batch)).append(key)
    return found


def _bytes(needs: Mapping[Key, Need], batch: Sequence[Key]) -> float:
    return sum(needs[key].held for key in batch) + max(needs[key].exact for key in batch)


def need(case: GpuCase, peers: Collection[str]) -> Need:
    """What a row takes, estimated: operands, results and what peers write of the size of the scores."""
    rows = case.variant.rows or case.length
    query, scores = 2 * case.batch * rows * HEADS * case.width, HEADS * rows * case.length
    table = 2 * scores if any(case.variant.extra.values()) else 0
    given = query + case.read_bytes + table
    # the output, its heads merged, and what the backward is given
    step = 3 * query + (given if case.training else 0)
    # a mask of every row and key, as it is made
    masks = 4 * rows * case.length
    if case.name == "alibi" and "SDPA by hand" in peers:
        masks += 2 * 2 * scores
    if table and case.training:
        # the bias's gradient, before it is summed over the batch
        masks += 2 * (case.batch - 1) * scores
    # of one head
    exact = 8 * rows * case.length * (6 if case.training else 4)
    return Need(CONTEXT + given + AT_ONCE * step + masks + _unfused(case, scores, peers), exact)


def _unfused(case: GpuCase, scores: int, peers: Collection[str]) -> float:
    """Scores in several precisions, and keys and values repeated for each head."""
    if not {"eager", "inductor"} & set(peers):
        return 0.0
    repeated = case.read_bytes * HEADS // case.kv_heads
    return float(case.batch * scores * (24 if case.training else 16) + repeated)
