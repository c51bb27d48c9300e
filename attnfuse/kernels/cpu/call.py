"""One call of the blocked kernel: its operands, cut to blocks and brought to the shape of a batched matrix product."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor

from attnfuse.dropout import kept
from attnfuse.kernels.cpu.blocks import Block, Layout, blocks
from attnfuse.kernels.cpu.chain import Chain, Step, fill_of, mask_of, steps_of
from attnfuse.kernels.rows import MARGIN, Band, masking_band, masking_fill, rows_kept, skips_surely
from attnfuse.operands import Operands
from attnfuse.reference import Scope, Span, compute_dtype, is_float8, seed_of
from attnfuse.score import Apply, Capture, Const, Expr, P, S, Score, rewrite, walk
from attnfuse.spec import AttentionSpec

__all__ = ["Call", "scaled"]

#: Bytes of a vector register: rows of any other length take a tenth longer, those of half types half as long again.
VECTOR = 64


@dataclass(frozen=True)
class Call:
    """One attention, ``training`` in its backward."""

    spec: AttentionSpec
    operands: Operands
    training: bool = False

    @property
    def empty(self) -> bool:
        """Whether there is no score, or no output."""
        query, key, value = self.operands.qkv
        return 0 in (*query.shape[:-1], *key.shape[:-1], value.shape[-1])

    @cached_property
    def dtype(self) -> torch.dtype:
        """The type of scores and weights."""
        return compute_dtype(self.operands.query.dtype)

    @property
    def half(self) -> bool:
        """Whether products are rounded to bfloat16 before they are scores; those of float16 are not."""
        return self.operands.query.dtype == torch.bfloat16 and not self._wide

    @cached_property
    def _wide(self) -> bool:
        """Whether bfloat16 is multiplied as float32: scores are exact, or there are float8 to multiply it with."""
        return self.spec.exact_scores or any(is_float8(x.dtype) for x in self.operands.qkv)

    @cached_property
    def selects(self) -> bool:
        """Whether logits are products of a half type, left out or kept: a softmax takes them as they were rounded."""
        unchanged = self.spec.weight == P and self.spec.normaliser == "softmax" and not self.spec.dropout
        steps = steps_of(self.program)
        return self.half and unchanged and steps is not None and all(map(self._selects, steps)) and self._sink_is_half

    def _selects(self, step: Step) -> bool:
        """Whether a step changes no score but those that it masks, by a constant that the half type holds."""
        match step:
            case Step("where", 1 | 2, (_, Const(fill))):
                return _holds(self.operands.query.dtype, fill)
        added = fill_of(step)
        return added is not None and _holds(self.operands.query.dtype, added)

    @property
    def _sink_is_half(self) -> bool:
        match self.spec.sink:
            case None:
                return True
            case Capture(slot):
                return self.operands.captures[slot].dtype == self.operands.query.dtype
        return False

    def columns(self, keys: int, dtype: torch.dtype) -> int:
        """How many columns a block of so many keys has: with a sink one more, and -inf up to a whole vector."""
        vector = VECTOR // dtype.itemsize
        return keys if self.spec.sink is None else -(-(keys + 1) // vector) * vector

    @property
    def alpha(self) -> float:
        """The factor that the matrix product applies, before it rounds."""
        return scaled(self.spec.score)[0]

    @property
    def program(self) -> Expr:
        """The rest of the score program."""
        return scaled(self.spec.score)[1]

    @cached_property
    def layout(self) -> Layout:
        """The sizes that blocks are cut from."""
        *batch, heads, rows, _ = self.operands.query.shape
        kv_heads, keys, _ = self.operands.key.shape[-3:]
        return Layout(tuple(batch), kv_heads, heads // kv_heads, rows, keys)

    @cached_property
    def fill(self) -> float | None:
        """The logit of a masked key, where that may be left out; None where nothing is masked so."""
        return masking_fill(self.spec)

    @property
    def mask(self) -> Expr | None:
        """What :attr:`band` is the band of: the program's last step, where that masks."""
        steps = steps_of(self.program)
        return mask_of(steps[-1]) if steps else None

    @cached_property
    def rows_kept(self) -> bool:
        """Whether every row is proven to keep a key."""
        return rows_kept(self.spec, self.layout.rows, self.layout.keys, self.operands.symbols)

    @cached_property
    def band(self) -> Band:
        """The band of the mask: keys outside have weight zero, in rows that keep a key."""
        return masking_band(self.spec, self.operands.symbols)

    @cached_property
    def certain(self) -> bool:
        """Whether leaving out keys outside of the band is right even without looking at the logits."""
        rows, keys = self.layout.rows, self.layout.keys
        return skips_surely(self.spec, rows, keys, self.operands.symbols, training=self.training)

    @property
    def proven_band(self) -> Band:
        """The band, where :attr:`certain`; open elsewhere."""
        return self.band if self.certain else Band(exact=False)

    def alive(self, logit: Tensor) -> bool:
        """Whether in every row some logit is so far above the fill that masked keys have weight zero."""
        if self.fill is None:
            return True
        return bool((logit.amax(dim=-1) > self.fill + MARGIN).all())

    def blocks(self) -> Iterator[tuple[Block, Chain]]:
        """Every block, with a chain that blocks of the same rows share."""
        rows: Span | None = None
        for block in blocks(self.layout, self.band, torch.get_num_threads()):
            if block.rows != rows:
                rows = block.rows
                core = block.core if self.band.exact else None
                chain = Chain(self.spec.captures, self.mask, core, half=self.half)
            yield block, chain

    def scope(self, block: Block) -> Scope:
        """What programs read on a block, without scores."""
        operands = self.operands
        return Scope(block.spans, operands.captures, operands.symbols, self.dtype, operands.query.device)

    def kept(self, block: Block) -> Tensor:
        """Dropout's mask on a block, scaled: 0 or ``1 / (1 - p)``."""
        p = self.spec.dropout
        mask = kept(seed_of(self.spec, self.operands.captures), p, self.scope(block).indices())
        return mask.to(self.dtype).mul_(1 / (1 - p) if p < 1 else 0.0)

    def heads_of(self, block: Block, tensor: Tensor) -> Tensor:
        """A tensor ``[*B, H, M, ...]`` cut to a block: a view."""
        return _cut(tensor, block.spans[:-1])

    def rows_of(self, block: Block, tensor: Tensor) -> Tensor:
        """Query or out's gradient on a block as ``[lead, groups * rows, D]``."""
        rows = block.groups * (block.rows[1] - block.rows[0])
        return self._factor(self.heads_of(block, tensor).reshape(block.lead, rows, tensor.shape[-1]))

    def keys_of(self, block: Block, tensor: Tensor) -> Tensor:
        """Key or value ``[*B, Hkv, N, D]`` on a block as ``[lead, keys, D]``; broadcast batches are expanded."""
        batch = tuple(last - first for first, last in block.batch)
        tensor = _cut(tensor, (*block.batch, block.kv_heads, block.keys))
        if tensor.shape[: len(batch)] != batch:
            tensor = tensor.expand(*batch, *tensor.shape[-3:])
        return self._factor(tensor.reshape(block.lead, *tensor.shape[-2:]))

    def _factor(self, tensor: Tensor) -> Tensor:
        """A factor of a matrix product. Those of float16 take 20 times as long as those of float32 on most CPUs."""
        wide = tensor.dtype == torch.float16 or self._wide
        return tensor.to(self.dtype) if wide else tensor


@lru_cache(maxsize=1024)
def _holds(dtype: torch.dtype, constant: float) -> bool:
    """Whether a type has a number exactly."""
    return float(torch.tensor(constant, dtype=dtype)) == constant


def _cut(tensor: Tensor, spans: Sequence[Span]) -> Tensor:
    """The spans of a tensor's first axes; an axis of size 1 broadcasts and stays."""
    for axis, (first, last) in enumerate(spans):
        if 1 != tensor.shape[axis] != last - first:
            tensor = tensor.narrow(axis, first, last - first)
    return tensor


@lru_cache(maxsize=1024)
def scaled(program: Expr) -> tuple[float, Expr]:
    """``(a, rest)`` where a program reads ``s`` once, as ``a * s``; ``(1.0, program)`` where it does not."""
    reads = [part for part in walk(program) if isinstance(part, Apply) and S in part.args]
    match reads:
        case [Apply("mul", (Const(float() as factor), Score())) as product] if factor > 0:
            return factor, rewrite(program, lambda part: S if part == product else part)
    return 1.0, program
