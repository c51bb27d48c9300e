"""``attnfuse::blocks_of_band``: which blocks of keys flex_attention reads for each block of query rows.

``create_block_mask`` evaluates a mask at every score, and its result would be a constant of the graph. A band is two
edges; and as one operator its blocks are one node of the graph and buffers that Inductor does not take apart.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask

from attnfuse.kernels.rows import Band

__all__ = ["BLOCK", "block_mask"]

#: Rows and keys of a block. On a Zen 4 core 64 rows, 256 keys or 512 keys were no faster.
BLOCK = 128

_LIBRARY = torch.library.Library("attnfuse", "FRAGMENT")
_LIBRARY.define(
    "blocks_of_band(Tensor query, int keys, int? left, int? right, bool exact) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def block_mask(band: Band, query: Tensor, keys: int, keep: Callable[..., Tensor]) -> BlockMask:
    """The blocks that ``band`` reaches; those that lie inside it are full, and ``keep`` is not asked there.

    ``query [B, H, M, D]`` gives the number of rows; the blocks are the same for every batch and head.
    """
    partial, partial_indices, full, full_indices = torch.ops.attnfuse.blocks_of_band.default(
        query, keys, band.left, band.right, band.exact
    )
    lengths = (query.shape[-2], keys)
    return BlockMask.from_kv_blocks(
        partial, partial_indices, full, full_indices, BLOCK, keep, lengths, compute_q_blocks=False
    )


def _blocks(query: Tensor, keys: int, left: int | None, right: int | None, exact: bool) -> tuple[Tensor, ...]:
    found = _computed(Band(left, right, exact), query.shape[-2], keys)
    # an operator's results are the caller's own
    return tuple(tensor.clone() for tensor in found)


@lru_cache(maxsize=64)
def _computed(band: Band, rows: int, keys: int) -> tuple[Tensor, ...]:
    """Numbers of partial blocks ``[1, 1, rows]``, their indices ``[1, 1, rows, keys]``, and the same of full blocks."""
    partial: list[list[int]] = []
    full: list[list[int]] = []
    for first in range(0, rows, BLOCK):
        start, stop = band.reach(first, min(first + BLOCK, rows), keys)
        reached = range(start // BLOCK, _count(stop))
        inner, outer = band.core(first, min(first + BLOCK, rows), keys) if band.exact else (0, 0)
        inside = range(_count(inner), _count(keys) if outer == keys else outer // BLOCK)
        partial.append([block for block in reached if block not in inside])
        full.append([block for block in reached if block in inside])
    return *_padded(partial, _count(keys)), *_padded(full, _count(keys))


def _padded(blocks: list[list[int]], width: int) -> tuple[Tensor, Tensor]:
    numbers = torch.tensor([[[len(row) for row in blocks]]], dtype=torch.int32)
    return numbers, torch.tensor([[[row + [0] * (width - len(row)) for row in blocks]]], dtype=torch.int32)


def _count(length: int) -> int:
    return -(-length // BLOCK)


def _fake(query: Tensor, keys: int, left: int | None, right: int | None, exact: bool) -> tuple[Tensor, ...]:
    rows = _count(query.shape[-2])
    shapes = ((1, 1, rows), (1, 1, rows, _count(keys)))
    return tuple(query.new_empty(shape, dtype=torch.int32) for shape in shapes * 2)


_LIBRARY.impl("blocks_of_band", _blocks, "CompositeExplicitAutograd")
torch.library.register_fake("attnfuse::blocks_of_band", _fake, lib=_LIBRARY)
