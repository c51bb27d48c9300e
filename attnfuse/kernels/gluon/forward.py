"""The forward body: one warp loads tiles by TMA, two or three warpgroups each hold 64 query rows.

A consumer works on its rows in one of two ways. *Overlapped*: the product of the next tile's scores is in flight with
that of the last tile's output, and the softmax of one tile runs beside the output of another (FlashAttention-3,
https://arxiv.org/abs/2407.08608). *In turn*: scores, softmax, output; with fewer registers there are more consumers,
and one multiplies while another takes exponents. Key tiles are walked from the last to the first, and those that the
band cuts or that the keys end in are masked.

Barriers are named for what they protect: ``*_full`` says that a tile has landed, ``*_empty`` that its room is free.
"""

from __future__ import annotations

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


# --- which tile is which ----------------------------------------------------------------------------


@gluon.jit
def item_of(index, row_tiles, pairs, together, LONGEST_FIRST: gl.constexpr):
    """Pair of batch and head, and row tile, of work item ``index``.

    Longest first walks the row tiles of ``together`` pairs, whose keys and values stay in the L2 cache, from the last
    to the first.
    """
    if LONGEST_FIRST:
        group = index // (together * row_tiles)
        inside = index - group * together * row_tiles
        size = gl.minimum(together, pairs - group * together)
        pair = group * together + inside % size
        row_tile = row_tiles - 1 - inside // size
    else:
        pair = index // row_tiles
        row_tile = index % row_tiles
    return pair, row_tile


@gluon.jit
def key_tiles(first, keys, left, right, meta: gl.constexpr):
    """``start, whole_start, whole_stop, stop``: key tiles that a row tile reaches, and those it reaches entirely.

    At least one tile is reached, so that a row without keys divides zero by zero.
    """
    last = first + meta.consumers * ROWS - 1
    stop_key = keys
    whole_key = keys
    if meta.right:
        stop_key = gl.maximum(gl.minimum(keys, last + right + 1), 1)
        whole_key = gl.maximum(gl.minimum(keys, first + right + 1), 0)
    start = 0
    whole_start = 0
    if meta.left:
        start = gl.minimum(gl.maximum(first + left, 0), keys - 1) // meta.block_n
        whole_start = gl.cdiv(gl.maximum(last + left, 0), meta.block_n)
    stop = gl.maximum(gl.cdiv(stop_key, meta.block_n), start + 1)
    return start, whole_start, whole_key // meta.block_n, stop


@gluon.jit
def ring(step, STAGES: gl.constexpr):
    """The room of the ``step``-th tile and the parity of its use."""
    return step % STAGES, (step // STAGES) & 1


# --- producer ---------------------------------------------------------------------------------------


@gluon.jit
def produce(shared, counter, meta: gl.constexpr):
    """One warp: asks for each tile as soon as its room is free."""
    descriptors, rooms, barriers, sizes, tensors, lse = shared
    q_desc, k_desc, v_desc, o_desc = descriptors
    q_room, k_room, v_room, o_room, next_room = rooms
    q_full, q_empty, k_full, k_empty, v_full, v_empty, next_full, next_empty = barriers
    heads, group, kv_batch, rows, keys, left, right, row_tiles, pairs, together, scale = sizes
    CONSUMERS: gl.constexpr = meta.consumers
    index = gl.program_id(0)
    turn = 0
    step = 0
    while index < pairs * row_tiles:
        following = announce(index, turn, next_room, next_full, next_empty, counter, pairs * row_tiles, meta)
        pair, row_tile = item_of(index, row_tiles, pairs, together, meta.longest_first)
        batch = pair // heads
        head = pair % heads
        # a batch dimension of 1 is shared by all
        kv_batch_index = gl.minimum(batch, kv_batch - 1)
        first = row_tile * CONSUMERS * ROWS
        start, whole_start, whole_stop, stop = key_tiles(first, keys, left, right, meta)
        for which in gl.static_range(CONSUMERS):
            mbarrier.wait(q_empty.index(which), (turn & 1) ^ 1)
            fetch(q_desc, batch, head, first + which * ROWS, q_room.index(which), q_full.index(which))
        for back in range(stop - start):
            key = (stop - 1 - back) * meta.block_n
            place, parity = ring(step, meta.stages)
            mbarrier.wait(k_empty.index(place), parity ^ 1)
            fetch(k_desc, kv_batch_index, head // group, key, k_room.index(place), k_full.index(place))
            mbarrier.wait(v_empty.index(place), parity ^ 1)
            fetch(v_desc, kv_batch_index, head // group, key, v_room.index(place), v_full.index(place))
            step += 1
        index = following
        turn += 1


@gluon.jit
def fetch(descriptor, batch, head, row, room, full):
    """Asks for a tile; ``full`` completes when it has landed. Rows beyond the last are zero."""
    mbarrier.expect(full, descriptor.block_type.nbytes)
    tma.async_copy_global_to_shared(descriptor, [batch, head, row, 0], full, room)


@gluon.jit
def announce(index, turn, next_room, next_full, next_empty, counter, items, meta: gl.constexpr):
    """The next work item: the counter's, which the consumers are told, or one grid further on."""
    following = index + gl.num_programs(0)
    if meta.dynamic:
        taken = gl.atomic_add(counter, 1, sem="relaxed")
        following = taken + gl.num_programs(0)
        if taken == items - 1:
            # nobody will ask again: the counter is ready for the next launch
            gl.store(counter, 0)
        place, parity = ring(turn, 2)
        mbarrier.wait(next_empty.index(place), parity ^ 1)
        one = gl.full([1], 0, gl.int32, gl.BlockedLayout([1], [32], [1], [0]))
        next_room.index(place).store(one + following)
        mbarrier.arrive(next_full.index(place), count=1)
    return following


@gluon.jit
def announced(index, turn, next_room, next_full, next_empty, meta: gl.constexpr):
    """The next work item, as a consumer learns it."""
    following = index + gl.num_programs(0)
    if meta.dynamic:
        place, parity = ring(turn, 2)
        mbarrier.wait(next_full.index(place), parity)
        following = gl.max(next_room.index(place).load(gl.BlockedLayout([1], [32], [4], [0])), 0)
        mbarrier.arrive(next_empty.index(place), count=1)
    return following


# --- one tile ---------------------------------------------------------------------------------------


@gluon.jit
def scores(q, operands, step, meta: gl.constexpr, s_layout: gl.constexpr):
    """``Q K^T`` of a tile, in flight."""
    k_room, v_room, k_full, k_empty, v_full, v_empty = operands
    place, parity = ring(step, meta.stages)
    mbarrier.wait(k_full.index(place), parity)
    zero = gl.full([ROWS, meta.block_n], 0.0, gl.float32, s_layout)
    k = k_room.index(place).reshape([meta.block_n, meta.head_block])
    return warpgroup_mma(q, k.permute([1, 0]), zero, use_acc=False, is_async=True)


@gluon.jit
def output(o, p, operands, step, meta: gl.constexpr):
    """``O + P V`` of a tile, in flight."""
    k_room, v_room, k_full, k_empty, v_full, v_empty = operands
    place, parity = ring(step, meta.stages)
    mbarrier.wait(v_full.index(place), parity)
    return warpgroup_mma(p, v_room.index(place).reshape([meta.block_n, meta.value_block]), o, is_async=True)


@gluon.jit
def hold(operands, step, meta: gl.constexpr):
    """Keeps what comes before it before it.

    ptxas moves the wait for a product up, past the exponents that should run beside the product, but not out of its
    basic block. Waiting again for a tile that has landed ends the block, for some 30 cycles.
    """
    k_room, v_room, k_full, k_empty, v_full, v_empty = operands
    if meta.held:
        place, parity = ring(step, meta.stages)
        mbarrier.wait(v_full.index(place), parity)


@gluon.jit
def logits(s, tile, row, place, sizes, tensors, program: gl.constexpr, meta: gl.constexpr, PARTIAL: gl.constexpr):
    """The score program of key tile ``tile``; in a partial tile -inf outside of the band and beyond the last key."""
    heads, group, kv_batch, rows, keys, left, right, row_tiles, pairs, together, scale = sizes
    col = tile * meta.block_n + gl.arange(0, meta.block_n, gl.SliceLayout(0, s.type.layout))
    if program is not None:
        captures, strides, symbols = tensors
        batch, head = place
        inside = gl.minimum(col, keys - 1) if PARTIAL else col
        m = gl.expand_dims(gl.minimum(row, rows - 1), 1)
        s = program(s, s, batch, head, m, gl.expand_dims(inside, 0), captures, strides, symbols)
    if PARTIAL:
        stop = gl.full([ROWS], 0, gl.int32, row.type.layout) + (keys - 1)
        if meta.right:
            stop = gl.minimum(stop, row + right)
        keep = gl.expand_dims(col, 0) <= gl.expand_dims(stop, 1)
        if meta.left:
            keep = keep & (gl.expand_dims(col, 0) >= gl.expand_dims(row + left, 1))
        s = gl.where(keep, s, float("-inf"))
    return s


@gluon.jit
def either(s, tile, whole, row, place, sizes, tensors, program: gl.constexpr, meta: gl.constexpr):
    """:func:`logits` of a tile that may be partial.

    One loop with a branch, not a loop for each kind of tile: ptxas 12.8 then reads a uniform register that a skipped
    loop should have written.
    """
    whole_start, whole_stop = whole
    if (tile >= whole_stop) | (tile < whole_start):
        s = logits(s, tile, row, place, sizes, tensors, program, meta, True)
    else:
        s = logits(s, tile, row, place, sizes, tensors, program, meta, False)
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
def sunk(row, place, sizes, tensors, sink: gl.constexpr):
    """Top and total of rows that have seen nothing but their sink."""
    top = gl.full([ROWS], float("-inf"), gl.float32, row.type.layout)
    total = gl.full([ROWS], 0.0, gl.float32, row.type.layout)
    if sink is not None:
        captures, strides, symbols = tensors
        batch, head = place
        m = gl.expand_dims(gl.minimum(row, sizes[3] - 1), 1)
        logit = sink(m, m, batch, head, m, m, captures, strides, symbols)
        top = gl.max(gl.expand_dims(total, 1) + logit, 1)
        total = total + 1.0
    return top, total


# --- one work item ----------------------------------------------------------------------------------


@gluon.jit
def overlapped(
    q, q_empty, operands, step, span, row, place, sizes, tensors,
    program: gl.constexpr, sink: gl.constexpr, dtype: gl.constexpr, meta: gl.constexpr, s_layout: gl.constexpr,
    o_layout: gl.constexpr,
):  # fmt: skip
    """``O``, top and total of 64 rows, and the step after them: scores of one tile beside the output of the last."""
    k_room, v_room, k_full, k_empty, v_full, v_empty = operands
    start, whole_start, whole_stop, stop = span
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    MASKED: gl.constexpr = meta.left or meta.right
    s = warpgroup_mma_wait(0, deps=[scores(q, operands, step, meta, s_layout)])
    mbarrier.arrive(k_empty.index(step % meta.stages), count=1)
    top, total = sunk(row, place, sizes, tensors, sink)
    s = logits(s, stop - 1, row, place, sizes, tensors, program, meta, MASKED or meta.ragged)
    p, top, total, shrink = weights(s, top, total, sizes[10], meta)
    p = gl.convert_layout(p.to(dtype), p_layout)
    o = gl.full([ROWS, meta.value_block], 0.0, gl.float32, o_layout)
    step += 1
    for back in range(stop - 1 - start):
        s = scores(q, operands, step, meta, s_layout)
        o = output(o, p, operands, step - 1, meta)
        s = warpgroup_mma_wait(1, deps=[s])
        mbarrier.arrive(k_empty.index(step % meta.stages), count=1)
        if MASKED:
            s = either(s, stop - 2 - back, (whole_start, whole_stop), row, place, sizes, tensors, program, meta)
        else:
            s = logits(s, stop - 2 - back, row, place, sizes, tensors, program, meta, False)
        new_p, top, total, shrink = weights(s, top, total, sizes[10], meta)
        new_p = gl.convert_layout(new_p.to(dtype), p_layout)
        hold(operands, step - 1, meta)
        o, p, new_p = warpgroup_mma_wait(0, deps=[o, p, new_p])
        mbarrier.arrive(v_empty.index((step - 1) % meta.stages), count=1)
        o = shrunk(o, shrink)
        p = new_p
        step += 1
    if not meta.shared_out:
        mbarrier.arrive(q_empty, count=1)
    o = output(o, p, operands, step - 1, meta)
    o, p = warpgroup_mma_wait(0, deps=[o, p])
    mbarrier.arrive(v_empty.index((step - 1) % meta.stages), count=1)
    return o, top, total, step


@gluon.jit
def in_turn(
    q, q_empty, operands, step, span, row, place, sizes, tensors,
    program: gl.constexpr, sink: gl.constexpr, dtype: gl.constexpr, meta: gl.constexpr, s_layout: gl.constexpr,
    o_layout: gl.constexpr,
):  # fmt: skip
    """As :func:`overlapped`, with one product in flight at a time."""
    k_room, v_room, k_full, k_empty, v_full, v_empty = operands
    start, whole_start, whole_stop, stop = span
    p_layout: gl.constexpr = gl.DotOperandLayout(0, o_layout, 2)
    top, total = sunk(row, place, sizes, tensors, sink)
    o = gl.full([ROWS, meta.value_block], 0.0, gl.float32, o_layout)
    for back in range(stop - start):
        s = warpgroup_mma_wait(0, deps=[scores(q, operands, step, meta, s_layout)])
        mbarrier.arrive(k_empty.index(step % meta.stages), count=1)
        if meta.left or meta.right or meta.ragged:
            s = either(s, stop - 1 - back, (whole_start, whole_stop), row, place, sizes, tensors, program, meta)
        else:
            s = logits(s, stop - 1 - back, row, place, sizes, tensors, program, meta, False)
        p, top, total, shrink = weights(s, top, total, sizes[10], meta)
        o = output(shrunk(o, shrink), gl.convert_layout(p.to(dtype), p_layout), operands, step, meta)
        o = warpgroup_mma_wait(0, deps=[o])
        mbarrier.arrive(v_empty.index(step % meta.stages), count=1)
        step += 1
    if not meta.shared_out:
        mbarrier.arrive(q_empty, count=1)
    return o, top, total, step


@gluon.jit
def store(o, top, total, room, o_desc, lse, pair, first, row, sizes, meta: gl.constexpr):
    """Rows divided by their totals, to memory by TMA; the copy may still read ``room`` on return."""
    heads, group, kv_batch, rows, keys, left, right, row_tiles, pairs, together, scale = sizes
    tma.store_wait(0)
    room.reshape([ROWS, meta.value_block]).store(shrunk(o, 1.0 / total).to(o_desc.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(o_desc, [pair // heads, pair % heads, first, 0], room)
    if meta.lse:
        natural = top * (scale * LN_2) + gl.log2(total) * LN_2
        gl.store(lse + pair.to(gl.int64) * rows + row, natural, mask=row < rows)


@gluon.jit
def consume(shared, program: gl.constexpr, sink: gl.constexpr, which: gl.constexpr, meta: gl.constexpr):
    """One warpgroup: 64 query rows of each work item."""
    descriptors, rooms, barriers, sizes, tensors, lse = shared
    q_desc, k_desc, v_desc, o_desc = descriptors
    q_room, k_room, v_room, o_room, next_room = rooms
    q_full, q_empty, k_full, k_empty, v_full, v_empty, next_full, next_empty = barriers
    operands = (k_room, v_room, k_full, k_empty, v_full, v_empty)
    heads, group, kv_batch, rows, keys, left, right, row_tiles, pairs, together, scale = sizes
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, meta.block_n, 16])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, meta.value_block, 16])
    work: gl.constexpr = overlapped if meta.overlapped else in_turn
    q = q_room.index(which).reshape([ROWS, meta.head_block])
    index = gl.program_id(0)
    turn = 0
    step = 0
    while index < pairs * row_tiles:
        pair, row_tile = item_of(index, row_tiles, pairs, together, meta.longest_first)
        first = row_tile * meta.consumers * ROWS
        row = first + which * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, s_layout))
        place = (((pair // heads).to(gl.int64),), (pair % heads).to(gl.int64))
        mbarrier.wait(q_full.index(which), turn & 1)
        o, top, total, step = work(
            q, q_empty.index(which), operands, step, key_tiles(first, keys, left, right, meta), row, place, sizes,
            tensors, program, sink, q_desc.dtype, meta, s_layout, o_layout,
        )  # fmt: skip
        store(o, top, total, o_room.index(which), o_desc, lse, pair, first + which * ROWS, row, sizes, meta)
        if meta.shared_out:
            tma.store_wait(0)
            mbarrier.arrive(q_empty.index(which), count=1)
        index = announced(index, turn, next_room, next_full, next_empty, meta)
        turn += 1
    tma.store_wait(0)


# --- kernel -----------------------------------------------------------------------------------------


@gluon.jit
def room_for(descriptor, COUNT: gl.constexpr):
    """Shared memory for so many tiles."""
    return gl.allocate_shared_memory(descriptor.dtype, [COUNT] + descriptor.block_type.shape, descriptor.layout)


@gluon.jit
def barriers_for(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """So many barriers, each complete after so many arrivals."""
    found = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(found.index(i), count=ARRIVALS)
    return found


@gluon.jit
def attention_forward(
    q_desc, k_desc, v_desc, o_desc, lse, counter, captures, strides, symbols,
    heads, group, kv_batch, rows, keys, left, right, row_tiles, pairs, together, scale,
    program: gl.constexpr, sink: gl.constexpr, meta: gl.constexpr,
):  # fmt: skip
    """``out`` and, where asked for, ``lse [B, H, M]`` of one attention, operands ``[B, H, N, D]``.

    Row ``m`` keeps keys ``m + left <= n <= m + right``. ``program`` makes logits of scores and ``sink`` a logit of a
    row (:mod:`attnfuse.kernels.triton.text`), both in units of ``scale``, which makes them powers of two.
    """
    C: gl.constexpr = meta.consumers
    STAGES: gl.constexpr = meta.stages
    q_room = room_for(q_desc, C)
    o_room = q_room
    if not meta.shared_out:
        o_room = room_for(o_desc, C)
    next_room = gl.allocate_shared_memory(gl.int32, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    rooms = (q_room, room_for(k_desc, STAGES), room_for(v_desc, STAGES), o_room, next_room)
    barriers = (
        barriers_for(C, 1), barriers_for(C, 1),  # queries
        barriers_for(STAGES, 1), barriers_for(STAGES, C),  # keys
        barriers_for(STAGES, 1), barriers_for(STAGES, C),  # values
        barriers_for(2, 1), barriers_for(2, C),  # next work item
    )  # fmt: skip
    descriptors = (q_desc, k_desc, v_desc, o_desc)
    sizes = (heads, group, kv_batch, rows, keys, left, right, row_tiles, pairs, together, scale)
    shared = (descriptors, rooms, barriers, sizes, (captures, strides, symbols), lse)
    R: gl.constexpr = meta.registers
    if C == 2:
        gl.warp_specialize(
            [
                (consume, (shared, program, sink, 0, meta)),
                (consume, (shared, program, sink, 1, meta)),
                (produce, (shared, counter, meta)),
            ],
            [4, 1],
            [R, 24],
        )
    else:
        gl.warp_specialize(
            [
                (consume, (shared, program, sink, 0, meta)),
                (consume, (shared, program, sink, 1, meta)),
                (consume, (shared, program, sink, 2, meta)),
                (produce, (shared, counter, meta)),
            ],
            [4, 4, 1],
            [R, R, 24],
        )
