"""How the scores are cut: blocks of some heads, some query rows and every key that the mask can keep."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from attnfuse.kernels.rows import Band
from attnfuse.reference import Span

__all__ = ["Block", "Layout", "blocks", "row_blocks"]

#: Rows of a block's matrix products: fewer skip more of what a band masks, more need fewer blocks.
ROWS_AT_LEAST, ROWS_IN_BAND, ROWS = 16, 128, 512
#: Elements of a vector register: a softmax of bfloat16 rows of any other length takes half as long again.
VECTOR = 32
#: Scores of a block for each thread, 2 MiB of float32. A quarter of that costs 10% at 2048 keys, 25% at 512.
SCORES = 1 << 19


@dataclass(frozen=True)
class Layout:
    """The sizes of one call. ``batch`` are the batch sizes, ``groups`` query heads share each of ``kv_heads``."""

    batch: tuple[int, ...]
    kv_heads: int
    groups: int
    rows: int
    keys: int


@dataclass(frozen=True)
class Block:
    """``batch`` and ``kv_heads`` are spans of key's axes, ``rows`` and ``keys`` of the scores'; ``core`` are
    the keys inside the mask's band for every row.
    """

    batch: tuple[Span, ...]
    kv_heads: Span
    rows: Span
    keys: Span
    core: Span
    groups: int

    @cached_property
    def lead(self) -> int:
        """Batches times key/value heads: the batch of this block's matrix products."""
        size = self.kv_heads[1] - self.kv_heads[0]
        for first, last in self.batch:
            size *= last - first
        return size

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """One span for each axis of the scores."""
        first, last = self.kv_heads
        return (*self.batch, (first * self.groups, last * self.groups), self.rows, self.keys)

    def with_all(self, keys: int) -> Block:
        """The same rows with every key."""
        return replace(self, keys=(0, keys))

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """The block's shape, ``[*B, H, M, N]``."""
        return tuple(last - first for first, last in self.spans)


def blocks(layout: Layout, band: Band, threads: int) -> Iterator[Block]:
    """Blocks that cover all scores the band keeps, each row in one block; row blocks outermost.

    The last rows come first: behind a causal mask they have the most keys, so memory once taken is enough.
    """
    budget = threads * SCORES
    fitting = budget // max(layout.groups * layout.keys, 1)
    row_step = max(min(fitting, ROWS if band.open else ROWS_IN_BAND), ROWS_AT_LEAST)
    for rows in reversed(_spans(layout.rows, row_step)):
        keys = _aligned(band.reach(*rows, layout.keys), layout.keys)
        core = band.core(*rows, layout.keys)
        scores = layout.groups * (rows[1] - rows[0]) * max(keys[1] - keys[0], 1)
        for *batch, kv_heads in _parts((*layout.batch, layout.kv_heads), max(budget // scores, 1)):
            yield Block(tuple(batch), kv_heads, rows, keys, core, layout.groups)


def row_blocks(layout: Layout, band: Band, scores: int) -> Iterator[Block]:
    """Blocks of all heads in the order of their rows, of about so many scores."""
    each_row = math.prod(layout.batch) * layout.kv_heads * layout.groups * layout.keys
    batch, heads = tuple((0, size) for size in layout.batch), (0, layout.kv_heads)
    for rows in _spans(layout.rows, max(scores // max(each_row, 1), ROWS_AT_LEAST)):
        keys = band.reach(*rows, layout.keys)
        yield Block(batch, heads, rows, keys, keys, layout.groups)


def _aligned(span: Span, size: int) -> Span:
    """The span, up to whole vectors on both sides where there is so much."""
    first, last = span
    return first // VECTOR * VECTOR, min(-(-last // VECTOR) * VECTOR, size)


def _parts(sizes: Sequence[int], at_most: int) -> Iterator[tuple[Span, ...]]:
    """Boxes of at most so many elements that cover ``sizes``, innermost axes filled first."""
    steps: list[int] = []
    for size in reversed(sizes):
        steps.append(max(min(size, at_most), 1))
        at_most = at_most // size if size and at_most >= size else 1
    return itertools.product(*(_spans(size, step) for size, step in zip(sizes, reversed(steps), strict=True)))


def _spans(size: int, step: int) -> list[Span]:
    return [(first, min(first + step, size)) for first in range(0, size, step)]
