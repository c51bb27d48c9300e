"""The backward body: a tile of keys a block, queries streamed past it, five products for each tile of scores.

One warp loads tiles by TMA, two warpgroups multiply. Scores are transposed, ``[keys, rows]``, so that the weights and
the gradients of scores are in registers what the products of dV and dK take as their left operand (FlashAttention-3,
https://arxiv.org/abs/2407.08608); only dQ needs them in shared memory. Products are in flight as long as registers
last: dP beside the exponents, dV beside the gradients of scores, dK beside dQ's way to memory, which one more
warp adds to it. Blocks do so in no order, so its last bits differ from run to run; dK and dV are each one block's.

Which row tiles there are is the warp's to know that loads them: it tells the others of each, and whether the mask
cuts it. Where the mask is no band, it knows from lists, and hands on what the mask reads of rows beside the tile; in
tiles that are not cut the mask is not read. A bias that is added to the scores has their gradient for its own: the tile
that dQ is made of goes to memory too.

Barriers are named for what they protect: ``*_full`` says that a tile has landed, ``*_empty`` that its room is free.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from attnfuse.kernels.gluon import copies

#: Warps of both consumers together.
WARPS = gl.constexpr(8)


class Sizes(NamedTuple):
    """The numbers of a launch. ``group`` query heads share a key head; ``pairs`` are batches times key heads.

    The sums of two heads lie ``padded_rows`` apart. The keys of row ``m`` are ``m + left <= n <= m + right``.
    ``list_batch`` and ``list_head`` are lists of tiles between one batch or head and the next, ``list_length`` the
    numbers of a list. ``strange`` is not zero where a row needs all keys.
    """

    heads: Any
    group: Any
    rows: Any
    padded_rows: Any
    keys: Any
    left: Any
    right: Any
    key_tiles: Any
    pairs: Any
    together: Any
    list_batch: Any
    list_head: Any
    list_length: Any
    exponent: Any
    factor: Any
    strange: Any


class Tiles(NamedTuple):
    """Shared memory for tiles of one operand, and for each a barrier when it has landed and when its room is free."""

    desc: Any
    room: Any
    full: Any
    empty: Any


class Beside(NamedTuple):
    """Shared memory for what lands, and is free again, together with a tile of queries."""

    desc: Any
    room: Any


class Coming(NamedTuple):
    """Shared memory for what is told of a tile of queries: an entry (:func:`entry_of`), and what masks read of rows."""

    entries: Any
    rows: Any


class Sums(NamedTuple):
    """Of rows: what normalises their weights (``top``, and ``norm`` where it is not one), and ``delta``."""

    top: Any
    norm: Any
    delta: Any


class Tensors(NamedTuple):
    """What programs read besides scores and indices."""

    captures: Any
    strides: Any
    symbols: Any


class Span(NamedTuple):
    """Row tiles: ``start..stop`` reach some key, ``whole_start..whole_stop`` entirely, every key of a full tile.

    Of a list they are places in it, and ``entries`` where its tiles are.
    """

    start: Any
    whole_start: Any
    whole_stop: Any
    stop: Any
    entries: Any


# --- which tile is which ----------------------------------------------------------------------------


@gluon.jit
def item(sizes, meta: gl.constexpr):
    """Pair of batch and key head, and key tile, of this block: the pairs whose operands the L2 cache holds together.

    Longest first takes the key tiles of all of them from the first to the last. Batches that read the same panel are
    neighbours.
    """
    index = gl.program_id(0)
    group = index // (sizes.together * sizes.key_tiles)
    inside = index - group * sizes.together * sizes.key_tiles
    if meta.longest_first:
        size = gl.minimum(sizes.together, sizes.pairs - group * sizes.together)
        pair = group * sizes.together + inside % size
        key_tile = inside // size
    else:
        pair = group * sizes.together + inside // sizes.key_tiles
        key_tile = inside % sizes.key_tiles
    if meta.panel and not meta.panel_batch:
        kv_heads = sizes.heads // sizes.group
        batches = sizes.pairs // kv_heads
        pair = pair % batches * kv_heads + pair // batches
    return pair, key_tile


@gluon.jit
def row_tiles(first, sizes, meta: gl.constexpr):
    """The :class:`Span` of a key tile: at least one tile, so that a key without rows has a gradient of zero."""
    last = gl.minimum(first + meta.block_n, sizes.keys) - 1
    tiles = gl.cdiv(sizes.rows, meta.block_m)
    start = 0
    stop = tiles
    whole_start = 0
    whole_stop = tiles
    if meta.right:
        start = gl.minimum(gl.maximum(first - sizes.right, 0) // meta.block_m, tiles - 1)
        whole_start = gl.cdiv(gl.maximum(last - sizes.right, 0), meta.block_m)
    if meta.left:
        stop = gl.minimum(gl.cdiv(gl.maximum(last - sizes.left + 1, 0), meta.block_m), tiles)
        whole_stop = gl.maximum(first - sizes.left + 1, 0) // meta.block_m
    if meta.uncertain:
        start = gl.where(sizes.strange != 0, 0, start)
        stop = gl.where(sizes.strange != 0, tiles, stop)
    return Span(start, whole_start, whole_stop, gl.maximum(stop, start + 1), 0)


@gluon.jit
def listed_tiles(key_tile, batch, head, lists, sizes, meta: gl.constexpr):
    """The :class:`Span` of a key tile's list: how many tiles, then the tiles (:mod:`attnfuse.kernels.triton.tiles`)."""
    place = batch * sizes.list_batch + head * sizes.list_head + key_tile
    entries = lists + place.to(gl.int64) * sizes.list_length
    stop = gl.load(entries)
    if meta.uncertain:
        stop = gl.where(sizes.strange != 0, gl.cdiv(sizes.rows, meta.block_m), stop)
    return Span(0, 0, 0, stop, entries + 1)


@gluon.jit
def span_of(key_tile, batch, head, lists, sizes, meta: gl.constexpr):
    """The :class:`Span` of a key tile and a query head."""
    if meta.listed:
        span = listed_tiles(key_tile, batch, head, lists, sizes, meta)
    else:
        span = row_tiles(key_tile * meta.block_n, sizes, meta)
    return span


@gluon.jit
def entry_of(span, back, first, sizes, meta: gl.constexpr):
    """The ``back``-th row tile of a span, and whether the mask may cut it, as ``2 * tile + cut``."""
    if meta.listed:
        entry = gl.load(span.entries + back)
        if meta.uncertain:
            entry = gl.where(sizes.strange != 0, back * 2 + 1, entry)
    else:
        tile = span.start + back
        cut = (tile < span.whole_start) | (tile >= span.whole_stop)
        entry = tile * 2 + cut.to(gl.int32)
    if meta.ragged:
        entry = entry | (first + meta.block_n > sizes.keys).to(gl.int32)
    return entry


@gluon.jit
def steps_of(pair, key_tile, lists, sizes, meta: gl.constexpr):
    """Row tiles of all query heads that share a key head."""
    if meta.listed:
        steps = 0
        for member in range(sizes.group):
            batch, head, _ = head_of(pair, member, sizes)
            steps += span_of(key_tile, batch, head, lists, sizes, meta).stop
    else:
        span = row_tiles(key_tile * meta.block_n, sizes, meta)
        steps = sizes.group * (span.stop - span.start)
    return steps


@gluon.jit
def ring(step, STAGES: gl.constexpr):
    """The room of the ``step``-th tile and the parity of its use."""
    return step % STAGES, (step // STAGES) & 1


@gluon.jit
def head_of(pair, member, sizes):
    """Batch, query head, and the flat place of the query head."""
    kv_heads = sizes.heads // sizes.group
    batch = pair // kv_heads
    head = (pair % kv_heads) * sizes.group + member
    return batch, head, batch * sizes.heads + head


# --- producer ---------------------------------------------------------------------------------------


@gluon.jit
def produce(
    k, v, q, grad, sums, panel, coming, lists, sizes, tensors, programs: gl.constexpr, meta: gl.constexpr
):  # fmt: skip
    """One warp: keys and values once, then queries and gradients as soon as their rooms are free."""
    pair, key_tile = item(sizes, meta)
    first = key_tile * meta.block_n
    kv_heads = sizes.heads // sizes.group
    VECTOR: gl.constexpr = sums.top.desc.block_type.nbytes
    step = 0
    mbarrier.wait(k.empty.index(0), 1)
    expect(k, 0, 0)
    copy(k, k.full, 0, pair // kv_heads, pair % kv_heads, first, 0)
    for member in range(sizes.group):
        batch, head, flat = head_of(pair, member, sizes)
        span = span_of(key_tile, batch, head, lists, sizes, meta)
        entry = entry_of(span, 0, first, sizes, meta)
        for back in range(span.stop - span.start):
            place, parity = ring(step, meta.stages)
            row = (entry >> 1) * meta.block_m
            mbarrier.wait(q.empty.index(place), parity ^ 1)
            tell(coming, place, member, entry, batch, head, sizes, tensors, programs, meta)
            entry = entry_of(span, back + 1, first, sizes, meta)
            expect(q, place, grad.desc.block_type.nbytes + (3 if meta.uncertain else 2) * VECTOR)
            copy(q, q.full, place, batch, head, row, 0)
            copy_vector(sums.top, q.full, place, flat * sizes.padded_rows + row)
            if step == 0:
                expect(v, 0, 0)
                copy(v, v.full, 0, pair // kv_heads, pair % kv_heads, first, 0)
            copy(grad, q.full, place, batch, head, row, 0)
            copy_vector(sums.delta, q.full, place, flat * sizes.padded_rows + row)
            if meta.uncertain:
                copy_vector(sums.norm, q.full, place, flat * sizes.padded_rows + row)
            if meta.panel:
                mbarrier.wait(panel.empty.index(0), (step & 1) ^ 1)
                expect(panel, 0, 0)
                copy(panel, panel.full, 0, batch if meta.panel_batch else 0, head if meta.panel_head else 0, row, first)
            step += 1


@gluon.jit
def tell(coming, place, member, entry, batch, head, sizes, tensors, programs: gl.constexpr, meta: gl.constexpr):
    """Says what the next tile of queries is, before its room is announced as full."""
    none = gl.full([1], 0, gl.int64, gl.BlockedLayout([1], [32], [1], [0]))
    coming.entries.index(place).store(none + ((member.to(gl.int64) << 32) | entry.to(gl.int64)))
    if meta.listed:
        if (entry & 1) == 1:
            m = (entry >> 1) * meta.block_m + gl.arange(0, meta.block_m, gl.BlockedLayout([1], [32], [1], [0]))
            m = gl.minimum(m, sizes.rows - 1)
            for slot in gl.static_range(len(programs.reads)):
                if programs.reads[slot] == "row":
                    found = programs.loaders[slot](m, m, (batch.to(gl.int64),), head.to(gl.int64), m, m, *tensors)
                    coming.rows[slot].index(place).store(found.to(coming.rows[slot].dtype))


@gluon.jit
def told(coming, place):
    """Which of the query heads that share a key head, which row tile, and whether the mask cuts it."""
    found = gl.max(coming.entries.index(place).load(gl.BlockedLayout([1], [32], [gl.num_warps()], [0])), 0)
    member, entry = (found >> 32).to(gl.int32), found.to(gl.int32)
    return member, entry >> 1, (entry & 1) == 1


@gluon.jit
def expect(tiles, place, MORE: gl.constexpr):
    """Says how much will land in the free room of a tile, and beside it."""
    mbarrier.expect(tiles.full.index(place), tiles.desc.block_type.nbytes + MORE)


@gluon.jit
def copy(tiles, full, place, batch, head, row, column):
    """Asks for a tile. What lies beyond the tensor is zero."""
    copies.load(tiles.desc, [batch, head, row, column], full.index(place), tiles.room.index(place))


@gluon.jit
def copy_vector(vectors, full, place, first):
    """Asks for a number of each row. What lies beyond the last row is another head's."""
    copies.load(vectors.desc, [first], full.index(place), vectors.room.index(place))


# --- what leaves ------------------------------------------------------------------------------------


@gluon.jit
def add(dq, q, ds, coming, lists, sizes, meta: gl.constexpr):
    """One warp: adds each tile of dQ to memory, and says that what it was made of has been read.

    So it does with the gradient of a panel.
    """
    pair, key_tile = item(sizes, meta)
    for step in range(steps_of(pair, key_tile, lists, sizes, meta)):
        mbarrier.wait(dq.full.index(0), step & 1)
        member, tile, _ = told(coming, step % meta.stages)
        batch, head, flat = head_of(pair, member, sizes)
        if step > 0:
            # this step's product of dK is in flight, all of the last's are done
            mbarrier.arrive(q.empty.index((step - 1) % meta.stages), count=1)
        if meta.panel_gradient:
            where = [batch if meta.panel_batch else 0, head if meta.panel_head else 0, tile * meta.block_m,
                     key_tile * meta.block_n]  # fmt: skip
            if meta.panel_added:
                copies.add(ds.desc, where, ds.room.index(0))
            else:
                copies.store(ds.desc, where, ds.room.index(0))
        place = (flat * gl.cdiv(sizes.rows, meta.block_m) + tile) * dq.desc.block_type.shape[0]
        copies.add(dq.desc, [place, 0], dq.room.index(0))
        copies.wait(0)
        mbarrier.arrive(dq.empty.index(0), count=1)


@gluon.jit
def as_threads_have_it(found, meta: gl.constexpr):
    """A tile of dQ in an order of its own: four numbers of one thread, then the next thread's, in rows of 256.

    In the order of rows and columns two threads of eight would store to the same banks of shared memory.
    :func:`attnfuse.kernels.gluon.finish.finish` knows the order.
    """
    DOWN: gl.constexpr = meta.block_m // 16
    ACROSS: gl.constexpr = WARPS // DOWN
    FOURS: gl.constexpr = meta.head_block // ACROSS // 16
    parts = gl.reshape(found, [DOWN, 2, 8, ACROSS, FOURS, 2, 4, 2])
    return gl.reshape(gl.permute(parts, [4, 1, 0, 3, 2, 6, 5, 7]), [meta.block_m * meta.head_block // 256, 256])


@gluon.jit
def leave(dq, found, step, meta: gl.constexpr):
    """A tile of dQ to where :func:`add` takes it from."""
    ordered = as_threads_have_it(found, meta)
    mbarrier.wait(dq.empty.index(0), (step & 1) ^ 1)
    dq.room.index(0).store(ordered)
    fence_async_shared()
    mbarrier.arrive(dq.full.index(0), count=1)


@gluon.jit
def store(desc, room, found, pair, first, sizes):
    """A gradient of keys to memory through the room of its operand."""
    room.reshape([found.shape[0], found.shape[1]]).store(found.to(desc.dtype))
    fence_async_shared()
    kv_heads = sizes.heads // sizes.group
    copies.store(desc, [pair // kv_heads, pair % kv_heads, first, 0], room)


# --- one tile of scores, [keys, rows] ---------------------------------------------------------------


@gluon.jit
def scores(k, q, step, meta: gl.constexpr, s_layout: gl.constexpr):
    """``K Q^T``, in flight."""
    place, parity = ring(step, meta.stages)
    mbarrier.wait(q.full.index(place), parity)
    keys = k.room.index(0).reshape([meta.block_n, meta.head_block])
    queries = q.room.index(place).reshape([meta.block_m, meta.head_block])
    zero = gl.full([meta.block_n, meta.block_m], 0.0, gl.float32, s_layout)
    return warpgroup_mma(keys, queries.permute([1, 0]), zero, use_acc=False, is_async=True)


@gluon.jit
def of_rows(vectors, step, meta: gl.constexpr, layout: gl.constexpr):
    """A number of each row of a tile that has landed."""
    return vectors.room.index(step % meta.stages).load(layout)


@gluon.jit
def tops(sums, row, step, sizes, meta: gl.constexpr, layout: gl.constexpr):
    """Of each row what normalises its weights; of those beyond the last one that leaves nothing."""
    top = of_rows(sums.top, step, meta, layout)
    if meta.ragged_rows:
        top = gl.where(row < sizes.rows, top, float("inf"))
    return top


@gluon.jit
def read(m, n, batch, head, tensors, programs: gl.constexpr):
    """Of each capture that a whole tile reads, its values there, in as many dimensions as it varies along."""
    found = ()
    for slot in gl.static_range(len(programs.bare_reads)):
        if programs.bare_reads[slot] == "panel" or programs.bare_reads[slot] == "":
            found = found + (m,)
        else:
            found = found + (programs.loaders[slot](m, m, (batch,), head, m, n, *tensors),)
    return found


@gluon.jit
def read_of_keys(n, batch, tensors, programs: gl.constexpr):
    """Of each capture that masks read of keys, whatever the row and head, its values at this block's."""
    found = ()
    for slot in gl.static_range(len(programs.reads)):
        if programs.reads[slot] == "key":
            found = found + (programs.loaders[slot](n, n, (batch,), batch, n, n, *tensors),)
        else:
            found = found + (n,)
    return found


@gluon.jit
def masking(of_keys, coming, place, m, n, batch, head, tensors, programs: gl.constexpr, s_layout: gl.constexpr):
    """What a cut tile reads: of keys what is known already, of rows what came with the tile."""
    found = ()
    for slot in gl.static_range(len(programs.reads)):
        if programs.reads[slot] == "row":
            found = found + (gl.expand_dims(coming.rows[slot].index(place).load(gl.SliceLayout(0, s_layout)), 0),)
        elif programs.reads[slot] == "score" or programs.reads[slot] == "one":
            found = found + (programs.loaders[slot](m, m, (batch,), head, m, n, *tensors),)
        else:
            found = found + (of_keys[slot],)
    return found


@gluon.jit
def panel_of(s, panel, step, meta: gl.constexpr):
    """The tile of the capture that the producer loads; ``s`` where there is none."""
    values = s
    if meta.panel:
        mbarrier.wait(panel.full.index(0), step & 1)
        loaded = panel.room.index(0).reshape([meta.block_m, meta.block_n]).permute([1, 0])
        values = loaded.load(s.type.layout).to(gl.float32)
        # read by ordinary loads, overwritten by the copy engine
        fence_async_shared()
        mbarrier.arrive(panel.empty.index(0), count=1)
    return values


@gluon.jit
def run_program(
    PROGRAM: gl.constexpr, s, p, m, n, batch, head, found, panel, tensors, CUT: gl.constexpr, programs: gl.constexpr
):
    """One of the programs at a tile, ``found`` being what it reads."""
    READS: gl.constexpr = programs.reads if CUT else programs.bare_reads
    given = tensors.symbols
    for slot in gl.static_range(len(READS)):
        if READS[slot] == "panel":
            given = given + (panel,)
        else:
            given = given + (found[slot],)
    return PROGRAM(s, p, (batch,), head, m, n, tensors.captures, tensors.strides, given)


@gluon.jit
def cut(found, OUTSIDE: gl.constexpr, col, row, sizes, meta: gl.constexpr):
    """``OUTSIDE`` beyond the last key, and outside of the band unless the program has a fill of its own there."""
    n = gl.expand_dims(col, 1)
    m = gl.expand_dims(row, 0)
    keep = n < sizes.keys
    if meta.right and not meta.filled:
        keep = keep & (n <= m + sizes.right)
    if meta.left and not meta.filled:
        keep = keep & (n >= m + sizes.left)
    return gl.where(keep, found, OUTSIDE)


@gluon.jit
def weights(u, top, sizes, meta: gl.constexpr):
    """``2 ** (exponent * (u - top))`` of a tile."""
    if meta.huge:
        p = gl.exp2((u - top) * sizes.exponent)
    else:
        # one multiply-add feeds each exp2
        p = gl.exp2(u * sizes.exponent - top * sizes.exponent)
    return p


@gluon.jit
def halves(p, dv_layout: gl.constexpr):
    """Weights of the first and of the second half of a tile's rows, as left operands."""
    apart = gl.permute(gl.reshape(p, [p.shape[0], 2, p.shape[1] // 2]), [0, 2, 1])
    first, second = gl.split(apart)
    operand: gl.constexpr = gl.DotOperandLayout(0, dv_layout, 2)
    return gl.convert_layout(first, operand), gl.convert_layout(second, operand)


@gluon.jit
def consume(
    k, v, q, grad, sums, panel, ds, dq, dk_desc, dv_desc, coming, lists, sizes, tensors,
    programs: gl.constexpr, meta: gl.constexpr,
):  # fmt: skip
    """Both warpgroups: half of the keys each, and half of the columns of dQ."""
    BM: gl.constexpr = meta.block_m
    BN: gl.constexpr = meta.block_n
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, BM, 16])
    dk_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, meta.head_block, 16])
    dv_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, meta.value_block, 16])
    dq_layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [BM // 16, 128 // BM], [16, meta.head_block * BM // 128, 16]
    )
    row_layout: gl.constexpr = gl.SliceLayout(0, s_layout)
    dtype: gl.constexpr = q.desc.dtype
    keys = k.room.index(0).reshape([BN, meta.head_block])
    values = v.room.index(0).reshape([BN, meta.value_block])
    if meta.panel_gradient:
        # the panel's gradient leaves from here, so keys are contiguous
        ds_room = ds.room.index(0).reshape([BM, BN]).permute([1, 0])
    else:
        ds_room = ds.room.index(0)

    pair, key_tile = item(sizes, meta)
    first = key_tile * BN
    col = first + gl.arange(0, BN, gl.SliceLayout(1, s_layout))
    n = gl.expand_dims(gl.minimum(col, sizes.keys - 1), 1)
    dk = gl.full([BN, meta.head_block], 0.0, gl.float32, dk_layout)
    dv = gl.full([BN, meta.value_block], 0.0, gl.float32, dv_layout)
    steps = steps_of(pair, key_tile, lists, sizes, meta)
    mbarrier.wait(k.full.index(0), 0)
    mbarrier.wait(v.full.index(0), 0)
    batch, _, _ = head_of(pair, 0, sizes)
    batch = batch.to(gl.int64)
    of_keys = read_of_keys(n, batch, tensors, programs)
    for step in range(steps):
        place = step % meta.stages
        s = scores(k, q, step, meta, s_layout)
        grads = grad.room.index(place).reshape([BM, meta.value_block])
        zero = gl.full([BN, BM], 0.0, gl.float32, s_layout)
        dp = warpgroup_mma(values, grads.permute([1, 0]), zero, use_acc=False, is_async=True)
        member, tile, partial = told(coming, place)
        _, head, _ = head_of(pair, member, sizes)
        head = head.to(gl.int64)
        row = tile * BM + gl.arange(0, BM, row_layout)
        m = gl.expand_dims(gl.minimum(row, sizes.rows - 1), 0)
        # of captures that only the mask reads, a whole tile needs nothing
        found = read(m, n, batch, head, tensors, programs)
        top = row
        if meta.early:
            top = tops(sums, row, step, sizes, meta, row_layout)
        s = warpgroup_mma_wait(1, deps=[s])
        panel_values = panel_of(s, panel, step, meta)
        if meta.listed:
            if partial:
                asked = masking(of_keys, coming, place, m, n, batch, head, tensors, programs, s_layout)
                u = run_program(programs.score, s, s, m, n, batch, head, asked, panel_values, tensors, True, programs)
                u = cut(u, float("-inf"), col, row, sizes, meta)
            else:
                u = run_program(programs.bare, s, s, m, n, batch, head, found, panel_values, tensors, False, programs)
        else:
            u = run_program(programs.bare, s, s, m, n, batch, head, found, panel_values, tensors, False, programs)
            if meta.left or meta.right or meta.ragged:
                if partial:
                    u = cut(u, float("-inf"), col, row, sizes, meta)
        if not meta.early:
            top = tops(sums, row, step, sizes, meta, row_layout)
        p = weights(u, gl.expand_dims(top, 0), sizes, meta)
        if meta.uncertain:
            # of other rows it is one
            if sizes.strange != 0:
                norm = of_rows(sums.norm, step, meta, row_layout)
                if meta.ragged_rows:
                    norm = gl.where(row < sizes.rows, norm, 0.0)
                p = p * gl.expand_dims(norm, 0)
        p_first, p_second = halves(p.to(dtype), dv_layout)
        dv = warpgroup_mma(p_first, grads.slice(0, BM // 2, 0), dv, is_async=True)

        delta = of_rows(sums.delta, step, meta, row_layout)
        if meta.ragged_rows:
            delta = gl.where(row < sizes.rows, delta, 0.0)
        dp = warpgroup_mma_wait(1, deps=[dp])
        dx = p * (dp - gl.expand_dims(delta, 0))
        if meta.uncertain and (meta.left or meta.right or meta.ragged or meta.listed):
            # the weights of a row that keeps no key are NaN, its masked scores have no gradient
            if partial & (sizes.strange != 0):
                dx = cut(dx, 0.0, col, row, sizes, meta)
                if meta.listed:
                    asked = masking(of_keys, coming, place, m, n, batch, head, tensors, programs, s_layout)
                    dx = run_program(programs.kept, s, dx, m, n, batch, head, asked, s, tensors, True, programs)
        # of other rows a masked score's weight is zero
        dx = run_program(programs.pulled, s, dx, m, n, batch, head, found, panel_values, tensors, False, programs)
        dx = dx.to(dtype)
        dx_half = gl.convert_layout(dx, gl.DotOperandLayout(0, dk_layout, 2))
        queries = q.room.index(place).reshape([BM, meta.head_block])
        if meta.panel_gradient:
            # the last tile has left
            mbarrier.wait(dq.empty.index(0), (step & 1) ^ 1)
        ds_room.store(dx)
        fence_async_shared()
        none = gl.full([BM, meta.head_block], 0.0, gl.float32, dq_layout)
        dq_tile = warpgroup_mma(ds_room.permute([1, 0]), keys, none, use_acc=False, is_async=True)
        dv = warpgroup_mma(p_second, grads.slice(BM // 2, BM // 2, 0), dv, is_async=True)
        dk = warpgroup_mma(dx_half, queries, dk, is_async=True)
        dq_tile, p_first = warpgroup_mma_wait(2, deps=[dq_tile, p_first])
        leave(dq, dq_tile, step, meta)
        dv, dk, p_second, dx_half = warpgroup_mma_wait(0, deps=[dv, dk, p_second, dx_half])
    store(dv_desc, v.room.index(0), dv, pair, first, sizes)
    store(dk_desc, k.room.index(0), dk * sizes.factor, pair, first, sizes)
    copies.wait(0)


# --- kernel -----------------------------------------------------------------------------------------


@gluon.jit
def barriers_for(COUNT: gl.constexpr):
    """So many barriers, each complete after one arrival."""
    found = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(found.index(i), count=1)
    return found


@gluon.jit
def tiles_for(desc, COUNT: gl.constexpr):
    """Room for so many tiles."""
    room = gl.allocate_shared_memory(desc.dtype, [COUNT] + desc.block_type.shape, desc.layout)
    return Tiles(desc, room, barriers_for(COUNT), barriers_for(COUNT))


@gluon.jit
def beside_for(desc, COUNT: gl.constexpr):
    """Room for so many tiles or vectors."""
    return Beside(desc, gl.allocate_shared_memory(desc.dtype, [COUNT] + desc.block_type.shape, desc.layout))


@gluon.jit
def rows_for(captures, COUNT: gl.constexpr, programs: gl.constexpr, meta: gl.constexpr):
    """Room for what masks read of so many tiles' rows; of other captures a placeholder."""
    found = ()
    for slot in gl.static_range(len(programs.reads)):
        if meta.listed and programs.reads[slot] == "row":
            dtype: gl.constexpr = captures[slot].dtype.element_ty
            kept: gl.constexpr = gl.float32 if dtype.is_floating() else gl.int64 if dtype == gl.int64 else gl.int32
            flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
            found = found + (gl.allocate_shared_memory(kept, [COUNT, meta.block_m], flat),)
        else:
            found = found + (slot,)
    return found


@gluon.jit(
    do_not_specialize=[
        "heads", "group", "rows", "padded_rows", "keys", "left", "right", "key_tiles", "pairs", "together",
        "list_batch", "list_head", "list_length", "exponent", "factor",
    ],
    do_not_specialize_on_alignment=["strange", "lists"],
)  # fmt: skip
def attention_backward(
    q_desc, k_desc, v_desc, grad_desc, top_desc, norm_desc, delta_desc, panel_desc, dq_desc, dk_desc, dv_desc,
    dpanel_desc, strange, lists, captures, strides, symbols,
    heads, group, rows, padded_rows, keys, left, right, key_tiles, pairs, together, list_batch, list_head, list_length,
    exponent, factor,
    programs: gl.constexpr, meta: gl.constexpr,
):  # fmt: skip
    """Adds to ``dq``, ordered by :func:`as_threads_have_it`, not yet scaled; writes ``dk`` and ``dv [B, Hk, N, D]``.

    ``top``, ``norm`` and ``delta [B * H * padded_rows]`` are what :func:`attnfuse.kernels.triton.backward.row_sums`
    finds. ``programs.bare`` makes logits of scores, ``.pulled`` the gradient of scores of that of logits; where tiles
    are listed, ``.score`` is the program of those that the mask cuts, and ``.kept`` zero where the mask is. ``.reads``,
    ``.bare_reads`` and ``.loaders`` are as in the forward, ``"one"`` being what varies along neither rows nor keys.
    ``panel_desc`` is the capture that is read in panels, ``dpanel_desc`` its gradient, written or added to. ``lists``
    are the row tiles of every key tile, where the mask is no band.
    """
    k = tiles_for(k_desc, 1)
    v = tiles_for(v_desc, 1)
    q = tiles_for(q_desc, meta.stages)
    grad = beside_for(grad_desc, meta.stages)
    top = beside_for(top_desc, meta.stages)
    delta = beside_for(delta_desc, meta.stages)
    norm = top
    everything = 0
    if meta.uncertain:
        norm = beside_for(norm_desc, meta.stages)
        everything = gl.load(strange)
    panel = q
    if meta.panel:
        panel = tiles_for(panel_desc, 1)
    dq = tiles_for(dq_desc, 1)
    if meta.panel_gradient:
        ds = beside_for(dpanel_desc, 1)
    else:
        ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([meta.block_n, meta.block_m], q_desc.dtype)
        ds = Beside(dq_desc, gl.allocate_shared_memory(q_desc.dtype, [1, meta.block_n, meta.block_m], ds_layout))
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    entries = gl.allocate_shared_memory(gl.int64, [meta.stages, 1], flat)
    coming = Coming(entries, rows_for(captures, meta.stages, programs, meta))
    sums = Sums(top, norm, delta)
    sizes = Sizes(
        heads, group, rows, padded_rows, keys, left, right, key_tiles, pairs, together, list_batch, list_head,
        list_length, exponent, factor, everything,
    )  # fmt: skip
    tensors = Tensors(captures, strides, symbols)
    gl.warp_specialize(
        [
            (
                consume,
                (k, v, q, grad, sums, panel, ds, dq, dk_desc, dv_desc, coming, lists, sizes, tensors, programs, meta),
            ),
            (produce, (k, v, q, grad, sums, panel, coming, lists, sizes, tensors, programs, meta)),
            (add, (dq, q, ds, coming, lists, sizes, meta)),
        ],
        [1, 1],
        [24, 24],
    )
