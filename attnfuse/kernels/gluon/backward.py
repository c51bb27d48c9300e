"""The backward body: a tile of keys a block, queries streamed past it, five products for each tile of scores.

One warp loads tiles by TMA, two warpgroups multiply. Scores are transposed, ``[keys, rows]``, so that the weights and
the gradients of scores are in registers what the products of dV and dK take as their left operand (FlashAttention-3,
https://arxiv.org/abs/2407.08608); only dQ needs them in shared memory. Products are in flight as long as registers
last: dP beside the exponents, dV beside the gradients of scores, dK beside dQ's way to memory, which one more
warp adds to it. Blocks do so in no order, so its last bits differ from run to run; dK and dV are each one block's.

Barriers are named for what they protect: ``*_full`` says that a tile has landed, ``*_empty`` that its room is free.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

#: Warps of both consumers together.
WARPS = gl.constexpr(8)


class Sizes(NamedTuple):
    """The numbers of a launch. ``group`` query heads share a key head; ``pairs`` are batches times key heads.

    The sums of two heads lie ``padded_rows`` apart. The keys of row ``m`` are ``m + left <= n <= m + right``;
    ``strange`` is not zero where a row needs all keys.
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
    """Row tiles: ``start..stop`` reach some key, ``whole_start..whole_stop`` entirely, every key."""

    start: Any
    whole_start: Any
    whole_stop: Any
    stop: Any


@builtin
def async_add_shared_to_global(tensor_desc, coord, src, _semantic=None):
    """As ``tma.async_copy_shared_to_global``, added to what is there: Gluon has no function for it up to 3.7."""
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    _semantic.builder.create_async_tma_reduce(ir.DESCRIPTOR_REDUCE_KIND.ADD, tensor_desc.handle, coord, src.handle)


# --- which tile is which ----------------------------------------------------------------------------


@gluon.jit
def item(sizes, meta: gl.constexpr):
    """Pair of batch and key head, and key tile, of this block: the pairs whose operands the L2 cache holds together.

    Longest first takes the key tiles of all of them from the first to the last.
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
    return Span(start, whole_start, whole_stop, gl.maximum(stop, start + 1))


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
def produce(k, v, q, grad, sums, panel, sizes, meta: gl.constexpr):
    """One warp: keys and values once, then queries and gradients as soon as their rooms are free."""
    pair, key_tile = item(sizes, meta)
    first = key_tile * meta.block_n
    span = row_tiles(first, sizes, meta)
    kv_heads = sizes.heads // sizes.group
    VECTOR: gl.constexpr = sums.top.desc.block_type.nbytes
    step = 0
    expect(k, 0, 0, 0)
    copy(k, k.full, 0, pair // kv_heads, pair % kv_heads, first, 0)
    for member in range(sizes.group):
        batch, head, flat = head_of(pair, member, sizes)
        for tile in range(span.start, span.stop):
            place, parity = ring(step, meta.stages)
            row = tile * meta.block_m
            expect(q, place, parity, grad.desc.block_type.nbytes + (3 if meta.uncertain else 2) * VECTOR)
            copy(q, q.full, place, batch, head, row, 0)
            copy_vector(sums.top, q.full, place, flat * sizes.padded_rows + row)
            if step == 0:
                expect(v, 0, 0, 0)
                copy(v, v.full, 0, pair // kv_heads, pair % kv_heads, first, 0)
            copy(grad, q.full, place, batch, head, row, 0)
            copy_vector(sums.delta, q.full, place, flat * sizes.padded_rows + row)
            if meta.uncertain:
                copy_vector(sums.norm, q.full, place, flat * sizes.padded_rows + row)
            if meta.panel:
                expect(panel, 0, step & 1, 0)
                copy(panel, panel.full, 0, batch if meta.panel_batch else 0, head if meta.panel_head else 0, row, first)
            step += 1


@gluon.jit
def expect(tiles, place, parity, MORE: gl.constexpr):
    """Waits until the room of a tile is free, and says how much will land in it, and beside it."""
    mbarrier.wait(tiles.empty.index(place), parity ^ 1)
    mbarrier.expect(tiles.full.index(place), tiles.desc.block_type.nbytes + MORE)


@gluon.jit
def copy(tiles, full, place, batch, head, row, column):
    """Asks for a tile. What lies beyond the tensor is zero."""
    tma.async_copy_global_to_shared(tiles.desc, [batch, head, row, column], full.index(place), tiles.room.index(place))


@gluon.jit
def copy_vector(vectors, full, place, first):
    """Asks for a number of each row. What lies beyond the last row is another head's."""
    tma.async_copy_global_to_shared(vectors.desc, [first], full.index(place), vectors.room.index(place))


# --- what leaves ------------------------------------------------------------------------------------


@gluon.jit
def add(dq, q, panel, sizes, meta: gl.constexpr):
    """One warp: adds each tile of dQ to memory, and says that what it was made of has been read."""
    pair, key_tile = item(sizes, meta)
    span = row_tiles(key_tile * meta.block_n, sizes, meta)
    step = 0
    for member in range(sizes.group):
        _, _, flat = head_of(pair, member, sizes)
        for tile in range(span.start, span.stop):
            mbarrier.wait(dq.full.index(0), step & 1)
            if step > 0:
                # this step's product of dK is in flight, all of the last's are done
                mbarrier.arrive(q.empty.index((step - 1) % meta.stages), count=1)
            if meta.panel:
                mbarrier.arrive(panel.empty.index(0), count=1)
            place = (flat * gl.cdiv(sizes.rows, meta.block_m) + tile) * dq.desc.block_type.shape[0]
            async_add_shared_to_global(dq.desc, [place, 0], dq.room.index(0))
            tma.store_wait(0)
            mbarrier.arrive(dq.empty.index(0), count=1)
            step += 1


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
    tma.async_copy_shared_to_global(desc, [pair // kv_heads, pair % kv_heads, first, 0], room)


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
def read(m, n, batch, head, tensors, programs: gl.constexpr):
    """Of each capture, its values at a tile, in as many dimensions as it varies along."""
    found = ()
    for slot in gl.static_range(len(programs.reads)):
        if programs.reads[slot] == "panel" or programs.reads[slot] == "":
            found = found + (m,)
        else:
            found = found + (programs.loaders[slot](m, m, (batch,), head, m, n, *tensors),)
    return found


@gluon.jit
def with_panel(found, s, panel, step, programs: gl.constexpr, meta: gl.constexpr):
    """``found`` with the capture that the producer loads."""
    values = s
    if meta.panel:
        mbarrier.wait(panel.full.index(0), step & 1)
        loaded = panel.room.index(0).reshape([meta.block_m, meta.block_n]).permute([1, 0])
        values = loaded.load(s.type.layout).to(gl.float32)
    complete = ()
    for slot in gl.static_range(len(programs.reads)):
        if programs.reads[slot] == "panel":
            complete = complete + (values,)
        else:
            complete = complete + (found[slot],)
    return complete


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
    k, v, q, grad, sums, panel, ds_room, dq, dk_desc, dv_desc, sizes, tensors,
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

    pair, key_tile = item(sizes, meta)
    first = key_tile * BN
    span = row_tiles(first, sizes, meta)
    col = first + gl.arange(0, BN, gl.SliceLayout(1, s_layout))
    n = gl.expand_dims(gl.minimum(col, sizes.keys - 1), 1)
    dk = gl.full([BN, meta.head_block], 0.0, gl.float32, dk_layout)
    dv = gl.full([BN, meta.value_block], 0.0, gl.float32, dv_layout)
    steps = sizes.group * (span.stop - span.start)
    mbarrier.wait(k.full.index(0), 0)
    mbarrier.wait(v.full.index(0), 0)
    tile = span.start
    member = 0
    for step in range(steps):
        place = step % meta.stages
        batch, head, _ = head_of(pair, member, sizes)
        batch = batch.to(gl.int64)
        head = head.to(gl.int64)
        row = tile * BM + gl.arange(0, BM, row_layout)
        m = gl.expand_dims(gl.minimum(row, sizes.rows - 1), 0)

        s = scores(k, q, step, meta, s_layout)
        grads = grad.room.index(place).reshape([BM, meta.value_block])
        zero = gl.full([BN, BM], 0.0, gl.float32, s_layout)
        dp = warpgroup_mma(values, grads.permute([1, 0]), zero, use_acc=False, is_async=True)
        found = read(m, n, batch, head, tensors, programs)
        top = of_rows(sums.top, step, meta, row_layout)
        if meta.ragged_rows:
            top = gl.where(row < sizes.rows, top, float("inf"))
        top = gl.expand_dims(top, 0)
        s = warpgroup_mma_wait(1, deps=[s])
        given = tensors.symbols + with_panel(found, s, panel, step, programs, meta)
        u = programs.score(s, s, (batch,), head, m, n, tensors.captures, tensors.strides, given)
        if meta.left or meta.right or meta.ragged:
            partial = first + BN > sizes.keys
            if meta.left or meta.right:
                partial = partial | (tile < span.whole_start) | (tile >= span.whole_stop)
            if partial:
                u = cut(u, float("-inf"), col, row, sizes, meta)
        p = weights(u, top, sizes, meta)
        if meta.uncertain:
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
        if meta.uncertain and (meta.left or meta.right or meta.ragged):
            # the weights of a row that keeps no key are NaN, its masked scores have no gradient
            if partial:
                dx = cut(dx, 0.0, col, row, sizes, meta)
        ds = programs.pulled(s, dx, (batch,), head, m, n, tensors.captures, tensors.strides, given)
        ds = ds.to(dtype)
        ds_half = gl.convert_layout(ds, gl.DotOperandLayout(0, dk_layout, 2))
        queries = q.room.index(place).reshape([BM, meta.head_block])
        ds_room.store(ds)
        fence_async_shared()
        none = gl.full([BM, meta.head_block], 0.0, gl.float32, dq_layout)
        dq_tile = warpgroup_mma(ds_room.permute([1, 0]), keys, none, use_acc=False, is_async=True)
        dv = warpgroup_mma(p_second, grads.slice(BM // 2, BM // 2, 0), dv, is_async=True)
        dk = warpgroup_mma(ds_half, queries, dk, is_async=True)
        dq_tile, p_first = warpgroup_mma_wait(2, deps=[dq_tile, p_first])
        leave(dq, dq_tile, step, meta)
        dv, dk, p_second, ds_half = warpgroup_mma_wait(0, deps=[dv, dk, p_second, ds_half])
        tile += 1
        if tile == span.stop:
            tile = span.start
            member += 1
    store(dv_desc, v.room.index(0), dv, pair, first, sizes)
    store(dk_desc, k.room.index(0), dk * sizes.factor, pair, first, sizes)
    tma.store_wait(0)


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


@gluon.jit(
    do_not_specialize=[
        "heads", "group", "rows", "padded_rows", "keys", "left", "right", "key_tiles", "pairs", "together",
        "exponent", "factor",
    ],
    do_not_specialize_on_alignment=["strange"],
)  # fmt: skip
def attention_backward(
    q_desc, k_desc, v_desc, grad_desc, top_desc, norm_desc, delta_desc, panel_desc, dq_desc, dk_desc, dv_desc,
    strange, captures, strides, symbols,
    heads, group, rows, padded_rows, keys, left, right, key_tiles, pairs, together, exponent, factor,
    programs: gl.constexpr, meta: gl.constexpr,
):  # fmt: skip
    """Adds to ``dq``, ordered by :func:`as_threads_have_it`, not yet scaled; writes ``dk`` and ``dv [B, Hk, N, D]``.

    ``top``, ``norm`` and ``delta [B * H * padded_rows]`` are what :func:`attnfuse.kernels.triton.backward.row_sums`
    finds, and programs those of its launches: ``score``, and ``pulled`` back from its gradient. ``programs.reads`` and
    ``.loaders`` are as in the forward. ``panel_desc`` is the capture that is read in panels.
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
    ds_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([meta.block_n, meta.block_m], q_desc.dtype)
    ds_room = gl.allocate_shared_memory(q_desc.dtype, [meta.block_n, meta.block_m], ds_layout)
    sums = Sums(top, norm, delta)
    sizes = Sizes(
        heads, group, rows, padded_rows, keys, left, right, key_tiles, pairs, together, exponent, factor, everything
    )
    tensors = Tensors(captures, strides, symbols)
    gl.warp_specialize(
        [
            (consume, (k, v, q, grad, sums, panel, ds_room, dq, dk_desc, dv_desc, sizes, tensors, programs, meta)),
            (produce, (k, v, q, grad, sums, panel, sizes, meta)),
            (add, (dq, q, panel, sizes, meta)),
        ],
        [1, 1],
        [24, 24],
    )
