"""Which tiles of a mask are empty, cut or whole, asked of the mask itself: the lists that a forward walks.

A program looks at some key tiles of a row tile. Where the mask reads rows and keys apart, as document ids and
paddings do, it decides by the least and greatest value of each in a tile (:mod:`attnfuse.algebra.ranges`), and calls
a tile cut where they do not tell; other masks it evaluates score by score. The last program to finish with a row tile
writes its list: how many key tiles, then the tiles from the last to the first, each as ``2 * tile + cut``.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["list_tiles"]

EMPTY, CUT, WHOLE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


@triton.jit
def there(row_tile, sizes, MASK: tl.constexpr):
    """Which rows of a row tile, padded, there are."""
    row = tl.arange(0, MASK.padded_height)
    return (row < MASK.height) & (row_tile * MASK.height + row < sizes[0])


@triton.jit
def keeps(row_tile, tile, first, batch, head, scope, sizes, MASK: tl.constexpr):
    """``[HEIGHT, SLICE]``: which of the keys from ``first`` on of a tile each row keeps; padded rows keep none."""
    m = row_tile * MASK.height + tl.arange(0, MASK.padded_height)
    n = tile * MASK.width + first + tl.arange(0, MASK.slice)
    captures, strides, symbols = scope
    rows, keys = tl.minimum(m, sizes[0] - 1)[:, None], tl.minimum(n, sizes[1] - 1)[None, :]
    keep = MASK.keep(rows, rows, (batch,), head, rows, keys, captures, strides, symbols) & (n < sizes[1])[None, :]
    if MASK.right:
        keep = keep & (n[None, :] <= m[:, None] + sizes[3])
    if MASK.left:
        keep = keep & (n[None, :] >= m[:, None] + sizes[2])
    return keep & there(row_tile, sizes, MASK)[:, None]


@triton.jit
def kind_of(row_tile, tile, batch, head, scope, sizes, MASK: tl.constexpr):
    """Whether a tile is empty, cut or whole, score by score."""
    count = tl.full([MASK.padded_height, MASK.slice], 0, tl.int32)
    # a slice at a time: the scores of a whole tile do not fit into registers
    WIDTH: tl.constexpr = MASK.width
    SLICE: tl.constexpr = MASK.slice
    for first in tl.static_range(0, WIDTH, SLICE):
        count += keeps(row_tile, tile, first, batch, head, scope, sizes, MASK).to(tl.int32)
    kept = tl.sum(tl.reshape(count, [MASK.padded_height * MASK.slice], can_reorder=True), 0)
    whole = tl.sum(there(row_tile, sizes, MASK).to(tl.int32), 0) * MASK.width
    return tl.where(kept == 0, EMPTY, tl.where(kept == whole, WHOLE, CUT))


@triton.jit
def ranges_of(row_tile, tile, batch, head, scope, sizes, MASK: tl.constexpr):
    """The least and greatest value of what the mask reads, in a row tile and each of some key tiles."""
    captures, strides, symbols = scope
    row = tl.minimum(tl.arange(0, MASK.padded_height), MASK.height - 1)
    m = tl.minimum(row_tile * MASK.height + row, sizes[0] - 1)
    n = tl.minimum(tile[:, None] * MASK.width + tl.arange(0, MASK.width)[None, :], sizes[1] - 1)
    given = symbols
    for slot in tl.static_range(len(MASK.reads)):
        if MASK.reads[slot] == "row":
            values = MASK.loaders[slot](m, m, (batch,), head, m, m, captures, strides, symbols) + 0
            given = given + (tl.min(values, 0), tl.max(values, 0))
        elif MASK.reads[slot] == "key":
            values = MASK.loaders[slot](n, n, (batch,), head, n, n, captures, strides, symbols) + 0
            given = given + (tl.min(values, 1), tl.max(values, 1))
        elif MASK.reads[slot] == "one":
            value = MASK.loaders[slot](m, m, (batch,), head, m, m, captures, strides, symbols) + 0
            given = given + (value, value)
        else:
            given = given + (0, 0)
    last = tl.minimum(row_tile * MASK.height + MASK.height, sizes[0]) - 1
    return given + (
        row_tile * MASK.height,
        last,
        tile * MASK.width,
        tl.minimum(tile * MASK.width + MASK.width, sizes[1]) - 1,
    )


@triton.jit
def kinds_of(row_tile, tile, batch, head, scope, sizes, MASK: tl.constexpr):
    """Whether some tiles are empty, cut or whole, as far as ranges tell."""
    given = ranges_of(row_tile, tile, batch, head, scope, sizes, MASK)
    captures, strides, _ = scope
    first, last, key, last_key = given[-4], given[-3], given[-2], given[-1]
    some = MASK.some(tile, tile, (batch,), head, first, key, captures, strides, given) & (tile * MASK.width < sizes[1])
    every = MASK.every(tile, tile, (batch,), head, first, key, captures, strides, given)
    every = every & (tile * MASK.width + MASK.width <= sizes[1])
    if MASK.right:
        some = some & (key <= last + sizes[3])
        every = every & (last_key <= first + sizes[3])
    if MASK.left:
        some = some & (last_key >= first + sizes[2])
        every = every & (key >= last + sizes[2])
    return tl.where(some, tl.where(every, WHOLE, CUT), EMPTY)


@triton.jit
def some_row_keeps_nothing(row_tile, kinds, batch, head, scope, sizes, MASK: tl.constexpr):
    """Whether a row of a tile without whole tiles keeps no key at all."""
    found = tl.full([MASK.padded_height], 0, tl.int32)
    for tile in range(tl.cdiv(sizes[1], MASK.width)):
        if tl.load(kinds + tile, cache_modifier=".cg") == CUT:
            for first in range(0, MASK.width, MASK.slice):
                keep = keeps(row_tile, tile, first, batch, head, scope, sizes, MASK)
                found += tl.sum(keep.to(tl.int32), 1)
    return tl.min(tl.where(there(row_tile, sizes, MASK), found, 1), 0) == 0


@triton.jit
def write_list(target, row_tile, kinds, stop, batch, head, scope, sizes, MASK: tl.constexpr):
    """The list of a row tile whose ``kinds`` are known. It has one tile at least, as a forward needs."""
    tiles = tl.cdiv(sizes[1], MASK.width)
    tile = MASK.padded_tiles - 1 - tl.arange(0, MASK.padded_tiles)
    kind = tl.load(kinds + tile, mask=tile < tiles, other=EMPTY, cache_modifier=".cg")
    if MASK.everywhere:
        if tl.max(kind, 0) < WHOLE:
            if some_row_keeps_nothing(row_tile, kinds, batch, head, scope, sizes, MASK):
                kind = tl.where(tile < tiles, CUT, EMPTY)
    some = (kind > EMPTY).to(tl.int32)
    place = tl.cumsum(some, 0)
    tl.store(target + place, tile * 2 + (kind == CUT).to(tl.int32), mask=some > 0)
    count = tl.sum(some, 0)
    if count == 0:
        tl.store(target + 1, (stop - 1) * 2 + 1)
    tl.store(target, tl.maximum(count, 1))


@triton.jit(do_not_specialize=["heads", "sizes"])
def list_tiles(lists, kinds, arrivals, scope, heads, sizes, MASK: tl.constexpr):
    """``lists [pairs, row tiles, length]`` of a mask; ``kinds`` is room of its size, ``arrivals`` a zero for each list.

    ``scope`` is what programs read, ``(captures, strides, symbols)``; ``sizes`` are ``(rows, keys, left, right,
    length)``; a pair is a batch and one of ``heads``. The grid is ``(pairs, row tiles, parts)``.
    """
    pair, row_tile, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    batch, head = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    tiles = tl.cdiv(sizes[1], MASK.width)
    start, stop = 0, tiles
    if MASK.left:
        first = tl.minimum(tl.maximum(row_tile * MASK.height + sizes[2], 0), sizes[1] - 1)
        start = first // MASK.width
    if MASK.right:
        last = tl.minimum(row_tile * MASK.height + MASK.height + sizes[3], sizes[1])
        stop = tl.maximum(tl.cdiv(tl.maximum(last, 1), MASK.width), start + 1)
    which = pair.to(tl.int64) * tl.num_programs(1) + row_tile
    target, mine = lists + which * sizes[4], kinds + which * sizes[4]
    if MASK.ranged:
        some = part * MASK.part + tl.arange(0, MASK.part)
        kinds_found = kinds_of(row_tile, some, batch, head, scope, sizes, MASK)
        tl.store(mine + some, kinds_found, mask=some < tiles)
    else:
        for tile in range(part * MASK.part, tl.minimum(part * MASK.part + MASK.part, tiles)):
            kind = EMPTY
            if (tile >= start) & (tile < stop):
                kind = kind_of(row_tile, tile, batch, head, scope, sizes, MASK)
            tl.store(mine + tile, kind)
    # all have stored when one thread arrives: who arrives last reads what every program has found
    tl.debug_barrier()
    if tl.atomic_add(arrivals + which, 1, sem="acq_rel") == tl.num_programs(2) - 1:
        tl.store(arrivals + which, 0)
        write_list(target, row_tile, mine, stop, batch, head, scope, sizes, MASK)
