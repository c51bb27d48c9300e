"""The backward, without atomics: dQ by tiles of rows, dK and dV by tiles of keys, captures with dQ or by reductions.

With ``p`` the weights, ``x`` the logits and ``delta = sum(grad_out * out) - grad_lse`` of a row, ``dx = p * (dp -
delta)`` (Dao 2023, arXiv 2307.08691, appendix). The score program's derivative, a program too, maps ``dx`` to the
gradients of scores and captures. Every sum is one program's own, in one order: results are the same on every run.

A row's weights are ``2 ** (exponent * (u - top)) * norm``. For most rows ``top`` is the forward's lse in the units
of ``u`` and ``norm`` is 1. In a row that keeps nothing behind a finite fill the lse swallows the log of the number of
keys, so :func:`row_sums` computes maximum and sum of such rows again. Where there is one, or a row of NaN, no key is
skipped: ``strange`` is an integer on the device, not zero then.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnfuse.kernels.triton.forward import kept, powers, row_bits

__all__ = ["captured_gradient", "keys_gradient", "row_sums", "rows_gradient"]

#: Rows whose lse is below are summed again.
FAINT = tl.constexpr(-1000.0)
#: Heads whose longest tiles are started first.
TOGETHER = tl.constexpr(16)


@triton.jit
def load_tile(
    source, at, first, limit, TILE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr, EDGE: tl.constexpr
):
    """Rows ``first..first+TILE-1`` of a matrix, ``[TILE, PADDED]``; zero beyond its edges."""
    i, d = tl.arange(0, TILE), tl.arange(0, PADDED)
    pointers = source + tl.cast(first, tl.int64) * at[3] + (i * at[3])[:, None] + (d * at[4])[None, :]
    if EDGE:
        found = tl.load(pointers, mask=(i[:, None] < limit - first) & (d[None, :] < WIDTH), other=0.0)
    elif PADDED != WIDTH:
        found = tl.load(pointers, mask=d[None, :] < WIDTH, other=0.0)
    else:
        found = tl.load(pointers)
    return found


@triton.jit
def store_tile(target, at, first, limit, found, TILE: tl.constexpr, WIDTH: tl.constexpr, PADDED: tl.constexpr):
    """The inverse of :func:`load_tile`."""
    i, d = tl.arange(0, TILE), tl.arange(0, PADDED)
    pointers = target + tl.cast(first, tl.int64) * at[3] + (i * at[3])[:, None] + (d * at[4])[None, :]
    inside = (i[:, None] < limit - first) & (d[None, :] < WIDTH)
    tl.store(pointers, found.to(target.dtype.element_ty), mask=inside)


@triton.jit
def placed(source, at, b, h):
    """A pointer to the matrix of one batch and head."""
    return source + (b[0] * at[0] + b[1] * at[1] + tl.cast(h, tl.int64) * at[2])


@triton.jit
def row_index(m, rows, PLAN: tl.constexpr):
    """Row indices that lie inside the tensors."""
    return m if PLAN.even_rows else tl.minimum(m, rows - 1)


@triton.jit
def key_index(n, keys, PLAN: tl.constexpr):
    """Key indices that lie inside the tensors."""
    return n if PLAN.even else tl.minimum(n, keys - 1)


@triton.jit
def logit_of_tile(s, b, h, m, n, rows, keys, scope, CORE: tl.constexpr, PLAN: tl.constexpr):
    """``u`` on a tile of any orientation; -inf beyond the last key. ``m`` and ``n`` are shaped alike."""
    inside_m, inside_n = row_index(m, rows, PLAN), key_index(n, keys, PLAN)
    if CORE:
        u = PLAN.core(s, s, b, h, inside_m, inside_n, *scope)
    else:
        u = PLAN.masked(s, s, b, h, inside_m, inside_n, *scope)
    if not CORE and not PLAN.even:
        u = tl.where(n < keys, u, -float("inf"))
    return u


@triton.jit
def differentiated(
    s, dp, top, norm, delta, bits, b, h, m, n, rows, keys, scope,
    CORE: tl.constexpr, PLAN: tl.constexpr,
):  # fmt: skip
    """The weights that multiply value, those of the softmax, and the gradient of the logits."""
    u = logit_of_tile(s, b, h, m, n, rows, keys, scope, CORE, PLAN)
    weight = powers(u, top, PLAN) * norm
    used = weight
    if PLAN.dropout > 0.0:
        keep = kept(bits, n, PLAN)
        used = tl.where(keep, weight * PLAN.kept_scale, 0.0)
        dp = tl.where(keep, dp * PLAN.kept_scale, 0.0)
    return used, weight, weight * (dp - delta)


@triton.jit
def pulled(s, dx, b, h, m, n, rows, keys, scope, CORE: tl.constexpr, PLAN: tl.constexpr):
    """The gradient of the raw scores, divided by the logit's factor."""
    inside_m, inside_n = row_index(m, rows, PLAN), key_index(n, keys, PLAN)
    if CORE:
        ds = PLAN.core_pulled(s, dx, b, h, inside_m, inside_n, *scope)
    else:
        ds = PLAN.masked_pulled(s, dx, b, h, inside_m, inside_n, *scope)
    return tl.broadcast_to(ds, dx.shape)


@triton.jit
def decoded(head, sizes, PLAN: tl.constexpr):
    """Batch indices, query head and key head."""
    b1_size, heads, _, _, _ = sizes
    outer, h = head // heads, head % heads
    b = ((outer // b1_size).to(tl.int64), (outer % b1_size).to(tl.int64))
    return b, h.to(tl.int64), h // PLAN.groups


@triton.jit
def assigned(tiles, heads, PLAN: tl.constexpr):
    """Which tile and head, of all batches, a program has; ``heads`` are those of one batch."""
    work = tl.program_id(0)
    every = tl.num_programs(0) // tiles
    if PLAN.left or PLAN.right:
        # tiles differ in length: the first of several heads, whose operands stay in the L2 cache, then the second
        group = work // (TOGETHER * tiles)
        inside = work - group * TOGETHER * tiles
        size = tl.minimum(TOGETHER, every - group * TOGETHER)
        tile, head = inside // size, group * TOGETHER + inside % size
    elif PLAN.upright:
        # the batches, which mostly read the same captured tensor, side by side
        batches = every // heads
        tile, head = work // batches % tiles, work % batches * heads + work // (batches * tiles)
    else:
        tile, head = work % tiles, work // tiles
    return tile, head


# --- rows: delta, and what normalises the weights ---------------------------------------------------


@triton.jit
def row_sums(
    query, key, out, grad_out, lse, grad_lse, top_of, norm_of, delta_of, sink_of, strange_of, scope,
    q_at, k_at, o_at, g_at, sizes, PLAN: tl.constexpr,
):  # fmt: skip
    """Of every row ``top``, ``norm``, ``delta`` and, with a sink, its logit's gradient: ``[b0, b1, h, m]``."""
    _, _, rows, keys, _ = sizes
    tiles = tl.cdiv(rows, PLAN.rows)
    work = tl.program_id(0)
    tile, head = work % tiles, work // tiles
    b, h, hk = decoded(head, sizes, PLAN)
    first = tile * PLAN.rows
    i = first + tl.arange(0, PLAN.rows)
    inside = i < rows
    flat = tl.cast(head, tl.int64) * rows + i

    found = load_tile(
        placed(out, o_at, b, h), o_at, first, rows, PLAN.rows, PLAN.value_width, PLAN.value_padded, not PLAN.even_rows
    )
    grad = load_tile(
        placed(grad_out, g_at, b, h),
        g_at,
        first,
        rows,
        PLAN.rows,
        PLAN.value_width,
        PLAN.value_padded,
        not PLAN.even_rows,
    )
    delta = tl.sum(found.to(tl.float32) * grad.to(tl.float32), 1)
    if grad_lse is not None:
        delta -= tl.load(grad_lse + flat, mask=inside, other=0.0)
    sums = tl.load(lse + flat, mask=inside, other=0.0)
    top = sums / PLAN.factor
    norm = tl.full([PLAN.rows], 1.0, tl.float32)
    if PLAN.uncertain:
        strange = tl.max(((sums < FAINT) | (sums != sums)).to(tl.int32), 0)
        tl.store(strange_of + work, strange)
        if strange != 0:
            highest = tl.full([PLAN.rows], -float("inf"), tl.float32)
            total = tl.full([PLAN.rows], 0.0, tl.float32)
            q = load_tile(
                placed(query, q_at, b, h), q_at, first, rows, PLAN.rows, PLAN.width, PLAN.padded, not PLAN.even_rows
            )
            keys_of = placed(key, k_at, b, hk)
            for n0 in range(0, keys, PLAN.keys):
                k = load_tile(keys_of, k_at, n0, keys, PLAN.keys, PLAN.width, PLAN.padded, not PLAN.even)
                s = tl.dot(q, k.trans(), input_precision=PLAN.precision)
                n = (n0 + tl.arange(0, PLAN.keys))[None, :]
                u = logit_of_tile(s, b, h, i[:, None], n, rows, keys, scope, False, PLAN)
                higher = tl.maximum(highest, tl.max(u, 1))
                base = tl.where(higher == -float("inf"), 0.0, higher)
                total = total * powers(highest, base, PLAN) + tl.sum(powers(u, base[:, None], PLAN), 1)
                highest = higher
            faint = (sums < FAINT) & (highest > -float("inf"))
            top = tl.where(faint, highest, top)
            norm = tl.where(faint, 1.0 / total, norm)
    if sink_of is not None:
        # the sink's own weight, whose value is zero
        u = PLAN.sink(i[:, None] * 0.0, i[:, None] * 0.0, b, h, tl.minimum(i, rows - 1)[:, None], i[:, None],
                      *scope)  # fmt: skip
        u = tl.reshape(tl.broadcast_to(u + i[:, None] * 0.0, [PLAN.rows, 1]), [PLAN.rows])
        weight = tl.where(u == -float("inf"), 0.0, powers(u, top, PLAN) * norm)
        tl.store(sink_of + flat, -weight * delta, mask=inside)
    tl.store(top_of + flat, top, mask=inside)
    tl.store(norm_of + flat, norm, mask=inside)
    tl.store(delta_of + flat, delta, mask=inside)


@triton.jit
def load_rows_of(sums, seed, head, first, rows, b, h, PLAN: tl.constexpr):
    """What the rows of a tile bring along; the weight of a row beyond the last is zero."""
    top_of, norm_of, delta_of = sums
    i = first + tl.arange(0, PLAN.rows)
    flat = tl.cast(head, tl.int64) * rows + i
    top = tl.load(top_of + flat, mask=i < rows, other=float("inf"))
    norm = tl.full([PLAN.rows], 1.0, tl.float32)
    if PLAN.uncertain:
        norm = tl.load(norm_of + flat, mask=i < rows, other=0.0)
    delta = tl.load(delta_of + flat, mask=i < rows, other=0.0)
    bits = flat
    if PLAN.dropout > 0.0:
        bits = row_bits(tl.load(seed), b, h, i, PLAN)
    return i, top, norm, delta, bits


# --- dQ ---------------------------------------------------------------------------------------------


@triton.jit
def captured_scores(s, dx, b, h, i, n, rows, keys, scope, CORE: tl.constexpr, PLAN: tl.constexpr):
    """What a tile of scores has for the gradient of a captured tensor, ``[rows, keys]``; zero beyond the edges."""
    found = PLAN.captured(s, dx, b, h, row_index(i, rows, PLAN)[:, None], key_index(n, keys, PLAN), *scope)
    found = tl.broadcast_to(found, dx.shape)
    if not PLAN.even_rows:
        found = tl.where(i[:, None] < rows, found, 0.0)
    if not CORE and not PLAN.even:
        found = tl.where(n < keys, found, 0.0)
    return found


@triton.jit
def summed_over_keys(s, weight, dx, b, h, i, n, rows, keys, scope, CORE: tl.constexpr, PLAN: tl.constexpr):
    """What a tile has for :func:`balanced`: sums over its keys, ``[rows]``."""
    found = tl.sum(captured_scores(s, dx, b, h, i, n, rows, keys, scope, CORE, PLAN), 1)
    of_weight = tl.sum(captured_scores(s, weight, b, h, i, n, rows, keys, scope, CORE, PLAN), 1)
    return found, of_weight, tl.sum(dx, 1)


@triton.jit
def balanced(total, of_weight, balance, due, flat, inside):
    """The gradient that a row has for a captured tensor, as if ``delta`` had been exact.

    ``total`` is that of the row's ``dx``, ``of_weight`` what its weights would have in their place. ``delta`` is of an
    ``out`` that was rounded, so ``dx`` is off by a multiple of the row's weights, and a sum over many scores collects
    that. The multiple is seen in ``balance``, the sum of ``dx``: it should be zero, or ``due`` where a sink or the lse
    takes part.
    """
    if due is not None:
        balance -= tl.load(due + flat, mask=inside, other=0.0)
    # a row that keeps nothing, or a masked key of NaN, says nothing about delta
    balance = tl.where(tl.abs(balance) < float("inf"), balance, 0.0)
    return total - balance * of_weight


@triton.jit
def walk_keys(
    dq, total, of_weight, balance, q, grad, keys_of, values_of, k_at, v_at, target, head, i,
    top, norm, delta, bits, b, h, first, last, rows, keys, scope, CORE: tl.constexpr, PLAN: tl.constexpr,
):  # fmt: skip
    """Adds the keys ``first..last-1`` to the gradient of a tile of rows, and to that of the captured tensor."""
    for n0 in tl.range(first, last, PLAN.keys, num_stages=PLAN.stages):
        n = (n0 + tl.arange(0, PLAN.keys))[None, :]
        k = load_tile(keys_of, k_at, n0, keys, PLAN.keys, PLAN.width, PLAN.padded, not CORE and not PLAN.even)
        v = load_tile(
            values_of, v_at, n0, keys, PLAN.keys, PLAN.value_width, PLAN.value_padded, not CORE and not PLAN.even
        )
        s = tl.dot(q, k.trans(), input_precision=PLAN.precision)
        dp = tl.dot(grad, v.trans(), input_precision=PLAN.precision)
        _, weight, dx = differentiated(s, dp, top[:, None], norm[:, None], delta[:, None], bits[:, None], b, h,
                                       i[:, None], n, rows, keys, scope, CORE, PLAN)  # fmt: skip
        if PLAN.reduce == "keys":
            sums = summed_over_keys(s, weight, dx, b, h, i, n, rows, keys, scope, CORE, PLAN)
            total, of_weight, balance = total + sums[0], of_weight + sums[1], balance + sums[2]
        if PLAN.reduce == "heads":
            found = captured_scores(s, dx, b, h, i, n, rows, keys, scope, CORE, PLAN)
            place = (tl.cast(head, tl.int64) * rows + i)[:, None] * keys + n
            inside = (i[:, None] < rows) & (n < keys)
            tl.store(target + place, found.to(target.dtype.element_ty), mask=inside)
        ds = pulled(s, dx, b, h, i[:, None], n, rows, keys, scope, CORE, PLAN)
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PLAN.precision)
    return dq, total, of_weight, balance


@triton.jit
def rows_gradient(
    query, key, value, grad_out, grad_query, target, due, sums, strange, scope, seed,
    q_at, k_at, v_at, g_at, dq_at, sizes, band, PLAN: tl.constexpr,
):  # fmt: skip
    """Writes ``grad_query``, a tile of rows a program, and on the way ``target``, the gradient of a captured tensor.

    ``PLAN.reduce`` "keys": ``target [b0, b1, h, m]``, and ``due``, as :func:`balanced` has it, or None. "heads":
    ``target [b0, b1, h, m, n]``. "": there is none.
    """
    _, heads, rows, keys, _ = sizes
    tiles = tl.cdiv(rows, PLAN.rows)
    tile, head = assigned(tiles, heads, PLAN)
    if PLAN.right:
        tile = tiles - 1 - tile
    b, h, hk = decoded(head, sizes, PLAN)
    first = tile * PLAN.rows
    i, top, norm, delta, bits = load_rows_of(sums, seed, head, first, rows, b, h, PLAN)
    q = load_tile(placed(query, q_at, b, h), q_at, first, rows, PLAN.rows, PLAN.width, PLAN.padded, not PLAN.even_rows)
    grad = load_tile(
        placed(grad_out, g_at, b, h),
        g_at,
        first,
        rows,
        PLAN.rows,
        PLAN.value_width,
        PLAN.value_padded,
        not PLAN.even_rows,
    )
    keys_of, values_of = placed(key, k_at, b, hk), placed(value, v_at, b, hk)
    dq = tl.full([PLAN.rows, PLAN.padded], 0.0, tl.float32)
    total = tl.full([PLAN.rows], 0.0, tl.float32)
    of_weight, balance = total, total

    start, core_start, core_stop, stop = (
        first * 0,
        first * 0,
        first * 0 + keys // PLAN.keys * PLAN.keys,
        first * 0 + keys,
    )
    m_last = tl.minimum(first + PLAN.rows, rows) - 1
    if PLAN.left:
        start = tl.minimum(tl.maximum(first + band[0], 0), keys) // PLAN.keys * PLAN.keys
        core_start = tl.cdiv(tl.maximum(m_last + band[0], 0), PLAN.keys) * PLAN.keys
    if PLAN.right:
        stop = tl.minimum(tl.maximum(m_last + 1 + band[1], 0), keys)
        core_stop = tl.minimum(tl.maximum(first + 1 + band[1], 0), keys) // PLAN.keys * PLAN.keys
    core_start = tl.maximum(tl.minimum(core_start, tl.cdiv(stop, PLAN.keys) * PLAN.keys), start)
    if PLAN.uncertain and (PLAN.left or PLAN.right):
        everything = tl.load(strange) != 0
        start, stop = tl.where(everything, 0, start), tl.where(everything, keys, stop)
    core_stop = tl.maximum(core_stop, core_start)
    if PLAN.left:
        dq, total, of_weight, balance = walk_keys(
            dq, total, of_weight, balance, q, grad, keys_of, values_of, k_at, v_at, target, head, i,
            top, norm, delta, bits, b, h, start, core_start, rows, keys, scope, False, PLAN,
        )  # fmt: skip
    dq, total, of_weight, balance = walk_keys(
        dq, total, of_weight, balance, q, grad, keys_of, values_of, k_at, v_at, target, head, i,
        top, norm, delta, bits, b, h, core_start, core_stop, rows, keys, scope, True, PLAN,
    )  # fmt: skip
    if PLAN.right or not PLAN.even:
        dq, total, of_weight, balance = walk_keys(
            dq, total, of_weight, balance, q, grad, keys_of, values_of, k_at, v_at, target, head, i,
            top, norm, delta, bits, b, h, core_stop, stop, rows, keys, scope, False, PLAN,
        )  # fmt: skip
    store_tile(
        placed(grad_query, dq_at, b, h), dq_at, first, rows, dq * PLAN.factor, PLAN.rows, PLAN.width, PLAN.padded
    )
    if PLAN.reduce == "keys":
        flat = tl.cast(head, tl.int64) * rows + i
        total = balanced(total, of_weight, balance, due, flat, i < rows)
        tl.store(target + flat, total.to(target.dtype.element_ty), mask=i < rows)


# --- dK and dV --------------------------------------------------------------------------------------


@triton.jit
def walk_rows(
    dk, dv, k, v, rows_of, grads_of, q_at, g_at, sums, seed, head, n, b, h, first, last, rows, keys,
    scope, KEY: tl.constexpr, VALUE: tl.constexpr, CORE: tl.constexpr, PLAN: tl.constexpr,
):  # fmt: skip
    """Adds rows ``first..last-1`` of a query head to the gradients of a tile of keys that are asked for.

    Tiles are ``[keys, rows]``, so that their products' operands stay in registers; where a captured tensor is read for
    each score they lie as it does, ``[rows, keys]``.
    """
    for m0 in tl.range(first, last, PLAN.rows, num_stages=PLAN.stages):
        i, top, norm, delta, bits = load_rows_of(sums, seed, head, m0, rows, b, h, PLAN)
        q = load_tile(rows_of, q_at, m0, rows, PLAN.rows, PLAN.width, PLAN.padded, not PLAN.even_rows)
        grad = load_tile(grads_of, g_at, m0, rows, PLAN.rows, PLAN.value_width, PLAN.value_padded, not PLAN.even_rows)
        if PLAN.upright:
            s = tl.dot(q, k.trans(), input_precision=PLAN.precision)
            dp = tl.dot(grad, v.trans(), input_precision=PLAN.precision) if KEY else s
            used, _, dx = differentiated(s, dp, top[:, None], norm[:, None], delta[:, None], bits[:, None], b, h,
                                         i[:, None], n[None, :], rows, keys, scope, CORE, PLAN)  # fmt: skip
            if VALUE:
                dv = tl.dot(used.to(grad.dtype).trans(), grad, dv, input_precision=PLAN.precision)
            if KEY:
                ds = pulled(s, dx, b, h, i[:, None], n[None, :], rows, keys, scope, CORE, PLAN)
                dk = tl.dot(ds.to(q.dtype).trans(), q, dk, input_precision=PLAN.precision)
        else:
            s = tl.dot(k, q.trans(), input_precision=PLAN.precision)
            dp = tl.dot(v, grad.trans(), input_precision=PLAN.precision) if KEY else s
            used, _, dx = differentiated(s, dp, top[None, :], norm[None, :], delta[None, :], bits[None, :], b, h,
                                         i[None, :], n[:, None], rows, keys, scope, CORE, PLAN)  # fmt: skip
            if VALUE:
                dv = tl.dot(used.to(grad.dtype), grad, dv, input_precision=PLAN.precision)
            if KEY:
                ds = pulled(s, dx, b, h, i[None, :], n[:, None], rows, keys, scope, CORE, PLAN)
                dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PLAN.precision)
    return dk, dv


@triton.jit
def keys_gradient(
    query, key, value, grad_out, grad_key, grad_value, sums, strange, scope, seed,
    q_at, k_at, v_at, g_at, dk_at, dv_at, sizes, band, PLAN: tl.constexpr,
):  # fmt: skip
    """Writes ``grad_key`` and ``grad_value``, a tile of keys a program, all query heads that share it in turn.

    One of them may be None: its products are left out.
    """
    b1_size, heads, rows, keys, _ = sizes
    tiles = tl.cdiv(keys, PLAN.keys)
    in_batch = heads // PLAN.groups
    tile, key_head = assigned(tiles, in_batch, PLAN)
    outer, hk = key_head // in_batch, key_head % in_batch
    b = ((outer // b1_size).to(tl.int64), (outer % b1_size).to(tl.int64))
    first = tile * PLAN.keys
    n = first + tl.arange(0, PLAN.keys)
    k = load_tile(placed(key, k_at, b, hk), k_at, first, keys, PLAN.keys, PLAN.width, PLAN.padded, not PLAN.even)
    v = load_tile(
        placed(value, v_at, b, hk), v_at, first, keys, PLAN.keys, PLAN.value_width, PLAN.value_padded, not PLAN.even
    )
    dk = tl.full([PLAN.keys, PLAN.padded], 0.0, tl.float32)
    dv = tl.full([PLAN.keys, PLAN.value_padded], 0.0, tl.float32)

    start, stop = first * 0, first * 0 + rows
    if PLAN.right:
        start = tl.minimum(tl.maximum(first - band[1], 0), rows) // PLAN.rows * PLAN.rows
    if PLAN.left:
        stop = tl.minimum(tl.maximum(tl.minimum(first + PLAN.keys, keys) - band[0], 0), rows)
    if PLAN.uncertain and (PLAN.left or PLAN.right):
        everything = tl.load(strange) != 0
        start, stop = tl.where(everything, 0, start), tl.where(everything, rows, stop)
    for g in range(PLAN.groups):
        h = (hk * PLAN.groups + g).to(tl.int64)
        head = outer * heads + hk * PLAN.groups + g
        rows_of, grads_of = placed(query, q_at, b, h), placed(grad_out, g_at, b, h)
        # one loop: the tiles that a mask leaves whole cost a compare each, a second loop in the same program spills
        dk, dv = walk_rows(dk, dv, k, v, rows_of, grads_of, q_at, g_at, sums, seed, head, n, b, h,
                           start, stop, rows, keys, scope, grad_key is not None, grad_value is not None,
                           not (PLAN.left or PLAN.right), PLAN)  # fmt: skip
    if grad_key is not None:
        target = placed(grad_key, dk_at, b, hk)
        store_tile(target, dk_at, first, keys, dk * PLAN.factor, PLAN.keys, PLAN.width, PLAN.padded)
    if grad_value is not None:
        target = placed(grad_value, dv_at, b, hk)
        store_tile(target, dv_at, first, keys, dv, PLAN.keys, PLAN.value_width, PLAN.value_padded)


# --- captures ---------------------------------------------------------------------------------------


@triton.jit
def captured_tile(
    query, key, value, grad_out, sums, scope, seed,
    q_at, k_at, v_at, g_at, head, m0, n0, b, h, hk, rows, keys, PLAN: tl.constexpr,
):  # fmt: skip
    """The gradient that one tile of scores has for a captured tensor, ``[rows, keys]``; by "keys" the sums of it."""
    i, top, norm, delta, bits = load_rows_of(sums, seed, head, m0, rows, b, h, PLAN)
    n = (n0 + tl.arange(0, PLAN.keys))[None, :]
    q = load_tile(placed(query, q_at, b, h), q_at, m0, rows, PLAN.rows, PLAN.width, PLAN.padded, not PLAN.even_rows)
    k = load_tile(placed(key, k_at, b, hk), k_at, n0, keys, PLAN.keys, PLAN.width, PLAN.padded, not PLAN.even)
    grad = load_tile(
        placed(grad_out, g_at, b, h), g_at, m0, rows, PLAN.rows, PLAN.value_width, PLAN.value_padded, not PLAN.even_rows
    )
    v = load_tile(
        placed(value, v_at, b, hk), v_at, n0, keys, PLAN.keys, PLAN.value_width, PLAN.value_padded, not PLAN.even
    )
    s = tl.dot(q, k.trans(), input_precision=PLAN.precision)
    dp = tl.dot(grad, v.trans(), input_precision=PLAN.precision)
    _, weight, dx = differentiated(s, dp, top[:, None], norm[:, None], delta[:, None], bits[:, None], b, h, i[:, None],
                                   n, rows, keys, scope, False, PLAN)  # fmt: skip
    if PLAN.reduce == "keys":
        found = summed_over_keys(s, weight, dx, b, h, i, n, rows, keys, scope, False, PLAN)
    else:
        found = captured_scores(s, dx, b, h, i, n, rows, keys, scope, False, PLAN)
    return found


@triton.jit
def captured_gradient(
    query, key, value, grad_out, target, due, sums, strange, scope, seed,
    q_at, k_at, v_at, g_at, sizes, band, reduced, PLAN: tl.constexpr,
):  # fmt: skip
    """The gradient of one captured tensor, in sums over what its tiles share.

    ``PLAN.reduce`` "heads": a program has one tile of scores and sums the ``reduced`` heads (batches included), which
    lie ``sizes[4]`` apart; ``target [heads that stay, m, n]``. "keys": a program has a tile of rows and sums all keys;
    ``target [b0, b1, h, m]``, ``due`` as :func:`balanced` has it, or None. "rows": the other way round; ``target [b0,
    b1, h, n]``.
    """
    _, _, rows, keys, apart = sizes
    work = tl.program_id(0)
    row_tiles, key_tiles = tl.cdiv(rows, PLAN.rows), tl.cdiv(keys, PLAN.keys)
    if PLAN.reduce == "heads":
        m0, n0 = (work // key_tiles) % row_tiles * PLAN.rows, work % key_tiles * PLAN.keys
        stays = work // (row_tiles * key_tiles)
        found = tl.full([PLAN.rows, PLAN.keys], 0.0, tl.float32)
        for r in range(reduced):
            # of [outer, reduced, apart] heads, the reduced ones are summed
            head = (stays // apart * reduced + r) * apart + stays % apart
            b, h, hk = decoded(head, sizes, PLAN)
            found += captured_tile(query, key, value, grad_out, sums, scope, seed,
                                   q_at, k_at, v_at, g_at, head, m0, n0, b, h, hk, rows, keys, PLAN)  # fmt: skip
        i, j = m0 + tl.arange(0, PLAN.rows), n0 + tl.arange(0, PLAN.keys)
        pointers = target + (tl.cast(stays, tl.int64) * rows + i)[:, None] * keys + j[None, :]
        tl.store(pointers, found.to(target.dtype.element_ty), mask=(i < rows)[:, None] & (j < keys)[None, :])
    elif PLAN.reduce == "keys":
        m0, head = work % row_tiles * PLAN.rows, work // row_tiles
        b, h, hk = decoded(head, sizes, PLAN)
        start, stop = m0 * 0, m0 * 0 + keys
        if PLAN.left:
            start = tl.minimum(tl.maximum(m0 + band[0], 0), keys) // PLAN.keys * PLAN.keys
        if PLAN.right:
            stop = tl.minimum(tl.maximum(m0 + PLAN.rows + band[1], 0), keys)
        if PLAN.uncertain and (PLAN.left or PLAN.right):
            everything = tl.load(strange) != 0
            start, stop = tl.where(everything, 0, start), tl.where(everything, keys, stop)
        total = tl.full([PLAN.rows], 0.0, tl.float32)
        of_weight, balance = total, total
        for n0 in range(start, stop, PLAN.keys):
            found = captured_tile(query, key, value, grad_out, sums, scope, seed,
                                  q_at, k_at, v_at, g_at, head, m0, n0, b, h, hk, rows, keys, PLAN)  # fmt: skip
            total, of_weight, balance = total + found[0], of_weight + found[1], balance + found[2]
        i = m0 + tl.arange(0, PLAN.rows)
        flat = tl.cast(head, tl.int64) * rows + i
        total = balanced(total, of_weight, balance, due, flat, i < rows)
        tl.store(target + flat, total.to(target.dtype.element_ty), mask=i < rows)
    else:
        n0, head = work % key_tiles * PLAN.keys, work // key_tiles
        b, h, hk = decoded(head, sizes, PLAN)
        total = tl.full([PLAN.keys], 0.0, tl.float32)
        for m0 in range(0, rows, PLAN.rows):
            found = captured_tile(query, key, value, grad_out, sums, scope, seed,
                                  q_at, k_at, v_at, g_at, head, m0, n0, b, h, hk, rows, keys, PLAN)  # fmt: skip
            total += tl.sum(found, 0)
        j = n0 + tl.arange(0, PLAN.keys)
        tl.store(target + tl.cast(head, tl.int64) * keys + j, total.to(target.dtype.element_ty), mask=j < keys)
