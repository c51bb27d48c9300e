"""The weights alone: a program keeps a tile of query rows and walks its keys twice.

The first walk finds each row's maximum and sum as :mod:`attnfuse.kernels.triton.forward` does, the second computes the
scores again and writes ``2 ** (exponent * (u - top)) / total``: to multiply twice is cheaper than to write scores and
read them. Keys outside of the mask's band are not multiplied; their weights are zero, or NaN where the row's are.

Operands, ``scope``, ``sizes`` and ``band`` are as in the forward; ``out [b0, b1, h, m, n]`` is contiguous.
"""

from __future__ import annotations

import triton
import triton.language as tl

from attnfuse.kernels.triton.forward import load_keys, logits, powers, softmax_step, spans

__all__ = ["weigh"]


@triton.jit
def sum_keys(top, total, q, key, k_at, where, b, h, m, first, last, keys, scope, CORE: tl.constexpr,
             PLAN: tl.constexpr):  # fmt: skip
    """Adds the keys ``first..last-1`` to the maxima and sums of a tile of rows."""
    for n0 in tl.range(first, last, PLAN.keys, num_stages=PLAN.stages):
        k = load_keys(key, k_at, where, n0, keys, PLAN.width, PLAN.padded, not CORE and not PLAN.even, PLAN)
        u = logits(q, k.to(PLAN.score_type), b, h, m, n0, keys, scope, CORE, PLAN)
        _, _, top, total = softmax_step(u, top, total, PLAN)
    return top, total


@triton.jit
def write_keys(out, inside, base, total, q, key, k_at, where, b, h, m, first, last, keys, scope, CORE: tl.constexpr,
               PLAN: tl.constexpr):  # fmt: skip
    """Writes the weights of the keys ``first..last-1`` to a tile of rows, which begin at ``out [PLAN.rows, 1]``."""
    for n0 in tl.range(first, last, PLAN.keys, num_stages=PLAN.stages):
        k = load_keys(key, k_at, where, n0, keys, PLAN.width, PLAN.padded, not CORE and not PLAN.even, PLAN)
        u = logits(q, k.to(PLAN.score_type), b, h, m, n0, keys, scope, CORE, PLAN)
        weight = powers(u, base[:, None], PLAN) / total[:, None]
        n = (n0 + tl.arange(0, PLAN.keys))[None, :]
        tl.store(out + n, weight.to(out.dtype.element_ty), mask=inside & (n < keys))


@triton.jit
def write_beside(out, inside, total, first, last, keys, PLAN: tl.constexpr):
    """Writes the weights of keys that no row of the tile keeps."""
    beside = (total * 0.0 / total)[:, None] + tl.full([PLAN.rows, PLAN.keys], 0.0, tl.float32)
    for n0 in tl.range(first, last, PLAN.keys):
        n = (n0 + tl.arange(0, PLAN.keys))[None, :]
        tl.store(out + n, beside.to(out.dtype.element_ty), mask=inside & (n < keys))


@triton.jit
def weigh(query, key, out, scope, q_at, k_at, sizes, band, PLAN: tl.constexpr):
    """Writes one tile of rows of one head of ``out``."""
    b1_size, heads, rows, keys = sizes
    work = tl.program_id(0)
    tiles = tl.cdiv(rows, PLAN.rows)
    tile, head = work % tiles, work // tiles
    outer, h = head // heads, (head % heads).to(tl.int64)
    b = ((outer // b1_size).to(tl.int64), (outer % b1_size).to(tl.int64))
    hk = (head % heads) // PLAN.groups
    where = ((outer // b1_size).to(tl.int32), (outer % b1_size).to(tl.int32), hk.to(tl.int32))

    r, d = tile * PLAN.rows + tl.arange(0, PLAN.rows), tl.arange(0, PLAN.padded)
    inside, m = (r < rows)[:, None], tl.minimum(r, rows - 1)[:, None]
    q_rows = query + (b[0] * q_at[0] + b[1] * q_at[1] + h * q_at[2] + m.to(tl.int64) * q_at[3])
    q = tl.load(q_rows + (d * q_at[4])[None, :], mask=inside & (d < PLAN.width)[None, :], other=0.0)
    q = q.to(PLAN.score_type)
    if not PLAN.descriptors:
        key = key + (b[0] * k_at[0] + b[1] * k_at[1] + hk.to(tl.int64) * k_at[2])
    out = out + (((b[0] * b1_size + b[1]) * heads + h) * rows + m) * keys

    top = tl.full([PLAN.rows], -float("inf"), tl.float32)
    total = tl.full([PLAN.rows], 0.0, tl.float32)
    if PLAN.sink is not None:
        # a key like any other, of weight one relative to itself
        u = PLAN.sink(m * 0.0, m * 0.0, b, h, m, m, *scope)
        top = tl.reshape(tl.broadcast_to(u + m * 0.0, [PLAN.rows, 1]), [PLAN.rows])
        total = tl.where(top == -float("inf"), 0.0, PLAN.sink_weight)

    first, core_first, core_last, last = spans(tile, rows, keys, band, PLAN)
    after = tl.maximum(tl.cdiv(last, PLAN.keys) * PLAN.keys, first)
    if PLAN.left:
        top, total = sum_keys(top, total, q, key, k_at, where, b, h, m, first, core_first, keys, scope, False, PLAN)
    top, total = sum_keys(top, total, q, key, k_at, where, b, h, m, core_first, core_last, keys, scope, True, PLAN)
    if PLAN.right or not PLAN.even:
        top, total = sum_keys(top, total, q, key, k_at, where, b, h, m, core_last, last, keys, scope, False, PLAN)
    before, beyond = first, after
    if PLAN.rest:
        # behind a finite fill a row that keeps nothing weighs every key
        dead = tl.min(top, 0) <= PLAN.floor
        before, beyond = tl.where(dead, 0, first), tl.where(dead, keys, after)
        top, total = sum_keys(top, total, q, key, k_at, where, b, h, m, 0, first - before, keys, scope, False, PLAN)
        top, total = sum_keys(top, total, q, key, k_at, where, b, h, m, after, beyond, keys, scope, False, PLAN)

    base = tl.where(top == -float("inf"), 0.0, top)
    write_beside(out, inside, total, 0, before, keys, PLAN)
    if PLAN.rest:
        write_keys(out, inside, base, total, q, key, k_at, where, b, h, m, before, first, keys, scope, False, PLAN)
    if PLAN.left:
        write_keys(out, inside, base, total, q, key, k_at, where, b, h, m, first, core_first, keys, scope, False, PLAN)
    write_keys(out, inside, base, total, q, key, k_at, where, b, h, m, core_first, core_last, keys, scope, True, PLAN)
    if PLAN.right or not PLAN.even:
        write_keys(out, inside, base, total, q, key, k_at, where, b, h, m, core_last, last, keys, scope, False, PLAN)
    if PLAN.rest:
        write_keys(out, inside, base, total, q, key, k_at, where, b, h, m, after, beyond, keys, scope, False, PLAN)
    write_beside(out, inside, total, beyond, keys, keys, PLAN)
