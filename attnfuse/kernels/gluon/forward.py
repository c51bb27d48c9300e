"""The forward body: one warp loads tiles by TMA, two or three warpgroups each hold 64 query rows.

A consumer works on its rows in one of two ways. *Overlapped*: the product of the next tile's scores is in flight with
that of the last tile's output, and the softmax of one tile runs beside the output of another (FlashAttention-3,
https://arxiv.org/abs/2407.08608). *In turn*: scores, softmax, output; with fewer registers there are more consumers,
and one multiplies while another takes exponents. Key tiles are walked from the last to the first, and those that the
band cuts or that the keys end in are masked.

Barriers are named for what they protect: ``*_full`` says that a tile has landed, ``*_empty`` that its room is free.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

#: Query rows of one consumer: those of one wgmma.
ROWS = gl.constexpr(64)
LN_2 = gl.constexpr(0.6931471805599453)


class Sizes(NamedTuple):
    """The numbers of a launch. ``group`` query heads share a key head; ``pairs`` are batches times heads."""

    heads: Any
    group: Any
    kv_batch: Any
    rows: Any
    keys: Any
    left: Any
    right: Any
    row_tiles: Any
    pairs: Any
    together: Any
    scale: Any


class Tiles(NamedTuple):
    """Shared memory for tiles of one operand, and for each a barrier when it has landed and when its room is free."""

    desc: Any
    room: Any
    full: Any
    empty: Any


class Tensors(NamedTuple):
    """What programs read besides scores and indices."""

    captures: Any
    strides: Any
    symbols: Any


class Rows(NamedTuple):
    """The rows of a consumer: their indices, and the batch indices and the head that programs read."""

    index: Any
    batch: Any
    head: Any


class Span(NamedTuple):
    """Key tiles: ``start..stop`` are reached by some row, ``whole_start..whole_stop`` entirely, by every row."""

    start: Any
    whole_start: Any
    whole_stop: Any
    stop: Any


# --- which tile is which ----------------------------------------------------------------------------


@gluon.jit
def item_of(index, sizes, meta: gl.constexpr):
    """Pair of batch and head, and row tile, of work item ``index``.

    Longest first walks the row tiles of ``together`` pairs, whose keys and values stay in the L2 cache, from the last
    to the first.
    """
    if meta.longest_first:
        group = index // (sizes.together * sizes.row_tiles)
        inside = index - group * sizes.together * sizes.row_tiles
        size = gl.minimum(sizes.together, sizes.pairs - group * sizes.together)
        pair = group * sizes.together + inside % size
        row_tile = sizes.row_tiles - 1 - inside // size
    else:
        pair = index // sizes.row_tiles
        row_tile = index % sizes.row_tiles
    return pair, row_tile


@gluon.jit
def key_tiles(first, sizes, meta: gl.constexpr):
    """The :class:`Span` of a row tile: at least one tile, so that a row without keys divides zero by zero."""
    last = first + meta.consumers * ROWS - 1
    stop_key = sizes.keys
    whole_key = sizes.keys
    if meta.right:
        stop_key = gl.maximum(gl.minimum(sizes.keys, last + sizes.right + 1), 1)
        whole_key = gl.maximum(gl.minimum(sizes.keys, first + sizes.right + 1), 0)
    start = 0
    whole_start = 0
    if meta.left:
        start = gl.minimum(gl.maximum(first + sizes.left, 0), sizes.keys - 1) // meta.block_n
        whole_start = gl.cdiv(gl.maximum(last + sizes.left, 0), meta.block_n)
    stop = gl.maximum(gl.cdiv(stop_key, meta.block_n), start + 1)
    return Span(start, whole_start, whole_key // meta.block_n, stop)


@gluon.jit
def ring(step, STAGES: gl.constexpr):
    """The room of the ``step``-th tile and the parity of its use."""
    return step % STAGES, (step // STAGES) & 1


# --- producer ---------------------------------------------------------------------------------------


@gluon.jit
def produce(q, k, v, panel, coming, sizes, counter, meta: gl.constexpr):
    """One warp: asks for each tile as soon as its room is free."""
    CONSUMERS: gl.constexpr = meta.consumers
    index = gl.program_id(0)
    turn = 0
    step = 0
    while index < sizes.pairs * sizes.row_tiles:
        following = announce(index, turn, coming, counter, sizes.pairs * sizes.row_tiles, meta)
        pair, row_tile = item_of(index, sizes, meta)
        batch = pair // sizes.heads
        head = pair % sizes.heads
        # a batch dimension of 1 is shared by all
        kv_batch = gl.minimum(batch, sizes.kv_batch - 1)
        kv_head = head // sizes.group
        first = row_tile * CONSUMERS * ROWS
        span = key_tiles(first, sizes, meta)
        for which in gl.static_range(CONSUMERS):
            fetch(q, which, turn & 1, batch, head, first + which * ROWS, 0)
        for back in range(span.stop - span.start):
            key = (span.stop - 1 - back) * meta.block_n
            place, parity = ring(step, meta.stages)
            fetch(k, place, parity, kv_batch, kv_head, key, 0)
            if meta.panel:
                panel_batch = batch if meta.panel_batch else 0
                panel_head = head if meta.panel_head else 0
                for which in gl.static_range(CONSUMERS):
                    fetch(panel, which, step & 1, panel_batch, panel_head, first + which * ROWS, key)
            fetch(v, place, parity, kv_batch, kv_head, key, 0)
            step += 1
        index = following
        turn += 1


@gluon.jit
def fetch(tiles, place, parity, batch, head, row, column):
    """Asks for a tile once its room is free. What lies beyond the tensor is zero."""
    mbarrier.wait(tiles.empty.index(place), parity ^ 1)
    mbarrier.expect(tiles.full.index(place), tiles.desc.block_type.nbytes)
    tma.async_copy_global_to_shared(
        tiles.desc, [batch, head, row, column], tiles.full.index(place), tiles.room.index(place)
    )


@gluon.jit
def announce(index, turn, coming, counter, items, meta: gl.constexpr):
    """The next work item: the counter's, which the consumers are told, or one grid further on."""
    following = index + gl.num_programs(0)
    if meta.dynamic:
        taken = gl.atomic_add(counter, 1, sem="relaxed")
        following = taken + gl.num_programs(0)
        if taken == items - 1:
            # nobody will ask again: the counter is ready for the next launch
            gl.store(counter, 0)
        place, parity = ring(turn, 2)
        mbarrier.wait(coming.empty.index(place), parity ^ 1)
        one = gl.full([1], 0, gl.int32, gl.BlockedLayout([1], [32], [1], [0]))
        coming.room.index(place).store(one + following)
        mbarrier.arrive(coming.full.index(place), count=1)
    return following


@gluon.jit
def announced(index, turn, coming, meta: gl.constexpr):
    """The next work item, as a consumer learns it."""
    following = index + gl.num_programs(0)
    if meta.dynamic:
        place, parity = ring(turn, 2)
        mbarrier.wait(coming.full.index(place), parity)
        following = gl.max(coming.room.index(place).load(gl.BlockedLayout([1], [32], [4], [0])), 0)
        mbarrier.arrive(coming.empty.index(place), count=1)
    return following


# --- one tile ---------------------------------------------------------------------------------------


@gluon.jit
def scores(query, k, step, meta: gl.constexpr, s_layout: gl.constexpr):
    """``Q K^T`` of a tile, in flight."""
    place, parity = ring(step, meta.stages)
    mbarrier.wait(k.full.index(place), parity)
    zero = gl.full([ROWS, meta.block_n], 0.0, gl.float32, s_layout)
    keys = k.room.index(place).reshape([meta.block_n, meta.head_block])
    return warpgroup_mma(query, keys.permute([1, 0]), zero, use_acc=False, is_async=True)


@gluon.jit
def output(o, p, v, step, meta: gl.constexpr):
    """``O + P V`` of a tile, in flight."""
    place, parity = ring(step, meta.stages)
    mbarrier.wait(v.full.index(place), parity)
    return warpgroup_mma(p, v.room.index(place).reshape([meta.block_n, meta.value_block]), o, is_async=True)


@gluon.jit
def release(tiles, step, meta: gl.constexpr):
    """The room of a tile is free."""
    mbarrier.arrive(tiles.empty.index(step % meta.stages), count=1)


@gluon.jit
def hold(v, step, meta: gl.constexpr):
    """Keeps what comes before it before it.

    ptxas moves the wait for a product up, past the exponents that should run beside the product, but not out of its
    basic block. Waiting again for a tile that has landed ends the block, for some 30 cycles.
    """
    if meta.held:
        place, parity = ring(step, meta.stages)
        mbarrier.wait(v.full.index(place), parity)


@gluon.jit
def rows_read(rows, tensors, sizes, programs: gl.constexpr):
    """Of each capture that does not vary along the keys, its values at these rows; of others a placeholder."""
    m = gl.expand_dims(gl.minimum(rows.index, sizes.rows - 1), 1)
    found = ()
    for slot in gl.static_range(len(programs.reads)):
        if programs.reads[slot] == "row":
            found = found + (programs.loaders[slot](m, m, rows.batch, rows.head, m, m, *tensors),)
        else:
            found = found + (rows.index,)
    return found


@gluon.jit
def keys_read(tile, found, rows, tensors, sizes, programs: gl.constexpr, meta: gl.constexpr, s_layout: gl.constexpr):
    """``found`` with the values at this tile's keys, ``[1, BN]``, of each capture that varies along the keys alone.

    Loaded once by each thread, not by each that holds a copy.
    """
    n = tile * meta.block_n + gl.arange(0, meta.block_n, gl.BlockedLayout([1], [32], [4], [0]))
    n = gl.minimum(n, sizes.keys - 1)
    read = ()
    for slot in gl.static_range(len(programs.reads)):
        if programs.reads[slot] == "key":
            values = programs.loaders[slot](n, n, rows.batch, rows.head, n, n, *tensors)
            read = read + (gl.expand_dims(gl.convert_layout(values, gl.SliceLayout(0, s_layout)), 0),)
        else:
            read = read + (found[slot],)
    return read


@gluon.jit
def panel_of(s, panel, which: gl.constexpr, step, meta: gl.constexpr):
    """The tile of the capture that the producer loads for each tile of scores; ``s`` where there is none."""
    values = s
    if meta.panel:
        mbarrier.wait(panel.full.index(which), step & 1)
        values = panel.room.index(which).reshape([ROWS, meta.block_n]).load(s.type.layout).to(gl.float32)
        # read by ordinary loads, overwritten by the copy engine
        fence_async_shared()
        mbarrier.arrive(panel.empty.index(which), count=1)
    return values


@gluon.jit
def logits(
    s, tile, rows, read, panel, sizes, tensors, programs: gl.constexpr, meta: gl.constexpr, PARTIAL: gl.constexpr
):  # fmt: skip
    """The score program of key tile ``tile``; in a partial tile -inf outside of the band and beyond the last key."""
    col = tile * meta.block_n + gl.arange(0, meta.block_n, gl.SliceLayout(0, s.type.layout))
    if programs.score is not None:
        n = gl.expand_dims(gl.minimum(col, sizes.keys - 1) if PARTIAL else col, 0)
        m = gl.expand_dims(gl.minimum(rows.index, sizes.rows - 1), 1)
        given = tensors.symbols
        for slot in gl.static_range(len(programs.reads)):
            if programs.reads[slot] == "score":
                given = given + (programs.loaders[slot](s, s, rows.batch, rows.head, m, n, *tensors),)
            elif programs.reads[slot] == "panel":
                given = given + (panel,)
            else:
                given = given + (read[slot],)
        s = programs.score(s, s, rows.batch, rows.head, m, n, tensors.captures, tensors.strides, given)
    if PARTIAL:
        stop = gl.full([ROWS], 0, gl.int32, rows.index.type.layout) + (sizes.keys - 1)
        if meta.right:
            stop = gl.minimum(stop, rows.index + sizes.right)
        keep = gl.expand_dims(col, 0) <= gl.expand_dims(stop, 1)
        if meta.left:
            keep = keep & (gl.expand_dims(col, 0) >= gl.expand_dims(rows.index + sizes.left, 1))
        s = gl.where(keep, s, float("-inf"))
    return s


@gluon.jit
def either(s, tile, span, rows, read, panel, sizes, tensors, programs: gl.constexpr, meta: gl.constexpr):
    """:func:`logits` of a tile that may be partial.

    One loop with a branch, not a loop for each kind of tile: ptxas 12.8 then reads a uniform register that a skipped
    loop should have written.
    """
    if (tile >= span.whole_stop) | (tile < span.whole_start):
        s = logits(s, tile, rows, read, panel, sizes, tensors, programs, meta, True)
    else:
        s = logits(s, tile, rows, read, panel, sizes, tensors, programs, meta, False)
    return s


@gluon.jit
def weights(s, top, total, scale, meta: gl.constexpr):
    """Online softmax of one tile: its weights, the new top and total of each row, and what shrinks the old."""
    new_top = gl.maximum(top, gl.max(s, 1))
    # a row that has seen no key yet: -inf - -inf
    centre = gl.where(new_top == float("-inf"), 0.0, new_top)
    if meta.huge:
        p = gl.exp2((s - gl.expand_dims(centre, 1)) * scale)
        shrink = gl.exp2((top - centre) * scale)
    else:
        # one multiply-add feeds each exp2
        shift = centre * scale
        p = gl.exp2(s * scale - gl.expand_dims(shift, 1))
        shrink = gl.exp2(top * scale - shift)
    return p, new_top, total * shrink + gl.sum(p, 1), shrink


@gluon.jit
def shrunk(o, shrink):
    """``o`` with each row multiplied."""
    return o * gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, o.type.layout)), 1)


@gluon.jit
def sunk(rows, sizes, tensors, programs: gl.constexpr):
    """Top and total of rows that have seen nothing but their sink."""
    top = gl.full([ROWS], float("-inf"), gl.float32, rows.index.type.layout)
    total = gl.full([ROWS], 0.0, gl.float32, rows.index.type.layout)
    if programs.sink is not None:
        m = gl.expand_dims(gl.minimum(rows.index, sizes.rows - 1), 1)
        logit = programs.sink(m, m, rows.batch, rows.head, m, m, *tensors)
        top = gl.max(gl.expand_dims(total, 1) + logit, 1)
        total = total + 1.0
    return top, total


# --- one work item ----------------------------------------------------------------------------------


@gluon.jit
def overlapped(
    query, q_empty, k, v, panel, step, span, rows, sizes, tensors, programs: gl.constexpr, which: gl.constexpr,
    dtype: gl.constexpr, meta: gl.constexpr, s_layout: gl.constexpr, o_layout: gl.constexpr,
):  # fmt: skip
    """``O``, top and total of 64 rows, and the step after them: scores of one tile beside the output of the last."""
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    MASKED: gl.constexpr = meta.left or meta.right
    found = rows_read(rows, tensors, sizes, programs)
    read = keys_read(span.stop - 1, found, rows, tensors, sizes, programs, meta, s_layout)
    s = warpgroup_mma_wait(0, deps=[scores(query, k, step, meta, s_layout)])
    release(k, step, meta)
    top, total = sunk(rows, sizes, tensors, programs)
    values = panel_of(s, panel, which, step, meta)
    s = logits(s, span.stop - 1, rows, read, values, sizes, tensors, programs, meta, MASKED or meta.ragged)
    p, top, total, shrink = weights(s, top, total, sizes.scale, meta)
    p = gl.convert_layout(p.to(dtype), p_layout)
    o = gl.full([ROWS, meta.value_block], 0.0, gl.float32, o_layout)
    step += 1
    for back in range(span.stop - 1 - span.start):
        tile = span.stop - 2 - back
        read = keys_read(tile, found, rows, tensors, sizes, programs, meta, s_layout)
        s = scores(query, k, step, meta, s_layout)
        o = output(o, p, v, step - 1, meta)
        s = warpgroup_mma_wait(1, deps=[s])
        release(k, step, meta)
        values = panel_of(s, panel, which, step, meta)
        if MASKED:
            s = either(s, tile, span, rows, read, values, sizes, tensors, programs, meta)
        else:
            s = logits(s, tile, rows, read, values, sizes, tensors, programs, meta, False)
        new_p, top, total, shrink = weights(s, top, total, sizes.scale, meta)
        new_p = gl.convert_layout(new_p.to(dtype), p_layout)
        hold(v, step - 1, meta)
        o, p, new_p = warpgroup_mma_wait(0, deps=[o, p, new_p])
        release(v, step - 1, meta)
        o = shrunk(o, shrink)
        p = new_p
        step += 1
    if not meta.shared_out:
        mbarrier.arrive(q_empty, count=1)
    o, p = warpgroup_mma_wait(0, deps=[output(o, p, v, step - 1, meta), p])
    release(v, step - 1, meta)
    return o, top, total, step


@gluon.jit
def in_turn(
    query, q_empty, k, v, panel, step, span, rows, sizes, tensors, programs: gl.constexpr, which: gl.constexpr,
    dtype: gl.constexpr, meta: gl.constexpr, s_layout: gl.constexpr, o_layout: gl.constexpr,
):  # fmt: skip
    """As :func:`overlapped`, with one product in flight at a time."""
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    top, total = sunk(rows, sizes, tensors, programs)
    o = gl.full([ROWS, meta.value_block], 0.0, gl.float32, o_layout)
    found = rows_read(rows, tensors, sizes, programs)
    for back in range(span.stop - span.start):
        tile = span.stop - 1 - back
        read = keys_read(tile, found, rows, tensors, sizes, programs, meta, s_layout)
        s = warpgroup_mma_wait(0, deps=[scores(query, k, step, meta, s_layout)])
        release(k, step, meta)
        values = panel_of(s, panel, which, step, meta)
        if meta.left or meta.right or meta.ragged:
            s = either(s, tile, span, rows, read, values, sizes, tensors, programs, meta)
        else:
            s = logits(s, tile, rows, read, values, sizes, tensors, programs, meta, False)
        p, top, total, shrink = weights(s, top, total, sizes.scale, meta)
        o = output(shrunk(o, shrink), gl.convert_layout(p.to(dtype), p_layout), v, step, meta)
        o = warpgroup_mma_wait(0, deps=[o])
        release(v, step, meta)
        step += 1
    if not meta.shared_out:
        mbarrier.arrive(q_empty, count=1)
    return o, top, total, step


@gluon.jit
def store(o, top, total, room, o_desc, lse, pair, first, rows, sizes, meta: gl.constexpr):
    """Rows divided by their totals, to memory by TMA; the copy may still read ``room`` on return."""
    tma.store_wait(0)
    room.reshape([ROWS, meta.value_block]).store(shrunk(o, 1.0 / total).to(o_desc.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(o_desc, [pair // sizes.heads, pair % sizes.heads, first, 0], room)
    if meta.lse:
        natural = top * (sizes.scale * LN_2) + gl.log2(total) * LN_2
        gl.store(lse + pair.to(gl.int64) * sizes.rows + rows.index, natural, mask=rows.index < sizes.rows)


@gluon.jit
def consume(
    q, k, v, panel, coming, sizes, tensors, o_desc, o_room, lse,
    programs: gl.constexpr, which: gl.constexpr, meta: gl.constexpr,
):  # fmt: skip
    """One warpgroup: 64 query rows of each work item."""
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, meta.block_n, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, meta.value_block, 16])
    work: gl.constexpr = overlapped if meta.overlapped else in_turn
    query = q.room.index(which).reshape([ROWS, meta.head_block])
    index = gl.program_id(0)
    turn = 0
    step = 0
    while index < sizes.pairs * sizes.row_tiles:
        pair, row_tile = item_of(index, sizes, meta)
        first = row_tile * meta.consumers * ROWS
        batch = (pair // sizes.heads).to(gl.int64)
        head = (pair % sizes.heads).to(gl.int64)
        rows = Rows(first + which * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, s_layout)), (batch,), head)
        mbarrier.wait(q.full.index(which), turn & 1)
        o, top, total, step = work(
            query, q.empty.index(which), k, v, panel, step, key_tiles(first, sizes, meta), rows, sizes, tensors,
            programs, which, q.desc.dtype, meta, s_layout, o_layout,
        )  # fmt: skip
        store(o, top, total, o_room.index(which), o_desc, lse, pair, first + which * ROWS, rows, sizes, meta)
        if meta.shared_out:
            tma.store_wait(0)
            mbarrier.arrive(q.empty.index(which), count=1)
        index = announced(index, turn, coming, meta)
        turn += 1
    tma.store_wait(0)


# --- kernel -----------------------------------------------------------------------------------------


@gluon.jit
def barriers_for(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """So many barriers, each complete after so many arrivals."""
    found = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(found.index(i), count=ARRIVALS)
    return found


@gluon.jit
def tiles_for(desc, COUNT: gl.constexpr, READERS: gl.constexpr):
    """Room for so many tiles, each free again when all its readers have said so."""
    room = gl.allocate_shared_memory(desc.dtype, [COUNT] + desc.block_type.shape, desc.layout)
    return Tiles(desc, room, barriers_for(COUNT, 1), barriers_for(COUNT, READERS))


@gluon.jit(
    do_not_specialize=[
        "heads", "group", "kv_batch", "rows", "keys", "left", "right", "row_tiles", "pairs", "together", "scale",
    ],
    do_not_specialize_on_alignment=["lse", "counter"],
)  # fmt: skip
def attention_forward(
    q_desc, k_desc, v_desc, o_desc, panel_desc, lse, counter, captures, strides, symbols,
    heads, group, kv_batch, rows, keys, left, right, row_tiles, pairs, together, scale,
    programs: gl.constexpr, meta: gl.constexpr,
):  # fmt: skip
    """``out`` and, where asked for, ``lse [B, H, M]`` of one attention, operands ``[B, H, N, D]``.

    Row ``m`` keeps keys ``m + left <= n <= m + right``. ``programs.score`` makes logits of scores and ``.sink`` one of
    a row (:mod:`attnfuse.kernels.triton.text`), both in units of ``scale``, which makes them powers of two; the values
    of captures come after the symbols, read as ``.reads`` says. ``panel_desc`` is the capture that is read in panels.
    """
    C: gl.constexpr = meta.consumers
    R: gl.constexpr = meta.registers
    q = tiles_for(q_desc, C, 1)
    k = tiles_for(k_desc, meta.stages, C)
    v = tiles_for(v_desc, meta.stages, C)
    panel = q
    if meta.panel:
        panel = tiles_for(panel_desc, C, 1)
    o_room = q.room
    if not meta.shared_out:
        o_room = gl.allocate_shared_memory(o_desc.dtype, [C] + o_desc.block_type.shape, o_desc.layout)
    following = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    coming = Tiles(counter, following, barriers_for(2, 1), barriers_for(2, C))
    sizes = Sizes(heads, group, kv_batch, rows, keys, left, right, row_tiles, pairs, together, scale)
    tensors = Tensors(captures, strides, symbols)
    if C == 2:
        gl.warp_specialize(
            [
                (consume, (q, k, v, panel, coming, sizes, tensors, o_desc, o_room, lse, programs, 0, meta)),
                (consume, (q, k, v, panel, coming, sizes, tensors, o_desc, o_room, lse, programs, 1, meta)),
                (produce, (q, k, v, panel, coming, sizes, counter, meta)),
            ],
            [4, 1],
            [R, 24],
        )
    else:
        gl.warp_specialize(
            [
                (consume, (q, k, v, panel, coming, sizes, tensors, o_desc, o_room, lse, programs, 0, meta)),
                (consume, (q, k, v, panel, coming, sizes, tensors, o_desc, o_room, lse, programs, 1, meta)),
                (consume, (q, k, v, panel, coming, sizes, tensors, o_desc, o_room, lse, programs, 2, meta)),
                (produce, (q, k, v, panel, coming, sizes, counter, meta)),
            ],
            [4, 4, 1],
            [R, R, 24],
        )
