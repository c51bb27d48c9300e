"""The forward with the walk over keys outermost (FlashAttention-1): rows come by each tile of keys.

Dao, Fu, Ermon, Rudra, Re 2022, arXiv 2205.14135, Algorithm 1. A tile of key and value is loaded once; for each, out,
row maximum and row sum of every tile of rows are read, brought up to date and written. As in FlashAttention-2 the
sums that are kept are not divided until the end, in float32, which saves a division and a rounding for each tile of
keys. Algorithm 1's tiles of keys are as large as fast memory allows; here the schedule says.

A row's sums go through all tiles of keys one after the other, and thread blocks cannot wait for each other: so there
is one launch, and a program owns a span of a head's rows, whose sums nobody else touches. Its own threads wait for each
other at the end of each tile of keys. One launch for each tile of keys would need no such ownership, but each program
of it would load that tile for a single tile of rows: what is read and written again would be paid for by nothing.
``schedule.spans`` is how many programs share a head, which trades loads of keys for processors at work.

Arguments are those of :func:`attnfuse.kernels.triton.forward.forward`; ``held`` is
``(top [tiles, rows], total [tiles, rows], sums [tiles, rows, value_padded])``, float32, for the tiles of rows of all
heads, each padded to a whole tile, so that no access is masked.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnfuse.kernels.triton.forward import (
    added,
    bits_at,
    factored,
    head_at,
    load_keys,
    load_query,
    load_value,
    logits,
    no_keys,
    of_head,
    row_tiles,
    rows_at,
    softmax_step,
    spans,
    walk,
    weighed,
    write,
)

__all__ = ["keys_outside"]


@triton.jit
def put_away(acc, top, total, held, place, PLAN: tl.constexpr):
    """Writes the sums of the tile of rows at ``place``."""
    tops, totals, sums = held
    r, dv = place * PLAN.rows + tl.arange(0, PLAN.rows), tl.arange(0, PLAN.value_padded)
    tl.store(tops + r, top)
    tl.store(totals + r, total)
    tl.store(sums + (r * PLAN.value_padded)[:, None] + dv[None, :], acc)


@triton.jit
def fetched(held, place, PLAN: tl.constexpr):
    """The sums of the tile of rows at ``place``, as :func:`put_away` left them."""
    tops, totals, sums = held
    r, dv = place * PLAN.rows + tl.arange(0, PLAN.rows), tl.arange(0, PLAN.value_padded)
    return tl.load(sums + (r * PLAN.value_padded)[:, None] + dv[None, :]), tl.load(tops + r), tl.load(totals + r)


@triton.jit
def tiles_that_see(n0, begin, end, keys, band, PLAN: tl.constexpr):
    """Of tiles of rows ``begin..end-1``: where those begin that see the tile of keys at ``n0``, where those that keep
    all of it begin and end, and where all end. The mirror of :func:`attnfuse.kernels.triton.forward.spans`.
    """
    n1 = n0 + PLAN.keys - 1
    first, core_first, core_last, last = begin, begin, end, end
    if PLAN.right:
        first = tl.maximum(n0 - band[1], 0) * PLAN.group // PLAN.rows
        core_first = tl.cdiv(tl.maximum(n1 - band[1], 0) * PLAN.group, PLAN.rows)
    if PLAN.left:
        last = tl.cdiv(tl.maximum(n1 - band[0] + 1, 0) * PLAN.group, PLAN.rows)
        core_last = tl.maximum(n0 - band[0] + 1, 0) * PLAN.group // PLAN.rows
    if not PLAN.even:
        core_first = tl.where(n1 < keys, core_first, end)
    first = tl.minimum(tl.maximum(first, begin), end)
    last = tl.maximum(tl.minimum(last, end), first)
    core_first = tl.minimum(tl.maximum(core_first, first), last)
    core_last = tl.maximum(tl.minimum(core_last, last), core_first)
    return first, core_first, core_last, last


@triton.jit
def come_by(
    k, v, n0, first, last, head, query, held, scope, seed, q_at, sizes, CORE: tl.constexpr, PLAN: tl.constexpr,
):  # fmt: skip
    """Adds a tile of keys to the sums of tiles of rows ``first..last-1``, which are different memory each."""
    keys, tiles = sizes[3], row_tiles(sizes[2], PLAN)
    b, _, _ = head_at(head, sizes, PLAN)
    for tile in tl.range(first, last, num_stages=PLAN.stages):
        place = (head * tiles + tile).to(tl.int64)
        m, h, inside = rows_at(tile, head, sizes, PLAN)
        bits = bits_at(seed, b, h, m, PLAN)
        q = load_query(query, q_at, b, h, m, inside, PLAN)
        u = logits(q, k, b, h, m, n0, keys, scope, CORE, PLAN)
        acc, top, total = fetched(held, place, PLAN)
        weight, shrink, top, total = softmax_step(u, top, total, PLAN)
        acc = acc * shrink[:, None]
        acc = added(acc, weighed(weight, b, h, m, bits, n0, keys, scope, PLAN), v, PLAN)
        put_away(acc, top, total, held, place, PLAN)


@triton.jit
def done(
    tile, head, query, key, value, out, lse, held, scope, seed, q_at, k_at, v_at, o_at, sizes,
    PLAN: tl.constexpr,
):  # fmt: skip
    """Writes the result of a tile of rows that every tile of keys was added to."""
    keys, tiles = sizes[3], row_tiles(sizes[2], PLAN)
    b, _, where = head_at(head, sizes, PLAN)
    m, h, inside = rows_at(tile, head, sizes, PLAN)
    acc, top, total = fetched(held, (head * tiles + tile).to(tl.int64), PLAN)
    if PLAN.rest:
        # behind a finite fill a row that keeps nothing weighs every key: its tile begins anew, whatever it has seen
        dead = tl.min(top, 0) <= PLAN.floor
        zero, lowest, none = no_keys(b, h, m, scope, PLAN)
        acc, top, total = tl.where(dead, zero, acc), tl.where(dead, lowest, top), tl.where(dead, none, total)
        q = load_query(query, q_at, b, h, m, inside, PLAN)
        bits = bits_at(seed, b, h, m, PLAN)
        acc, top, total = walk(acc, top, total, q, key, value, k_at, v_at, where, b, h, m, bits,
                               0, tl.where(dead, keys, 0), keys, scope, False, PLAN)  # fmt: skip
    acc = factored(acc, b, h, m, scope, PLAN)
    write(acc, top, total, out, lse, o_at, b, h, m, inside, sizes, PLAN)


@triton.jit
def span_of_rows(
    work, query, key, value, out, lse, held, scope, seed, q_at, k_at, v_at, o_at, sizes, band,
    PLAN: tl.constexpr,
):  # fmt: skip
    """Computes one of the spans of a head's rows; of all heads that share a key head where they are packed."""
    rows, keys = sizes[2], sizes[3]
    span, head = work % PLAN.spans, work // PLAN.spans
    if PLAN.order == "longest first":
        span = PLAN.spans - 1 - span
    tiles = row_tiles(rows, PLAN)
    each = tl.cdiv(tiles, PLAN.spans)
    begin = tl.minimum(span * each, tiles)
    end = tl.minimum(begin + each, tiles)
    b, hk, where = head_at(head, sizes, PLAN)
    key, value = of_head(key, k_at, b, hk, PLAN), of_head(value, v_at, b, hk, PLAN)

    for tile in range(begin, end):
        m, h, _ = rows_at(tile, head, sizes, PLAN)
        acc, top, total = no_keys(b, h, m, scope, PLAN)
        put_away(acc, top, total, held, (head * tiles + tile).to(tl.int64), PLAN)
    # what one thread has written another will read
    tl.debug_barrier()
    first, _, _, _ = spans(begin, rows, keys, band, PLAN)
    _, _, _, last = spans(end - 1, rows, keys, band, PLAN)
    # a span without rows loads nothing
    last = tl.where(begin < end, last, first)
    for n0 in range(first, last, PLAN.keys):
        k = load_keys(key, k_at, where, n0, keys, PLAN.width, PLAN.padded, not PLAN.even, PLAN).to(PLAN.score_type)
        v = load_value(value, v_at, where, n0, keys, not PLAN.even, PLAN)
        seeing, core_first, core_last, seen = tiles_that_see(n0, begin, end, keys, band, PLAN)
        if PLAN.right or not PLAN.even:
            come_by(k, v, n0, seeing, core_first, head, query, held, scope, seed, q_at, sizes, False, PLAN)
        come_by(k, v, n0, core_first, core_last, head, query, held, scope, seed, q_at, sizes, True, PLAN)
        if PLAN.left:
            come_by(k, v, n0, core_last, seen, head, query, held, scope, seed, q_at, sizes, False, PLAN)
        tl.debug_barrier()
    for tile in range(begin, end):
        done(tile, head, query, key, value, out, lse, held, scope, seed, q_at, k_at, v_at, o_at, sizes, PLAN)


@triton.jit
def keys_outside(
    query, key, value, out, lse, held, scope, seed, q_at, k_at, v_at, o_at, sizes, band,
    PLAN: tl.constexpr,
):  # fmt: skip
    """Writes ``out`` and, where it is asked for, ``lse [b0, b1, h, m]``."""
    if PLAN.order == "persistent":
        for work in range(tl.program_id(0), sizes[4], tl.num_programs(0)):
            span_of_rows(work, query, key, value, out, lse, held, scope, seed,
                         q_at, k_at, v_at, o_at, sizes, band, PLAN)  # fmt: skip
    else:
        span_of_rows(tl.program_id(0), query, key, value, out, lse, held, scope, seed,
                     q_at, k_at, v_at, o_at, sizes, band, PLAN)  # fmt: skip
