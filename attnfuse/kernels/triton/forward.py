"""The forward: a program keeps a tile of query rows and walks the keys with an online softmax (FlashAttention-2).

Dao 2023, arXiv 2307.08691. Keys outside of the mask's band are not visited, those inside run without the band's
mask, only the tiles on its edges run with it. The maximum is kept of ``u`` where the logit is ``factor * u``; what
the exponentials are raised to is one multiply-add. Rows are normalised by their sum, so a row that keeps no key
is NaN, as in the written-out program, unless a sink gives it weight.

Operands come with the strides they have. Query and out are ``[b0, b1, h, m, d]`` with ``q_at`` and ``o_at`` their
strides, key and value ``[b0, b1, hk, n, d]``; where loads are by descriptor ``key`` and ``value`` are descriptors
of that shape, whose tiles are zero beyond the edges. ``scope`` is what programs read, ``(captures, strides, symbols)``;
``sizes`` are ``(b1, heads, rows, keys, work, every)``, ``every`` counting the rows of all heads; ``band`` the offsets
``(left, right)`` of :class:`attnfuse.kernels.rows.Band`.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["forward", "merge"]

LN2 = tl.constexpr(0.6931471805599453)
#: SplitMix64, as in :mod:`attnfuse.dropout`.
GOLDEN = tl.constexpr(0x9E3779B97F4A7C15 - 2**64)
FIRST = tl.constexpr(0xBF58476D1CE4E5B9 - 2**64)
SECOND = tl.constexpr(0x94D049BB133111EB - 2**64)
LOW34, LOW37, LOW33 = tl.constexpr(2**34 - 1), tl.constexpr(2**37 - 1), tl.constexpr(2**33 - 1)


@triton.jit
def mixed(x):
    """SplitMix64's mixer."""
    x = (x ^ ((x >> 30) & LOW34)) * FIRST
    x = (x ^ ((x >> 27) & LOW37)) * SECOND
    return x ^ ((x >> 31) & LOW33)


@triton.jit
def row_bits(seed, b, h, m, PLAN: tl.constexpr):
    """The part of dropout's bits that keys share."""
    bits = seed
    if PLAN.batch > 0:
        bits = mixed(bits + GOLDEN * (b[0] + 1))
    if PLAN.batch > 1:
        bits = mixed(bits + GOLDEN * (b[1] + 1))
    bits = mixed(bits + GOLDEN * (h + 1))
    return mixed(bits + GOLDEN * (m.to(tl.int64) + 1))


@triton.jit
def bits_at(seed, b, h, m, PLAN: tl.constexpr):
    """:func:`row_bits` of the seed in memory; of no use, and nothing, where nothing is dropped."""
    bits = m
    if PLAN.dropout > 0.0:
        bits = row_bits(tl.load(seed), b, h, m, PLAN)
    return bits


@triton.jit
def kept(bits, n, PLAN: tl.constexpr):
    """Which weights dropout keeps."""
    both = (bits ^ mixed(GOLDEN * (n.to(tl.int64) + 1))) * FIRST
    both = ((both ^ (both >> 29)) >> 32) & 0x7FFFFFFF
    return both >= PLAN.dropped_below


# --- where a program is -----------------------------------------------------------------------------


@triton.jit
def row_tiles(rows, PLAN: tl.constexpr):
    """How many tiles the rows of a head have; of all heads that share a key head where they are packed."""
    return tl.cdiv(rows * PLAN.group, PLAN.rows)


@triton.jit
def head_at(head, sizes, PLAN: tl.constexpr):
    """Batch and key head of a program's ``head``, for addresses, and all three as descriptors have them."""
    b1_size, heads = sizes[0], sizes[1]
    in_batch = heads // PLAN.group
    outer, hk = head // in_batch, (head % in_batch) // (PLAN.groups // PLAN.group)
    b = ((outer // b1_size).to(tl.int64), (outer % b1_size).to(tl.int64))
    where = ((outer // b1_size).to(tl.int32), (outer % b1_size).to(tl.int32), hk.to(tl.int32))
    return b, hk, where


@triton.jit
def rows_at(tile, head, sizes, PLAN: tl.constexpr):
    """Rows and heads of a tile's rows, and which there are: the last is repeated in place of those there are not."""
    heads, rows = sizes[1], sizes[2]
    r, in_batch = tile * PLAN.rows + tl.arange(0, PLAN.rows), heads // PLAN.group
    inside = (r < rows * PLAN.group)[:, None]
    m = tl.minimum(r // PLAN.group, rows - 1)[:, None]
    if PLAN.packed:
        h = ((head % in_batch) * PLAN.group + r % PLAN.group).to(tl.int64)[:, None]
    else:
        h = (head % in_batch).to(tl.int64)
    return m, h, inside


@triton.jit
def flat(b, h, m, sizes):
    """The place of rows among those of all heads."""
    return ((b[0] * sizes[0] + b[1]) * sizes[1] + h) * sizes[2] + m


# --- what it loads ----------------------------------------------------------------------------------


@triton.jit
def load_query(query, at, b, h, m, inside, PLAN: tl.constexpr):
    """A tile of query, ``[PLAN.rows, PLAN.padded]``, in the type of the first product."""
    d = tl.arange(0, PLAN.padded)
    rows = query + (b[0] * at[0] + b[1] * at[1] + h * at[2] + m.to(tl.int64) * at[3])
    q = tl.load(rows + (d * at[4])[None, :], mask=inside & (d < PLAN.width)[None, :], other=0.0)
    return q.to(PLAN.score_type)


@triton.jit
def of_head(source, at, b, hk, PLAN: tl.constexpr):
    """Where tiles of one head of key or value are loaded from: a descriptor is told at each load."""
    if not PLAN.descriptors:
        source = source + (b[0] * at[0] + b[1] * at[1] + hk.to(tl.int64) * at[2])
    return source


@triton.jit
def load_keys(
    source, at, where, first, keys, WIDTH: tl.constexpr, PADDED: tl.constexpr, EDGE: tl.constexpr, PLAN: tl.constexpr
):
    """A tile of key or value, ``[PLAN.keys, PADDED]``."""
    if PLAN.descriptors:
        if PLAN.batch > 1:
            tile = source.load([where[0], where[1], where[2], first, 0]).reshape(PLAN.keys, PADDED)
        else:
            tile = source.load([where[0], where[2], first, 0]).reshape(PLAN.keys, PADDED)
    else:
        n, d = tl.arange(0, PLAN.keys), tl.arange(0, PADDED)
        base = source + tl.cast(first, tl.int64) * at[3]
        pointers = base + (n * at[3])[:, None] + (d * at[4])[None, :]
        if EDGE:
            inside = (n[:, None] < keys - first) & (d[None, :] < WIDTH)
            tile = tl.load(pointers, mask=inside, other=0.0)
        elif PADDED != WIDTH:
            tile = tl.load(pointers, mask=d[None, :] < WIDTH, other=0.0)
        else:
            tile = tl.load(pointers)
    return tile


@triton.jit
def load_value(source, at, where, first, keys, EDGE: tl.constexpr, PLAN: tl.constexpr):
    """A tile of value, ``[PLAN.keys, PLAN.value_padded]``, also where it lies transposed, in the type of weights."""
    if PLAN.descriptors and PLAN.value_minor == "n":
        if PLAN.batch > 1:
            tile = source.load([where[0], where[1], where[2], 0, first]).reshape(PLAN.value_padded, PLAN.keys).trans()
        else:
            tile = source.load([where[0], where[2], 0, first]).reshape(PLAN.value_padded, PLAN.keys).trans()
    else:
        tile = load_keys(source, at, where, first, keys, PLAN.value_width, PLAN.value_padded, EDGE, PLAN)
    return tile.to(PLAN.weight_type)


# --- an online softmax ------------------------------------------------------------------------------


@triton.jit
def no_keys(b, h, m, scope, PLAN: tl.constexpr):
    """The sums of a tile of rows before any key: of a sink alone, where there is one."""
    acc = tl.full([PLAN.rows, PLAN.value_padded], 0.0, tl.float32)
    top = tl.full([PLAN.rows], -float("inf"), tl.float32)
    total = tl.full([PLAN.rows], 0.0, tl.float32)
    if PLAN.sink is not None:
        # a key like any other, of weight one relative to itself, without a value
        u = PLAN.sink(m * 0.0, m * 0.0, b, h, m, m, *scope)
        top = tl.reshape(tl.broadcast_to(u + m * 0.0, [PLAN.rows, 1]), [PLAN.rows])
        total = tl.where(top == -float("inf"), 0.0, PLAN.sink_weight)
    return acc, top, total


@triton.jit
def logits(q, k, b, h, m, first, keys, scope, CORE: tl.constexpr, PLAN: tl.constexpr):
    """``u`` of a tile, float32 ``[PLAN.rows, PLAN.keys]``; -inf beyond the last key."""
    s = tl.dot(q, k.trans(), input_precision=PLAN.precision)
    return programmed(s, b, h, m, first, keys, scope, CORE, PLAN)


@triton.jit
def programmed(s, b, h, m, first, keys, scope, CORE: tl.constexpr, PLAN: tl.constexpr):
    """The score program on a tile of raw scores."""
    n = (first + tl.arange(0, PLAN.keys))[None, :]
    if CORE:
        u = PLAN.core(s, s, b, h, m, n, *scope)
    elif PLAN.even:
        u = PLAN.masked(s, s, b, h, m, n, *scope)
    else:
        u = PLAN.masked(s, s, b, h, m, tl.minimum(n, keys - 1), *scope)
        u = tl.where(n < keys, u, -float("inf"))
    return tl.broadcast_to(u, s.shape)


@triton.jit
def powers(u, top, PLAN: tl.constexpr, HEADROOM: tl.constexpr = 0.0):
    """``2 ** (exponent * (u - top) + HEADROOM)``; by a single multiply-add where a product may be rounded."""
    if PLAN.precise:
        return tl.exp2((u - top) * PLAN.exponent + HEADROOM)
    return tl.exp2(u * PLAN.exponent - (top * PLAN.exponent - HEADROOM))


@triton.jit
def softmax_step(u, top, total, PLAN: tl.constexpr):
    """Weights of a tile relative to the new maximum, what earlier sums shrink by, and the new maximum and sum."""
    highest = tl.maximum(top, tl.max(u, 1))
    # a row of nothing but -inf so far has no maximum to subtract
    base = tl.where(highest == -float("inf"), 0.0, highest)
    weight = powers(u, base[:, None], PLAN, PLAN.headroom)
    shrink = powers(top, base, PLAN)
    return weight, shrink, highest, total * shrink + tl.sum(weight, 1)


@triton.jit
def dropped(weight, bits, first, PLAN: tl.constexpr):
    """Weights after dropout; those that stay are scaled when the row is normalised."""
    if PLAN.dropout > 0.0:
        n = (first + tl.arange(0, PLAN.keys))[None, :]
        weight = tl.where(kept(bits, n, PLAN), weight, weight * 0.0)
    return weight


@triton.jit
def weighed(weight, b, h, m, bits, first, keys, scope, PLAN: tl.constexpr):
    """What multiplies a tile of value: weights after the part of their program that varies along the keys."""
    if PLAN.key_factor is not None:
        n = tl.minimum((first + tl.arange(0, PLAN.keys))[None, :], keys - 1)
        weight = weight * PLAN.key_factor(weight, weight, b, h, m, n, *scope)
    return dropped(weight, bits, first, PLAN).to(PLAN.weight_type)


@triton.jit
def added(acc, weight, v, PLAN: tl.constexpr):
    """``acc`` plus a tile's product. Hopper's units sum float8 with 14 bits, enough for a tile but not for all keys."""
    if PLAN.apart:
        acc += tl.dot(weight, v, input_precision=PLAN.precision)
    else:
        acc = tl.dot(weight, v, acc, input_precision=PLAN.precision)
    return acc


@triton.jit
def walk(
    acc, top, total, q, key, value, k_at, v_at, where, b, h, m, bits, first, last, keys, scope,
    CORE: tl.constexpr, PLAN: tl.constexpr,
):  # fmt: skip
    """Adds the keys ``first..last-1`` to the sums of a tile of rows."""
    for n0 in tl.range(first, last, PLAN.keys, num_stages=PLAN.stages):
        k = load_keys(key, k_at, where, n0, keys, PLAN.width, PLAN.padded, not CORE and not PLAN.even, PLAN)
        u = logits(q, k.to(PLAN.score_type), b, h, m, n0, keys, scope, CORE, PLAN)
        weight, shrink, top, total = softmax_step(u, top, total, PLAN)
        acc = acc * shrink[:, None]
        v = load_value(value, v_at, where, n0, keys, not CORE and not PLAN.even, PLAN)
        weight = weighed(weight, b, h, m, bits, n0, keys, scope, PLAN)
        acc = added(acc, weight, v, PLAN)
    return acc, top, total


@triton.jit
def walk_ahead(
    acc, top, total, q, key, value, k_at, v_at, where, b, h, m, bits, first, last, keys, scope,
    PLAN: tl.constexpr,
):  # fmt: skip
    """:func:`walk` inside the band, the next product of query and key started before this tile's softmax."""
    if first < last:
        k = load_keys(key, k_at, where, first, keys, PLAN.width, PLAN.padded, False, PLAN).to(PLAN.score_type)
        s = tl.dot(q, k.trans(), input_precision=PLAN.precision)
        for n0 in tl.range(first, last, PLAN.keys, num_stages=PLAN.stages):
            # the last tile is multiplied once more, for nothing
            n1 = tl.minimum(n0 + PLAN.keys, last - PLAN.keys)
            k = load_keys(key, k_at, where, n1, keys, PLAN.width, PLAN.padded, False, PLAN).to(PLAN.score_type)
            ahead = tl.dot(q, k.trans(), input_precision=PLAN.precision)
            u = programmed(s, b, h, m, n0, keys, scope, True, PLAN)
            weight, shrink, top, total = softmax_step(u, top, total, PLAN)
            acc = acc * shrink[:, None]
            v = load_value(value, v_at, where, n0, keys, False, PLAN)
            weight = weighed(weight, b, h, m, bits, n0, keys, scope, PLAN)
            acc = added(acc, weight, v, PLAN)
            s = ahead
    return acc, top, total


@triton.jit
def walk_behind(
    acc, top, total, q, key, value, k_at, v_at, where, b, h, m, bits, first, last, keys, scope,
    PLAN: tl.constexpr,
):  # fmt: skip
    """:func:`walk` inside the band, weights multiplied with value one tile late."""
    if first < last:
        v = load_value(value, v_at, where, first, keys, False, PLAN)
        late = tl.full([PLAN.rows, PLAN.keys], 0.0, tl.float32).to(PLAN.weight_type)
        for n0 in tl.range(first, last, PLAN.keys, num_stages=PLAN.stages):
            k = load_keys(key, k_at, where, n0, keys, PLAN.width, PLAN.padded, False, PLAN).to(PLAN.score_type)
            s = tl.dot(q, k.trans(), input_precision=PLAN.precision)
            v = load_value(value, v_at, where, tl.maximum(n0 - PLAN.keys, first), keys, False, PLAN)
            acc = added(acc, late, v, PLAN)
            u = programmed(s, b, h, m, n0, keys, scope, True, PLAN)
            weight, shrink, top, total = softmax_step(u, top, total, PLAN)
            acc = acc * shrink[:, None]
            late = weighed(weight, b, h, m, bits, n0, keys, scope, PLAN)
        v = load_value(value, v_at, where, last - PLAN.keys, keys, False, PLAN)
        acc = added(acc, late, v, PLAN)
    return acc, top, total


@triton.jit
def spans(tile, rows, keys, band, PLAN: tl.constexpr):
    """Where the keys of a tile of rows begin, where those that every row keeps begin and end, and where all end.

    All but the last are whole tiles of keys.
    """
    m_first = tile * PLAN.rows // PLAN.group
    m_last = tl.minimum((tile * PLAN.rows + PLAN.rows - 1) // PLAN.group, rows - 1)
    first, last = m_first * 0, m_first * 0 + keys
    core_first, core_last = first, last
    if PLAN.left:
        first = tl.minimum(tl.maximum(m_first + band[0], 0), keys)
        core_first = tl.minimum(tl.maximum(m_last + band[0], 0), keys)
    if PLAN.right:
        last = tl.minimum(tl.maximum(m_last + 1 + band[1], 0), keys)
        core_last = tl.minimum(tl.maximum(m_first + 1 + band[1], 0), keys)
    first = first // PLAN.keys * PLAN.keys
    core_first = tl.minimum((core_first + PLAN.keys - 1) // PLAN.keys * PLAN.keys, tl.cdiv(last, PLAN.keys) * PLAN.keys)
    core_first = tl.maximum(core_first, first)
    core_last = tl.maximum(core_last // PLAN.keys * PLAN.keys, core_first)
    return first, core_first, core_last, last


@triton.jit
def log_sums(top, total, PLAN: tl.constexpr):
    """The natural log of each row's sum."""
    return tl.where(top == -float("inf"), top, top * PLAN.factor + (tl.log2(total) - PLAN.headroom) * LN2)


@triton.jit
def factored(acc, b, h, m, scope, PLAN: tl.constexpr):
    """Sums after the part of their weights' program that is one for a row."""
    if PLAN.row_factor is not None:
        acc = acc * PLAN.row_factor(m * 0.0, m * 0.0, b, h, m, m, *scope)
    return acc


@triton.jit
def write(acc, top, total, out, lse, o_at, b, h, m, inside, sizes, PLAN: tl.constexpr):
    """Normalises a tile of rows and stores it, and its lse where that is asked for."""
    found = acc / total[:, None]
    if PLAN.dropout > 0.0:
        found = found * PLAN.kept_scale
    dv = tl.arange(0, PLAN.value_padded)
    o_rows = out + (b[0] * o_at[0] + b[1] * o_at[1] + h * o_at[2] + m.to(tl.int64) * o_at[3])
    inside_out = inside & (dv < PLAN.value_width)[None, :]
    tl.store(o_rows + (dv * o_at[4])[None, :], found.to(out.dtype.element_ty), mask=inside_out)
    if PLAN.with_lse:
        tl.store(lse + flat(b, h, m, sizes), log_sums(top, total, PLAN)[:, None], mask=inside)


# --- bodies -----------------------------------------------------------------------------------------


@triton.jit
def row_tile(
    work, query, key, value, out, lse, partial, scope, seed, q_at, k_at, v_at, o_at, sizes, band,
    PLAN: tl.constexpr,
):  # fmt: skip
    """Computes one tile of rows of one head; of all heads that share a key head where they are packed."""
    _, _, rows, keys, _, every = sizes
    tiles = row_tiles(rows, PLAN)
    split = work % PLAN.splits
    work = work // PLAN.splits
    tile, head = work % tiles, work // tiles
    if PLAN.order == "longest first":
        tile = tiles - 1 - tile
    b, hk, where = head_at(head, sizes, PLAN)
    m, h, inside = rows_at(tile, head, sizes, PLAN)
    q = load_query(query, q_at, b, h, m, inside, PLAN)
    key, value = of_head(key, k_at, b, hk, PLAN), of_head(value, v_at, b, hk, PLAN)
    acc, top, total = no_keys(b, h, m, scope, PLAN)
    bits = bits_at(seed, b, h, m, PLAN)

    first, core_first, core_last, last = spans(tile, rows, keys, band, PLAN)
    if PLAN.splits > 1:
        # a sink counts once
        top, total = tl.where(split == 0, top, -float("inf")), tl.where(split == 0, total, 0.0)
        size = tl.cdiv(tl.cdiv(last - first, PLAN.keys), PLAN.splits) * PLAN.keys
        begin = first + split * size
        first, last = begin, tl.minimum(last, begin + size)
        core_first = tl.minimum(tl.maximum(core_first, begin), begin + size)
        core_last = tl.maximum(tl.minimum(core_last, begin + size), core_first)
    if PLAN.left:
        acc, top, total = walk(acc, top, total, q, key, value, k_at, v_at, where, b, h, m, bits,
                               first, core_first, keys, scope, False, PLAN)  # fmt: skip
    if PLAN.pipelining == "none":
        acc, top, total = walk(acc, top, total, q, key, value, k_at, v_at, where, b, h, m, bits,
                               core_first, core_last, keys, scope, True, PLAN)  # fmt: skip
    elif PLAN.pipelining == "query-key ahead":
        acc, top, total = walk_ahead(acc, top, total, q, key, value, k_at, v_at, where, b, h, m, bits,
                                     core_first, core_last, keys, scope, PLAN)  # fmt: skip
    else:
        acc, top, total = walk_behind(acc, top, total, q, key, value, k_at, v_at, where, b, h, m, bits,
                                      core_first, core_last, keys, scope, PLAN)  # fmt: skip
    if PLAN.right or not PLAN.even:
        acc, top, total = walk(acc, top, total, q, key, value, k_at, v_at, where, b, h, m, bits,
                               core_last, last, keys, scope, False, PLAN)  # fmt: skip
    if PLAN.rest:
        # behind a finite fill a row that keeps nothing weighs every key
        dead = tl.min(top, 0) <= PLAN.floor
        acc, top, total = walk(acc, top, total, q, key, value, k_at, v_at, where, b, h, m, bits,
                               0, tl.where(dead, first, 0), keys, scope, False, PLAN)  # fmt: skip
        after = tl.maximum(tl.cdiv(last, PLAN.keys) * PLAN.keys, first)
        acc, top, total = walk(acc, top, total, q, key, value, k_at, v_at, where, b, h, m, bits,
                               after, tl.where(dead, keys, after), keys, scope, False, PLAN)  # fmt: skip

    acc = factored(acc, b, h, m, scope, PLAN)
    if PLAN.splits > 1:
        tops, totals, sums = partial
        place, dv = split * every + flat(b, h, m, sizes), tl.arange(0, PLAN.value_padded)
        tl.store(tops + place, top[:, None], mask=inside)
        tl.store(totals + place, total[:, None], mask=inside)
        tl.store(sums + place * PLAN.value_width + dv[None, :], acc, mask=inside & (dv < PLAN.value_width)[None, :])
    else:
        write(acc, top, total, out, lse, o_at, b, h, m, inside, sizes, PLAN)


@triton.jit
def merge(partial, out, lse, o_at, sizes, PLAN: tl.constexpr):
    """The spans of keys of :func:`forward` together, a row a program; one without keys has maximum -inf and sum 0."""
    b1_size, heads, rows, _, _, every = sizes
    flat = tl.program_id(0).to(tl.int64)
    tops, totals, sums = partial
    s, dv = tl.arange(0, PLAN.splits_padded), tl.arange(0, PLAN.value_padded)
    place = s * every + flat
    top = tl.load(tops + place, mask=s < PLAN.splits, other=-float("inf"))
    highest = tl.max(top, 0)
    base = tl.where(highest == -float("inf"), 0.0, highest)
    share = powers(top, base, PLAN)
    total = tl.sum(share * tl.load(totals + place, mask=s < PLAN.splits, other=0.0), 0)
    inside = (s < PLAN.splits)[:, None] & (dv < PLAN.value_width)[None, :]
    acc = tl.load(sums + place[:, None] * PLAN.value_width + dv[None, :], mask=inside, other=0.0)
    found = tl.sum(acc * share[:, None], 0) / total
    if PLAN.dropout > 0.0:
        found = found * PLAN.kept_scale
    m, head = flat % rows, flat // rows
    h, outer = head % heads, head // heads
    o_row = out + (outer // b1_size * o_at[0] + outer % b1_size * o_at[1] + h * o_at[2] + m * o_at[3])
    tl.store(o_row + dv * o_at[4], found.to(out.dtype.element_ty), mask=dv < PLAN.value_width)
    if PLAN.with_lse:
        tl.store(lse + flat, log_sums(highest, total, PLAN))


@triton.jit
def forward(
    query, key, value, out, lse, partial, scope, seed, q_at, k_at, v_at, o_at, sizes, band,
    PLAN: tl.constexpr,
):  # fmt: skip
    """Writes ``out`` and, where it is asked for, ``lse [b0, b1, h, m]``; of split keys, what :func:`merge` reads."""
    if PLAN.order == "persistent":
        for work in range(tl.program_id(0), sizes[4], tl.num_programs(0)):
            row_tile(work, query, key, value, out, lse, partial, scope, seed,
                     q_at, k_at, v_at, o_at, sizes, band, PLAN)  # fmt: skip
    else:
        row_tile(tl.program_id(0), query, key, value, out, lse, partial, scope, seed,
                 q_at, k_at, v_at, o_at, sizes, band, PLAN)  # fmt: skip
