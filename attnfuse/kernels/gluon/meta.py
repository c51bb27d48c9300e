"""The compile-time choices of a body."""

from __future__ import annotations

from dataclasses import dataclass, replace

__all__ = ["Meta"]


@dataclass(frozen=True)
class Meta:
    """What a forward knows when it is compiled: first what tuning chooses, then facts of the attention.

    ``head_block`` and ``value_block`` are the widths of tiles, ``block_n`` their keys, ``stages`` how many of each are
    in shared memory. ``consumers`` warpgroups have ``registers`` each. ``overlapped`` runs one tile's softmax beside
    another's product, and ``held`` keeps ptxas from undoing it. ``shared_out`` lets the output leave through the
    query's room. A ``persistent`` grid is one block a multiprocessor, and takes its work in order or, ``dynamic``,
    from a counter; ``longest_first`` orders it for a causal mask, ``short_last`` for rows that do not fill their last
    tile. ``queries`` tiles of query rows are in shared memory for each consumer. A consumer takes part in its ``own``
    rows' tiles alone, not in all that the block's rows reach. ``partial_sums`` adds up a row's weights in each of its
    threads and only at the end together; ``turns`` makes consumers start their products one after the other.
    """

    head_block: int
    value_block: int
    block_n: int = 128
    stages: int = 2
    consumers: int = 2
    registers: int = 240
    overlapped: bool = True
    held: bool = True
    shared_out: bool = False
    persistent: bool = True
    dynamic: bool = False
    longest_first: bool = False
    short_last: bool = False
    queries: int = 1
    own: bool = False
    partial_sums: bool = False
    turns: bool = False
    #: The band is closed on the left, on the right; the last tile is not full of keys.
    left: bool = False
    right: bool = False
    ragged: bool = False
    #: Logits may be as large as floats are (:class:`attnfuse.kernels.triton.Logit`).
    huge: bool = False
    lse: bool = False
    #: Operands are float8, and weights at most two to this (:data:`attnfuse.kernels.float8.HEADROOM`); else zero.
    headroom: float = 0.0
    #: Key tiles come from lists.
    listed: bool = False
    #: A capture that varies along rows and keys is read in panels, by the copy engine; it varies along batch, head.
    panel: bool = False
    panel_batch: bool = False
    panel_head: bool = False

    @property
    def narrow(self) -> bool:
        """Whether operands are float8."""
        return self.headroom > 0.0

    @property
    def key_copies(self) -> int:
        """Copies that make a tile of keys."""
        return 2 * max(self.head_block // 128, 1) if self.narrow else 1

    @property
    def registers_at_entry(self) -> int:
        """Of each thread: a multiprocessor's, shared by consumers and producer alike, in steps of 8."""
        return 65536 // (128 * (self.consumers + 1)) // 8 * 8

    def having(self, **facts: bool | float) -> Meta:
        """These choices, for an attention of which these facts are known."""
        return replace(self, **facts)  # type: ignore[arg-type]
