"""The forward body: one warp loads tiles by TMA, two or three warpgroups each hold 64 query rows.

A consumer works on its rows in one of two ways. *Overlapped*: the product of the next tile's scores is in flight with
that of the last tile's output, and the softmax of one tile runs beside the output of another (FlashAttention-3,
https://arxiv.org/abs/2407.08608). *In turn*: scores, softmax, output; with fewer registers there are more consumers,
and one multiplies while another takes exponents. Key tiles are walked from the last to the first, and those that the
band cuts or that the keys end in are masked. Where the mask is no band, the tiles that it keeps come from lists
(:mod:`attnfuse.kernels.triton.tiles`), which say of each whether the mask cuts it; in others it is not read.

Barriers are named for what they protect: ``*_full`` says that a tile has landed, ``*_empty`` that its room is free;
``turns`` are whose turn it is to start products.
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

#: Query rows of one consumer: those of one wgmma.
ROWS = gl.constexpr(64)
#: Sixteen floats to four registers of four bytes each, and registers as they are.
_ROUND = "{ .reg .b16 low, high; " + " ".join(
    f"cvt.rn.satfinite.TYPE.f32 low, ${at + 1}, ${at}; cvt.rn.satfinite.TYPE.f32 high, ${at + 3}, ${at + 2};"
    f" mov.b32 ${at // 4 - 1}, {{low, high}};"
    for at in range(4, 20, 4)
) + " }"  # fmt: skip
TO_E4M3, TO_E5M2 = gl.constexpr(_ROUND.replace("TYPE", "e4m3x2")), gl.constexpr(_ROUND.replace("TYPE", "e5m2x2"))
PACK = gl.constexpr("=r,=r,=r,=r" + 16 * ",f")
AS_BYTES = gl.constexpr(" ".join(f"mov.b32 ${at}, ${at + 4};" for at in range(4)))
UNPACK = gl.constexpr("=r,=r,=r,=r,r,r,r,r")
LN_2 = gl.constexpr(0.6931471805599453)


class Sizes(NamedTuple):
    """The numbers of a launch. ``group`` query heads share a key head; ``pairs`` are batches times heads.

    ``list_batch`` and ``list_head`` are lists of tiles between one batch or head and the next, ``list_length`` the
    numbers of a list.
    """

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
    list_batch: Any
    list_head: Any
    list_length: Any
    scale: Any


class Tiles(NamedTuple):
    """Shared memory for tiles of one operand, and for each a barrier when it has landed and when its room is free."""

    desc: Any
    room: Any
    full: Any
    empty: Any


class Output(NamedTuple):
    """Where results go: the output's descriptor, room in shared memory that it leaves through, and the LSE."""

    desc: Any
    room: Any
    lse: Any


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
    """Key tiles: ``start..stop`` are reached by some row, ``whole_start..whole_stop`` entirely, by every row.

    Of a list they are places in it, and ``entries`` where its tiles are.
    """

    start: Any
    whole_start: Any
    whole_stop: Any
    stop: Any
    entries: Any


# --- which tile is which ----------------------------------------------------------------------------


@gluon.jit
def item_of(index, sizes, meta: gl.constexpr):
    """Pair of batch and head, and row tile, of work item ``index``.

    Longest first walks the row tiles of ``together`` pairs, whose keys and values stay in the L2 cache, from the last
    to the first; pairs that are left over join the last group, so that the launch ends with many short items. Short
    last leaves each pair's last row tile, which is not full of rows, to the end.
    """
    if meta.longest_first:
        group = gl.minimum(index // (sizes.together * sizes.row_tiles), sizes.pairs // sizes.together - 1)
        inside = index - group * sizes.together * sizes.row_tiles
        size = sizes.together
        if group == sizes.pairs // sizes.together - 1:
            size = sizes.pairs - group * sizes.together
        pair = group * sizes.together + inside % size
        row_tile = sizes.row_tiles - 1 - inside // size
    elif meta.short_last:
        full = sizes.row_tiles - 1
        pair = index // gl.maximum(full, 1)
        row_tile = index % gl.maximum(full, 1)
        if index >= sizes.pairs * full:
            pair = index - sizes.pairs * full
            row_tile = full
    else:
        pair = index // sizes.row_tiles
        row_tile = index % sizes.row_tiles
    return pair, row_tile


@gluon.jit
def key_tiles(first, HEIGHT: gl.constexpr, sizes, meta: gl.constexpr):
    """The :class:`Span` of so many rows: at least one tile, so that a row without keys divides zero by zero."""
    last = first + HEIGHT - 1
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
    return Span(start, whole_start, whole_key // meta.block_n, stop, 0)


@gluon.jit
def listed_tiles(row_tile, batch, head, lists, sizes):
    """The :class:`Span` of a row tile's list: how many tiles, then the tiles (:mod:`attnfuse.kernels.triton.tiles`)."""
    place = batch * sizes.list_batch + head * sizes.list_head + row_tile
    entries = lists + place.to(gl.int64) * sizes.list_length
    return Span(0, 0, 0, gl.load(entries), entries + 1)


@gluon.jit
def span_of(row_tile, batch, head, lists, sizes, meta: gl.constexpr):
    """The :class:`Span` of a row tile."""
    if meta.listed:
        span = listed_tiles(row_tile, batch, head, lists, sizes)
    else:
        span = key_tiles(row_tile * meta.consumers * ROWS, meta.consumers * ROWS, sizes, meta)
    return span


@gluon.jit
def own_tiles(first, span, sizes, meta: gl.constexpr):
    """The part of a row tile's ``span`` that one consumer's rows reach; of rows beyond the last one tile."""
    if meta.listed:
        mine = span
    else:
        reach = key_tiles(first, ROWS, sizes, meta)
        start = span.start
        if meta.left:
            start = gl.minimum(reach.start, span.stop - 1)
        stop = gl.where(first < sizes.rows, reach.stop, start + 1)
        stop = gl.minimum(gl.maximum(stop, start + 1), span.stop)
        mine = Span(start, reach.whole_start, reach.whole_stop, stop, 0)
    return mine


@gluon.jit
def entry_of(span, back, meta: gl.constexpr):
    """What is known of the tile ``back`` steps after the first; lists are read one step ahead."""
    if meta.listed:
        entry = gl.load(span.entries + back)
    else:
        entry = span.stop - 1 - back
    return entry


@gluon.jit
def tile_of(entry, meta: gl.constexpr):
    """Which key tile an entry is."""
    if meta.listed:
        tile = entry >> 1
    else:
        tile = entry
    return tile


@gluon.jit
def is_cut(entry, span, meta: gl.constexpr):
    """Whether a mask may cut the tile."""
    if meta.listed:
        cut = (entry & 1) == 1
    else:
        cut = (entry >= span.whole_stop) | (entry < span.whole_start)
    return cut


@gluon.jit
def ring(step, STAGES: gl.constexpr):
    """The room of the ``step``-th tile and the parity of its use."""
    return step % STAGES, (step // STAGES) & 1


# --- producer ---------------------------------------------------------------------------------------


@gluon.jit
def produce(q, k, v, panel, coming, lists, sizes, counter, meta: gl.constexpr):
    """One warp: asks for each tile as soon as its room is free."""
    CONSUMERS: gl.constexpr = meta.consumers
    index = gl.program_id(0)
    turn = 0
    step = 0
    while index < sizes.pairs * sizes.row_tiles:
        following = next_item(index, counter, sizes.pairs * sizes.row_tiles, meta)
        pair, row_tile = item_of(index, sizes, meta)
        batch = pair // sizes.heads
        head = pair % sizes.heads
        # a batch dimension of 1 is shared by all
        kv_batch = gl.minimum(batch, sizes.kv_batch - 1)
        kv_head = head // sizes.group
        first = row_tile * CONSUMERS * ROWS
        span = span_of(row_tile, batch, head, lists, sizes, meta)
        entry = entry_of(span, 0, meta)
        place, parity = ring(turn, meta.queries)
        for which in gl.static_range(CONSUMERS):
            fetch(q, place * CONSUMERS + which, parity, batch, head, first + which * ROWS, 0)
        for back in range(span.stop - span.start):
            key = tile_of(entry, meta) * meta.block_n
            entry = entry_of(span, back + 1, meta)
            place, parity = ring(step, meta.stages)
            fetch_keys(k, place, parity, kv_batch, kv_head, key, meta)
            if meta.panel:
                panel_batch = batch if meta.panel_batch else 0
                panel_head = head if meta.panel_head else 0
                for which in gl.static_range(CONSUMERS):
                    fetch(panel, which, step & 1, panel_batch, panel_head, first + which * ROWS, key)
            if meta.narrow:
                fetch(v, place, parity, kv_batch, kv_head, 0, key)
            else:
                fetch(v, place, parity, kv_batch, kv_head, key, 0)
            step += 1
        if meta.persistent:
            announce(following, turn, coming, sizes, meta)
        index = following
        turn += 1


@gluon.jit
def fetch(tiles, place, parity, batch, head, row, column):
    """Asks for a tile once its room is free. What lies beyond the tensor is zero."""
    mbarrier.wait(tiles.empty.index(place), parity ^ 1)
    mbarrier.expect(tiles.full.index(place), tiles.desc.block_type.nbytes)
    copies.load(tiles.desc, [batch, head, row, column], tiles.full.index(place), tiles.room.index(place))


@gluon.jit
def fetch_keys(k, place, parity, batch, head, key, meta: gl.constexpr):
    """Asks for a tile of keys; of float8 in the order of :func:`keys_of`, by a copy for each half and 128 columns.

    The descriptor has the keys in fours, of which a copy takes the first two or the last two.
    """
    if meta.narrow:
        PARTS: gl.constexpr = k.room.shape[0] // meta.stages
        mbarrier.wait(k.empty.index(place), parity ^ 1)
        mbarrier.expect(k.full.index(place), PARTS * k.desc.block_type.nbytes)
        for part in gl.static_range(PARTS):
            copies.load(
                k.desc, [batch, head, key // 4, part % 2 * 2, part // 2 * 128], k.full.index(place),
                k.room.index(place * PARTS + part),
            )  # fmt: skip
    else:
        fetch(k, place, parity, batch, head, key, 0)


@gluon.jit
def next_item(index, counter, items, meta: gl.constexpr):
    """The next work item: the counter's, or one grid further on."""
    following = index + gl.num_programs(0)
    if meta.dynamic:
        taken = gl.atomic_add(counter, 1, sem="relaxed")
        following = taken + gl.num_programs(0)
        if taken == items - 1:
            # nobody will ask again: the counter is ready for the next launch
            gl.store(counter, 0)
    return following


@gluon.jit
def announce(index, turn, coming, sizes, meta: gl.constexpr):
    """Tells the consumers which work item is next: divisions are the producer's, who has the time."""
    pair, row_tile = item_of(index, sizes, meta)
    item = place_of(pair // sizes.heads, pair % sizes.heads, row_tile)
    place, parity = ring(turn, 2)
    mbarrier.wait(coming.empty.index(place), parity ^ 1)
    none = gl.full([1], 0, gl.int64, gl.BlockedLayout([1], [32], [1], [0]))
    coming.room.index(place).store(none + gl.where(index < sizes.pairs * sizes.row_tiles, item, item * 0 - 1))
    mbarrier.arrive(coming.full.index(place), count=1)


@gluon.jit
def announced(turn, coming):
    """The work item that the producer told of; negative where there is none."""
    place, parity = ring(turn, 2)
    mbarrier.wait(coming.full.index(place), parity)
    item = gl.max(coming.room.index(place).load(gl.BlockedLayout([1], [32], [4], [0])), 0)
    mbarrier.arrive(coming.empty.index(place), count=1)
    return item


@gluon.jit
def place_of(batch, head, row_tile):
    """Batch, head and row tile as one number, of 23, 16 and 24 bits."""
    return (batch.to(gl.int64) << 40) | (head.to(gl.int64) << 24) | row_tile.to(gl.int64)


# --- one tile ---------------------------------------------------------------------------------------


@gluon.jit
def scores(query, k, step, meta: gl.constexpr, s_layout: gl.constexpr):
    """``Q K^T`` of a tile, in flight."""
    place, parity = ring(step, meta.stages)
    mbarrier.wait(k.full.index(place), parity)
    zero = gl.full([ROWS, meta.block_n], 0.0, gl.float32, s_layout)
    if meta.narrow:
        layout: gl.constexpr = gl.NVMMASharedLayout(k.desc.layout.swizzle_byte_width, 8)
        whole: gl.constexpr = [meta.stages, meta.block_n, meta.head_block]
        keys = copies.room_as(k.room, k.desc.dtype, whole, layout).index(place)
    else:
        keys = k.room.index(place).reshape([meta.block_n, meta.head_block])
    return warpgroup_mma(query, keys.permute([1, 0]), zero, use_acc=False, is_async=True)


@gluon.jit
def output(o, p, v, step, meta: gl.constexpr):
    """``O + P V`` of a tile, in flight; of float8 ``P V`` alone.

    Hopper's units sum float8 with 14 bits, enough for a tile but not for all keys, and over what is contiguous: values
    lie transposed.
    """
    place, parity = ring(step, meta.stages)
    mbarrier.wait(v.full.index(place), parity)
    if meta.narrow:
        values = v.room.index(place).reshape([meta.value_block, meta.block_n]).permute([1, 0])
        zero = gl.full([ROWS, meta.value_block], 0.0, gl.float32, o.type.layout)
        found = warpgroup_mma(p, values, zero, use_acc=False, is_async=True)
    else:
        values = v.room.index(place).reshape([meta.block_n, meta.value_block])
        found = warpgroup_mma(p, values, o, is_async=True)
    return found


@gluon.jit
def keys_of(tile, layout: gl.constexpr, meta: gl.constexpr):
    """Which keys the columns of a tile of scores are.

    A thread's scores are columns ``8 j + 2 t + e``, and what a product of float8 takes from it are the keys ``4 t`` to
    ``4 t + 3`` of each sixteen. So the first half of the columns are the first two keys of each four, the second half
    the last two: no thread needs another's weights.
    """
    column = gl.arange(0, meta.block_n, layout)
    if meta.narrow:
        half: gl.constexpr = meta.block_n // 2
        column = column % half // 2 * 4 + column // half * 2 + column % 2
    return tile * meta.block_n + column


@gluon.jit
def carried(p, dtype: gl.constexpr, meta: gl.constexpr, o_layout: gl.constexpr):
    """Weights as a loop carries them: rounded, keys in their own order; of float8 four in an integer.

    A loop that carried bytes would take them apart and put them together again.
    """
    if meta.narrow:
        halves = p.reshape([ROWS, 2, meta.block_n // 16, 4, 2])
        p = halves.permute([0, 2, 3, 1, 4]).reshape([ROWS, meta.block_n])
        part: gl.constexpr = gl.DotOperandLayout(0, o_layout, 4)
        quarters = p.reshape([ROWS, 2, 2, meta.block_n // 4]).permute([0, 3, 2, 1])
        left, right = gl.split(quarters)
        first, second = gl.split(left)
        third, fourth = gl.split(right)
        given = [
            gl.convert_layout(first, part), gl.convert_layout(second, part),
            gl.convert_layout(third, part), gl.convert_layout(fourth, part),
        ]  # fmt: skip
        asm: gl.constexpr = TO_E4M3 if dtype == gl.float8e4nv else TO_E5M2
        found = gl.inline_asm_elementwise(asm, PACK, given, dtype=gl.int32, is_pure=True, pack=4)
    else:
        found = gl.convert_layout(p.to(dtype), gl.DotOperandLayout(0, o_layout, 2))
    return found


@gluon.jit
def operand_of(p, dtype: gl.constexpr, meta: gl.constexpr, o_layout: gl.constexpr):
    """The left operand of a product, of weights that a loop carried."""
    if meta.narrow:
        parts = gl.inline_asm_elementwise(
            AS_BYTES, UNPACK, [p], dtype=(gl.int8, gl.int8, gl.int8, gl.int8), is_pure=True, pack=4
        )
        quarters = gl.join(gl.join(parts[0], parts[1]), gl.join(parts[2], parts[3]))
        whole = quarters.permute([0, 3, 2, 1]).reshape([ROWS, meta.block_n])
        p = gl.convert_layout(whole.to(dtype, bitcast=True), gl.DotOperandLayout(0, o_layout, 4))
    return p


@gluon.jit
def release(tiles, step, meta: gl.constexpr):
    """The room of a tile is free."""
    mbarrier.arrive(tiles.empty.index(step % meta.stages), count=1)


@gluon.jit
def take_turn(turns, which: gl.constexpr, step, meta: gl.constexpr):
    """Consumers start their products one after the other, so that the others' exponents run beside them."""
    if meta.turns:
        if which == 0:
            mbarrier.wait(turns.index(which), (step & 1) ^ 1)
        else:
            mbarrier.wait(turns.index(which), step & 1)


@gluon.jit
def pass_turn(turns, which: gl.constexpr, meta: gl.constexpr):
    """The next consumer's turn."""
    if meta.turns:
        mbarrier.arrive(turns.index((which + 1) % meta.consumers), count=1)


@gluon.jit
def skip(count, k, v, panel, turns, which: gl.constexpr, step, meta: gl.constexpr):
    """Lets tiles pass that other consumers' rows reach; the step after them.

    Waits for each: a room's release must not be counted as that of the tile before.
    """
    for _ in range(count):
        take_turn(turns, which, step, meta)
        pass_turn(turns, which, meta)
        place, parity = ring(step, meta.stages)
        mbarrier.wait(k.full.index(place), parity)
        release(k, step, meta)
        if meta.panel:
            mbarrier.wait(panel.full.index(which), step & 1)
            mbarrier.arrive(panel.empty.index(which), count=1)
        mbarrier.wait(v.full.index(place), parity)
        release(v, step, meta)
        step += 1
    return step


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
def keys_read(tile, found, rows, tensors, sizes, programs: gl.constexpr, meta: gl.constexpr):
    """``found`` with the values at this tile's keys of each capture that varies along the keys alone.

    Loaded once by each thread, not by each that holds a copy; :func:`spread` makes the copies.
    """
    n = gl.minimum(keys_of(tile, gl.BlockedLayout([1], [32], [4], [0]), meta), sizes.keys - 1)
    read = ()
    for slot in gl.static_range(len(programs.reads)):
        if programs.reads[slot] == "key":
            read = read + (programs.loaders[slot](n, n, rows.batch, rows.head, n, n, *tensors),)
        else:
            read = read + (found[slot],)
    return read


@gluon.jit
def spread(values, s):
    """Values at a tile's keys as ``[1, BN]``, to each thread those of its scores."""
    return gl.expand_dims(gl.convert_layout(values, gl.SliceLayout(0, s.type.layout)), 0)


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
def scored(s, col, rows, read, panel, sizes, tensors, programs: gl.constexpr, CUT: gl.constexpr):
    """The logits that the program of a cut or of a whole tile makes of scores."""
    READS: gl.constexpr = programs.reads if CUT else programs.bare_reads
    PROGRAM: gl.constexpr = programs.score if CUT else programs.bare
    if PROGRAM is not None:
        n = gl.expand_dims(gl.minimum(col, sizes.keys - 1) if CUT else col, 0)
        m = gl.expand_dims(gl.minimum(rows.index, sizes.rows - 1), 1)
        given = tensors.symbols
        for slot in gl.static_range(len(READS)):
            if READS[slot] == "score":
                given = given + (programs.loaders[slot](s, s, rows.batch, rows.head, m, n, *tensors),)
            elif READS[slot] == "panel":
                given = given + (panel,)
            elif READS[slot] == "key":
                given = given + (spread(read[slot], s),)
            else:
                given = given + (read[slot],)
        s = PROGRAM(s, s, rows.batch, rows.head, m, n, tensors.captures, tensors.strides, given)
    return s


@gluon.jit
def cut_logits(s, tile, rows, read, panel, sizes, tensors, programs: gl.constexpr, meta: gl.constexpr):
    """The logits of a partial tile: its program, and -inf outside of the band and beyond the last key."""
    col = keys_of(tile, gl.SliceLayout(0, s.type.layout), meta)
    s = scored(s, col, rows, read, panel, sizes, tensors, programs, True)
    stop = gl.full([ROWS], 0, gl.int32, rows.index.type.layout) + (sizes.keys - 1)
    if meta.right:
        stop = gl.minimum(stop, rows.index + sizes.right)
    keep = gl.expand_dims(col, 0) <= gl.expand_dims(stop, 1)
    if meta.left:
        keep = keep & (gl.expand_dims(col, 0) >= gl.expand_dims(rows.index + sizes.left, 1))
    return gl.where(keep, s, float("-inf"))


@gluon.jit
def whole_logits(s, tile, rows, read, panel, sizes, tensors, programs: gl.constexpr, meta: gl.constexpr):
    """The logits of a tile that no mask cuts."""
    col = keys_of(tile, gl.SliceLayout(0, s.type.layout), meta)
    return scored(s, col, rows, read, panel, sizes, tensors, programs, False)


@gluon.jit
def either(s, entry, span, rows, read, panel, sizes, tensors, programs: gl.constexpr, meta: gl.constexpr):
    """The logits of a tile that may be partial.

    One loop with a branch, not a loop for each kind of tile: ptxas 12.8 then reads a uniform register that a skipped
    loop should have written.
    """
    tile = tile_of(entry, meta)
    if is_cut(entry, span, meta):
        s = cut_logits(s, tile, rows, read, panel, sizes, tensors, programs, meta)
    else:
        s = whole_logits(s, tile, rows, read, panel, sizes, tensors, programs, meta)
    return s


@gluon.jit
def weights(s, top, total, scale, meta: gl.constexpr):
    """Online softmax of one tile: its weights, the new top and total of each row, and what shrinks the old.

    Weights of float8 are at most ``2 ** headroom``.
    """
    new_top = gl.maximum(top, gl.max(s, 1))
    # a row that has seen no key yet: -inf - -inf
    centre = gl.where(new_top == float("-inf"), 0.0, new_top)
    if meta.huge:
        p = s - gl.expand_dims(centre, 1)
        p = gl.exp2(p * scale + meta.headroom if meta.narrow else p * scale)
        shrink = gl.exp2((top - centre) * scale)
    else:
        # one multiply-add feeds each exp2
        shift = centre * scale
        p = gl.exp2(s * scale - gl.expand_dims(shift - meta.headroom, 1))
        shrink = gl.exp2(top * scale - shift)
    if meta.partial_sums:
        total = shrunk(total, shrink) + partial_sums(p)
    else:
        total = total * shrink + gl.sum(p, 1)
    return p, new_top, total, shrink


@gluon.jit
def partial_sums(p):
    """``[ROWS, 4]``: of each row the sums of what each of the four threads holds that share it."""
    return gl.sum(gl.sum(p.reshape([ROWS, p.shape[1] // 8, 4, 2]), 3), 1)


@gluon.jit
def shrunk(o, shrink):
    """``o`` with each row multiplied."""
    return o * gl.expand_dims(gl.convert_layout(shrink, gl.SliceLayout(1, o.type.layout)), 1)


@gluon.jit
def sunk(rows, sizes, tensors, programs: gl.constexpr, meta: gl.constexpr, s_layout: gl.constexpr):
    """Top and total of rows that have seen nothing but their sink."""
    top = gl.full([ROWS], float("-inf"), gl.float32, rows.index.type.layout)
    none = gl.full([ROWS], 0.0, gl.float32, rows.index.type.layout)
    total = none
    if meta.partial_sums:
        total = partial_sums(gl.full([ROWS, meta.block_n], 0.0, gl.float32, s_layout))
    if programs.sink is not None:
        top = of_rows(programs.sink, rows, sizes, tensors)
        # a sink weighs 1 beside its own top
        one: gl.constexpr = 2.0**meta.headroom
        total = total + (0.25 * one if meta.partial_sums else one)
    return top, total


@gluon.jit
def of_rows(program: gl.constexpr, rows, sizes, tensors):
    """What a program that reads neither scores nor keys makes of each row."""
    m = gl.expand_dims(gl.minimum(rows.index, sizes.rows - 1), 1)
    none = gl.full([ROWS, 1], 0.0, gl.float32, m.type.layout)
    return gl.max(none + program(m, m, rows.batch, rows.head, m, m, *tensors), 1)


# --- one work item ----------------------------------------------------------------------------------


@gluon.jit
def overlapped(
    query, q_empty, k, v, panel, turns, step, span, rows, sizes, tensors, programs: gl.constexpr, which: gl.constexpr,
    dtype: gl.constexpr, meta: gl.constexpr, s_layout: gl.constexpr, o_layout: gl.constexpr,
):  # fmt: skip
    """``O``, top and total of 64 rows, and the step after them: scores of one tile beside the output of the last.

    Of float8 a tile's output is added once it is there, to rows that are shrunk as they were when its weights were
    made.
    """
    MASKED: gl.constexpr = meta.left or meta.right or meta.listed
    found = rows_read(rows, tensors, sizes, programs)
    entry = entry_of(span, 0, meta)
    tile = tile_of(entry, meta)
    entry = entry_of(span, 1, meta)
    read = keys_read(tile, found, rows, tensors, sizes, programs, meta)
    take_turn(turns, which, step, meta)
    s = scores(query, k, step, meta, s_layout)
    pass_turn(turns, which, meta)
    s = warpgroup_mma_wait(0, deps=[s])
    release(k, step, meta)
    top, total = sunk(rows, sizes, tensors, programs, meta, s_layout)
    values = panel_of(s, panel, which, step, meta)
    if MASKED or meta.ragged:
        s = cut_logits(s, tile, rows, read, values, sizes, tensors, programs, meta)
    else:
        s = whole_logits(s, tile, rows, read, values, sizes, tensors, programs, meta)
    p, top, total, last = weights(s, top, total, sizes.scale, meta)
    p = carried(p, dtype, meta, o_layout)
    o = gl.full([ROWS, meta.value_block], 0.0, gl.float32, o_layout)
    step += 1
    for back in range(span.stop - 1 - span.start):
        following = entry_of(span, back + 2, meta)
        read = keys_read(tile_of(entry, meta), found, rows, tensors, sizes, programs, meta)
        take_turn(turns, which, step, meta)
        s = scores(query, k, step, meta, s_layout)
        added = output(o, operand_of(p, dtype, meta, o_layout), v, step - 1, meta)
        pass_turn(turns, which, meta)
        s = warpgroup_mma_wait(1, deps=[s])
        release(k, step, meta)
        values = panel_of(s, panel, which, step, meta)
        if MASKED:
            s = either(s, entry, span, rows, read, values, sizes, tensors, programs, meta)
        else:
            s = whole_logits(s, tile_of(entry, meta), rows, read, values, sizes, tensors, programs, meta)
        entry = following
        new_p, top, total, shrink = weights(s, top, total, sizes.scale, meta)
        if meta.narrow:
            hold(v, step - 1, meta)
            added, p, new_p = warpgroup_mma_wait(0, deps=[added, p, new_p])
            release(v, step - 1, meta)
            o = shrunk(o, last) + added
            last = shrink
            new_p = carried(new_p, dtype, meta, o_layout)
        else:
            new_p = carried(new_p, dtype, meta, o_layout)
            hold(v, step - 1, meta)
            added, p, new_p = warpgroup_mma_wait(0, deps=[added, p, new_p])
            release(v, step - 1, meta)
            o = shrunk(added, shrink)
        p = new_p
        step += 1
    if not meta.shared_out:
        mbarrier.arrive(q_empty, count=1)
    added = output(o, operand_of(p, dtype, meta, o_layout), v, step - 1, meta)
    added, p = warpgroup_mma_wait(0, deps=[added, p])
    release(v, step - 1, meta)
    if meta.narrow:
        added = shrunk(o, last) + added
    return added, top, total, step


@gluon.jit
def in_turn(
    query, q_empty, k, v, panel, turns, step, span, rows, sizes, tensors, programs: gl.constexpr, which: gl.constexpr,
    dtype: gl.constexpr, meta: gl.constexpr, s_layout: gl.constexpr, o_layout: gl.constexpr,
):  # fmt: skip
    """As :func:`overlapped`, with one product in flight at a time."""
    top, total = sunk(rows, sizes, tensors, programs, meta, s_layout)
    o = gl.full([ROWS, meta.value_block], 0.0, gl.float32, o_layout)
    found = rows_read(rows, tensors, sizes, programs)
    entry = entry_of(span, 0, meta)
    for back in range(span.stop - span.start):
        following = entry_of(span, back + 1, meta)
        read = keys_read(tile_of(entry, meta), found, rows, tensors, sizes, programs, meta)
        take_turn(turns, which, step, meta)
        s = scores(query, k, step, meta, s_layout)
        pass_turn(turns, which, meta)
        s = warpgroup_mma_wait(0, deps=[s])
        release(k, step, meta)
        values = panel_of(s, panel, which, step, meta)
        if meta.left or meta.right or meta.ragged or meta.listed:
            s = either(s, entry, span, rows, read, values, sizes, tensors, programs, meta)
        else:
            s = whole_logits(s, tile_of(entry, meta), rows, read, values, sizes, tensors, programs, meta)
        entry = following
        p, top, total, shrink = weights(s, top, total, sizes.scale, meta)
        if not meta.narrow:
            o = shrunk(o, shrink)
        p = operand_of(carried(p, dtype, meta, o_layout), dtype, meta, o_layout)
        added = warpgroup_mma_wait(0, deps=[output(o, p, v, step, meta)])
        o = shrunk(o, shrink) + added if meta.narrow else added
        release(v, step, meta)
        step += 1
    if not meta.shared_out:
        mbarrier.arrive(q_empty, count=1)
    return o, top, total, step


@gluon.jit
def store(o, top, total, room, out, first, rows, sizes, tensors, programs: gl.constexpr, meta: gl.constexpr):
    """Rows divided by their totals, to memory by TMA; the copy may still read ``room`` on return."""
    if meta.partial_sums:
        total = gl.convert_layout(gl.sum(total, 1), rows.index.type.layout)
    copies.wait(0)
    by = 1.0 / total
    if programs.factor is not None:
        by = by * of_rows(programs.factor, rows, sizes, tensors)
    room.reshape([ROWS, meta.value_block]).store(shrunk(o, by).to(out.desc.dtype))
    fence_async_shared()
    batch, head = rows.batch[0], rows.head
    copies.store(out.desc, [batch.to(gl.int32), head.to(gl.int32), first, 0], room)
    if meta.lse:
        natural = top * (sizes.scale * LN_2) + (gl.log2(total) - meta.headroom) * LN_2
        gl.store(
            out.lse + (batch * sizes.heads + head) * sizes.rows + rows.index, natural, mask=rows.index < sizes.rows
        )


@gluon.jit
def consume(
    q, k, v, panel, coming, turns, lists, sizes, tensors, out,
    programs: gl.constexpr, which: gl.constexpr, meta: gl.constexpr,
):  # fmt: skip
    """One warpgroup: 64 query rows of each work item."""
    DEPTH: gl.constexpr = 32 if meta.narrow else 16
    s_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, meta.block_n, DEPTH])
    o_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, meta.value_block, DEPTH])
    work: gl.constexpr = overlapped if meta.overlapped else in_turn
    pair, row_tile = item_of(gl.program_id(0), sizes, meta)
    item = place_of(pair // sizes.heads, pair % sizes.heads, row_tile)
    turn = 0
    step = 0
    while item >= 0:
        batch, head = item >> 40, (item >> 24) & 0xFFFF
        row_tile = (item & 0xFFFFFF).to(gl.int32)
        first = row_tile * meta.consumers * ROWS
        rows = Rows(first + which * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, s_layout)), (batch,), head)
        span = span_of(row_tile, batch.to(gl.int32), head.to(gl.int32), lists, sizes, meta)
        mine = span
        if meta.own:
            mine = own_tiles(first + which * ROWS, span, sizes, meta)
            step = skip(span.stop - mine.stop, k, v, panel, turns, which, step, meta)
        place, parity = ring(turn, meta.queries)
        place = place * meta.consumers + which
        mbarrier.wait(q.full.index(place), parity)
        query = q.room.index(place).reshape([ROWS, meta.head_block])
        o, top, total, step = work(
            query, q.empty.index(place), k, v, panel, turns, step, mine, rows, sizes, tensors, programs, which,
            v.desc.dtype, meta, s_layout, o_layout,
        )  # fmt: skip
        if meta.own and meta.left:
            step = skip(mine.start - span.start, k, v, panel, turns, which, step, meta)
        room = out.room.index(place if meta.shared_out else which)
        store(o, top, total, room, out, first + which * ROWS, rows, sizes, tensors, programs, meta)
        if meta.shared_out:
            copies.wait(0)
            mbarrier.arrive(q.empty.index(place), count=1)
        item = announced(turn, coming) if meta.persistent else item * 0 - 1
        turn += 1
    copies.wait(0)


# --- kernel -----------------------------------------------------------------------------------------


@gluon.jit
def barriers_for(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """So many barriers, each complete after so many arrivals."""
    found = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(found.index(i), count=ARRIVALS)
    return found


@gluon.jit
def tiles_for(desc, COUNT: gl.constexpr, READERS: gl.constexpr, PARTS: gl.constexpr = 1):
    """Room for so many tiles, each of so many copies and free again when all its readers have said so."""
    room = gl.allocate_shared_memory(desc.dtype, [COUNT * PARTS] + desc.block_type.shape, desc.layout)
    return Tiles(desc, room, barriers_for(COUNT, 1), barriers_for(COUNT, READERS))


@gluon.jit(
    do_not_specialize=[
        "heads", "group", "kv_batch", "rows", "keys", "left", "right", "row_tiles", "pairs", "together",
        "list_batch", "list_head", "list_length", "scale",
    ],
    do_not_specialize_on_alignment=["lse", "counter", "lists"],
)  # fmt: skip
def attention_forward(
    q_desc, k_desc, v_desc, o_desc, panel_desc, lse, counter, lists, captures, strides, symbols,
    heads, group, kv_batch, rows, keys, left, right, row_tiles, pairs, together, list_batch, list_head, list_length,
    scale,
    programs: gl.constexpr, meta: gl.constexpr,
):  # fmt: skip
    """``out`` and, where asked for, ``lse [B, H, M]`` of one attention, operands ``[B, H, N, D]``.

    Row ``m`` keeps keys ``m + left <= n <= m + right``. ``programs.score`` makes logits of scores and ``.sink`` one of
    a row (:mod:`attnfuse.kernels.triton.text`), both in units of ``scale``, which makes them powers of two; the values
    of captures come after the symbols, read as ``.reads`` says; ``.bare`` is the program of tiles that no mask cuts.
    ``panel_desc`` is the capture that is read in panels. ``lists`` are the key tiles of every row tile, where the mask
    is no band.
    """
    C: gl.constexpr = meta.consumers
    R: gl.constexpr = meta.registers
    q = tiles_for(q_desc, C * meta.queries, 1)
    k = tiles_for(k_desc, meta.stages, C, meta.key_copies)
    v = tiles_for(v_desc, meta.stages, C)
    panel = q
    if meta.panel:
        panel = tiles_for(panel_desc, C, 1)
    o_room = q.room
    if not meta.shared_out:
        o_room = gl.allocate_shared_memory(o_desc.dtype, [C] + o_desc.block_type.shape, o_desc.layout)
    turns = q.full
    if meta.turns:
        turns = barriers_for(C, 1)
    following = gl.allocate_shared_memory(gl.int64, [2, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    coming = Tiles(counter, following, barriers_for(2, 1), barriers_for(2, C))
    sizes = Sizes(
        heads, group, kv_batch, rows, keys, left, right, row_tiles, pairs, together, list_batch, list_head, list_length,
        scale,
    )  # fmt: skip
    tensors, out = Tensors(captures, strides, symbols), Output(o_desc, o_room, lse)
    if C == 2:
        gl.warp_specialize(
            [
                (consume, (q, k, v, panel, coming, turns, lists, sizes, tensors, out, programs, 0, meta)),
                (consume, (q, k, v, panel, coming, turns, lists, sizes, tensors, out, programs, 1, meta)),
                (produce, (q, k, v, panel, coming, lists, sizes, counter, meta)),
            ],
            [4, 1],
            [R, 24],
        )
    else:
        gl.warp_specialize(
            [
                (consume, (q, k, v, panel, coming, turns, lists, sizes, tensors, out, programs, 0, meta)),
                (consume, (q, k, v, panel, coming, turns, lists, sizes, tensors, out, programs, 1, meta)),
                (consume, (q, k, v, panel, coming, turns, lists, sizes, tensors, out, programs, 2, meta)),
                (produce, (q, k, v, panel, coming, lists, sizes, counter, meta)),
            ],
            [4, 4, 1],
            [R, R, 24],
        )
