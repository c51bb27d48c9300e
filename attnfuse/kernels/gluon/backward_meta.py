"""The compile-time choices of the backward body."""

from __future__ import annotations

from dataclasses import dataclass

from attnfuse.kernels.gluon.tuned import block_of

__all__ = ["BackwardMeta", "backward_meta"]


@dataclass(frozen=True)
class BackwardMeta:
    """What a backward knows when it is compiled: first what tuning chooses, then facts of the attention.

    ``head_block`` and ``value_block`` are the widths of tiles, ``block_m`` their rows, ``block_n`` their keys;
    ``stages`` tiles of queries and of gradients are in shared memory. What normalises rows is read ``early``, beside
    the products, or when it is needed. ``longest_first`` orders a causal mask's blocks.
    """

    head_block: int
    value_block: int
    block_m: int = 64
    block_n: int = 128
    stages: int = 3
    early: bool = False
    longest_first: bool = False
    #: The band is closed on the left, on the right; the last tile is not full of keys, not full of rows.
    left: bool = False
    right: bool = False
    ragged: bool = False
    ragged_rows: bool = False
    #: Logits may be as large as floats are; a row may keep nothing; what it then sees is a fill of its program.
    huge: bool = False
    uncertain: bool = False
    filled: bool = False
    #: Row tiles come from lists.
    listed: bool = False
    #: A capture that varies along rows and keys is read in panels, by the copy engine; it varies along batch, head.
    panel: bool = False
    panel_batch: bool = False
    panel_head: bool = False
    #: Its gradient, which is that of the scores, is written; it is added to what is there.
    panel_gradient: bool = False
    panel_added: bool = False

    @property
    def registers_at_entry(self) -> int:
        """Of each thread: a multiprocessor's, shared by two consumers and a warpgroup of copies, in steps of 8."""
        return 65536 // (128 * 3) // 8 * 8


def backward_meta(width: int, value_width: int, *, banded: bool) -> BackwardMeta:
    """The choices for heads of these widths, up to 128; measured on one H200 (NOTES.md says how)."""
    blocks = block_of(width), block_of(value_width)
    # a tile of 64 takes half as long as one of 128, so more of them have to be on their way
    stages = 3 if max(blocks) > 64 else 4 if banded else 5
    return BackwardMeta(*blocks, stages=stages)
