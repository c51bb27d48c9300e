"""One call of the blocked kernel: its operands, cut to blocks and brought to the shape of a batched matrix product."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from attnfuse.dropout import kept
from attnfuse.form import form_of
from attnfuse.kernels.cpu.blocks import Block, Layout, Span, blocks
from attnfuse.kernels.cpu.chain import Chain
from attnfuse.kernels.rows import Band, band_of, rows_kept
from attnfuse.reference import Scope, compute_dtype, seed_of
from attnfuse.spec import AttentionSpec

__all__ = ["Call"]

#: A fill at or below this absorbs any score: a masked weight is zero wherever the row keeps a key.
ABSORBING = -1e30


@dataclass(frozen=True)
class Call:
    """The operands of one attention, shapes as in :mod:`attnfuse.spec`; ``training`` in its backward."""

    spec: AttentionSpec
    query: Tensor
    key: Tensor
    value: Tensor
    captures: Sequence[Tensor]
    symbols: Sequence[int]
    training: bool = False

    @property
    def operands(self) -> tuple[AttentionSpec, Tensor, Tensor, Tensor, Sequence[Tensor], Sequence[int]]:
        """What a kernel's ``run`` is given."""
        return self.spec, self.query, self.key, self.value, self.captures, self.symbols

    @property
    def empty(self) -> bool:
        """Whether there is no score, or nothing to contract."""
        return 0 in (*self.query.shape, *self.key.shape, *self.value.shape)

    @cached_property
    def dtype(self) -> torch.dtype:
        """The type of scores and weights."""
        return compute_dtype(self.query.dtype)

    @cached_property
    def layout(self) -> Layout:
        """The sizes that blocks are cut from."""
        *batch, heads, rows, _ = self.query.shape
        kv_heads, keys, _ = self.key.shape[-3:]
        return Layout(tuple(batch), kv_heads, heads // kv_heads, rows, keys)

    @cached_property
    def band(self) -> Band:
        """The band outside of which a key has weight zero, and no gradient; open where that is not certain.

        A row that keeps no key has weight NaN on all keys behind -inf, unless it has a sink, and equal
        weights on all keys behind a finite fill.
        """
        form, sizes = form_of(self.spec.score), tuple(self.symbols)
        if form is None or not form.keep:
            return Band(exact=False)
        harmless = form.fill == float("-inf") and (not self.training or self.spec.sink is not None)
        absorbed = form.fill <= ABSORBING and rows_kept(self.spec, self.layout.rows, self.layout.keys, sizes)
        return band_of(self.spec, sizes) if harmless or absorbed else Band(exact=False)

    def blocks(self) -> Iterator[tuple[Block, Chain]]:
        """Every block, with a chain that blocks of the same rows share."""
        rows: Span | None = None
        for block in blocks(self.layout, self.band, torch.get_num_threads()):
            if block.rows != rows:
                rows = block.rows
                chain = Chain(self.spec.captures, block.core if self.band.exact else None)
            yield block, chain

    def scope(self, block: Block) -> Scope:
        """What programs read on a block, without scores."""
        return Scope(block.spans, self.captures, self.symbols, self.dtype, self.query.device)

    def kept(self, block: Block) -> Tensor:
        """Dropout's mask on a block, scaled: 0 or ``1 / (1 - p)``."""
        p = self.spec.dropout
        mask = kept(seed_of(self.spec, self.captures), p, self.scope(block).indices())
        return mask.to(self.dtype).mul_(1 / (1 - p) if p < 1 else 0.0)

    def heads_of(self, block: Block, tensor: Tensor) -> Tensor:
        """Query, out or lse ``[*B, H, M, ...]`` cut to a block: a view."""
        for axis, (first, last) in enumerate(block.spans[:-1]):
            tensor = tensor.narrow(axis, first, last - first)
        return tensor

    def rows_of(self, block: Block, tensor: Tensor) -> Tensor:
        """Query or out's gradient on a block as ``[lead, groups * rows, D]``."""
        return self.heads_of(block, tensor).reshape(block.lead, -1, tensor.shape[-1])

    def keys_of(self, block: Block, tensor: Tensor) -> Tensor:
        """Key or value ``[*B, Hkv, N, D]`` on a block as ``[lead, keys, D]``; broadcast batches are expanded."""
        for axis, (first, last) in enumerate((*block.batch, block.kv_heads, block.keys)):
            if tensor.shape[axis] != 1 or last - first == 1 and first == 0:
                tensor = tensor.narrow(axis, first, last - first)
        sizes = [last - first for first, last in block.batch]
        return tensor.expand(*sizes, *tensor.shape[-3:]).reshape(block.lead, -1, tensor.shape[-1])
