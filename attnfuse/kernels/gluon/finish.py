"""The last pass of a backward: dQ from the order in which blocks add to it, scaled and rounded."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["finish"]


@triton.jit
def finish(
    added, target, heads, rows, at_batch, at_head, at_row, factor,
    TILE: tl.constexpr, BLOCK: tl.constexpr, WIDTH: tl.constexpr, WARPS: tl.constexpr,
):  # fmt: skip
    """Writes ``target [B, H, M, D]``, a tile a program, from tiles that a backward added to."""
    DOWN: tl.constexpr = TILE // 16
    ACROSS: tl.constexpr = WARPS // DOWN
    FOURS: tl.constexpr = BLOCK // ACROSS // 16
    tiles = tl.cdiv(rows, TILE)
    work = tl.program_id(0)
    head = work // tiles
    found = tl.load(added + work.to(tl.int64) * (TILE * BLOCK) + tl.arange(0, TILE * BLOCK))
    parts = tl.reshape(found, [FOURS, 2, DOWN, ACROSS, 8, 4, 2, 2])
    found = tl.reshape(tl.permute(parts, [2, 1, 4, 3, 0, 6, 5, 7]), [TILE, BLOCK])
    m = work % tiles * TILE + tl.arange(0, TILE)
    d = tl.arange(0, BLOCK)
    base = target + (head // heads).to(tl.int64) * at_batch + (head % heads).to(tl.int64) * at_head
    pointers = base + m.to(tl.int64)[:, None] * at_row + d[None, :]
    tl.store(pointers, (found * factor).to(target.dtype.element_ty), mask=(m < rows)[:, None] & (d < WIDTH)[None, :])
