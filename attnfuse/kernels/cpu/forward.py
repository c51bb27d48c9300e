"""The forward of the blocked kernel: logits, weights and output of each block."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attnfuse.kernels.cpu.blocks import Block
from attnfuse.kernels.cpu.call import Call
from attnfuse.kernels.cpu.chain import Chain
from attnfuse.reference import evaluate, out_dtype
from attnfuse.score import P

__all__ = ["WORKSPACE", "Forward", "logits", "scores", "weighed", "weights_"]


class Workspace(threading.local):
    """Memory that the blocks of all calls of a thread use one after the other: it stays mapped, and in the cache.

    Mapping it anew for each call costs a quarter of the time at 512 keys. A few MiB for each core are kept.
    """

    def __init__(self) -> None:
        self.memory: dict[tuple[str, torch.dtype], Tensor] = {}

    def take(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Uninitialised memory on the CPU; what was held under that name and dtype is lost."""
        size = math.prod(shape)
        held = self.memory.get((name, dtype))
        if held is None or held.numel() < size:
            # a tensor made in inference mode could not be written to outside of it
            with torch.inference_mode(mode=False):
                held = torch.empty(size, dtype=dtype)
            if size <= KEPT:
                self.memory[name, dtype] = held
        return held[:size].view(shape)


WORKSPACE = Workspace()
#: Elements of the largest piece of memory that is kept from call to call.
KEPT = 1 << 23


def products(call: Call, block: Block, room: Tensor) -> Tensor:
    """``alpha * query . key`` on a block, ``[lead, groups * rows, keys]``, written to ``room``."""
    query, key = call.rows_of(block, call.operands.query), call.keys_of(block, call.operands.key)
    target = room.view(block.lead, -1, block.shape[-1])
    return torch.baddbmm(target, query, key.transpose(-1, -2), beta=0, alpha=call.alpha, out=target)


def scores(call: Call, block: Block, dtype: torch.dtype) -> Tensor:
    """The scores of a block times ``call.alpha``, ``[*B, H, M, N]``, with room for a sink behind them."""
    *rows, keys = block.shape
    room = WORKSPACE.take("scores", (*rows, call.columns(keys, dtype)), dtype)
    own = call.operands.query.dtype
    if call.half and dtype != own:
        product = WORKSPACE.take("product", block.shape, own)
        room[..., :keys].copy_(products(call, block, product).view(block.shape))
    else:
        products(call, block, room[..., :keys])
    return room


def logits(call: Call, block: Block, chain: Chain, dtype: torch.dtype) -> tuple[Block, Tensor]:
    """The logits of a block, the sink's behind them; and the block, with all keys if a row needs them."""
    logit = _logits(call, block, chain, dtype)
    if call.certain or block.keys == (0, call.layout.keys) or call.alive(logit):
        return block, logit
    block = block.with_all(call.layout.keys)
    return block, _logits(call, block, chain, dtype)


def _logits(call: Call, block: Block, chain: Chain, dtype: torch.dtype) -> Tensor:
    room, keys = scores(call, block, dtype), block.shape[-1]
    scope = call.scope(block)
    target = room[..., :keys]
    found = chain.run(call.program, replace(scope, score=target))
    if found is not target:
        target.copy_(found)
    if call.spec.sink is not None:
        room[..., keys : keys + 1].copy_(chain.value(call.spec.sink, scope))
        room[..., keys + 1 :].fill_(float("-inf"))
    return room


def weights_(call: Call, logit: Tensor) -> Tensor:
    """The weights of a block's logits, in their place: a softmax works row by row."""
    if call.spec.normaliser == "none":
        return logit
    empty = None if call.spec.empty_rows == "nan" or call.rows_kept else logit.amax(dim=-1, keepdim=True).isneginf()
    weight = torch.softmax(logit, dim=-1, out=logit)
    return weight if empty is None else weight.masked_fill_(empty, 0.0)


def weighed(call: Call, block: Block, weight: Tensor) -> Tensor:
    """What multiplies value: the weights after the weight program and dropout."""
    if call.spec.weight != P:
        weight = evaluate(call.spec.weight, replace(call.scope(block), weight=weight)).expand(weight.shape)
    return weight * call.kept(block) if call.spec.dropout else weight


@dataclass
class Forward:
    """One forward. ``out`` lies as ``[*B, M, H, Dv]``; ``lse`` is empty unless asked for."""

    call: Call
    with_lse: bool = False

    def run(self) -> tuple[Tensor, Tensor]:
        """``out`` and ``lse``."""
        call = self.call
        query, _, value = call.operands.qkv
        *batch, heads, rows, _ = query.shape
        dtype = out_dtype(call.spec, value.dtype)
        out = value.new_empty((*batch, rows, heads, value.shape[-1]), dtype=dtype).transpose(-3, -2)
        lse = query.new_empty((*batch, heads, rows) if self.with_lse else 0, dtype=torch.float32)
        for block, chain in call.blocks():
            found, sums = self._block(block, chain)
            call.heads_of(block, out).copy_(found)
            if sums is not None:
                call.heads_of(block, lse).copy_(sums)
        return out, lse

    @property
    def _stored(self) -> torch.dtype:
        """The type of logits and weights in memory; a softmax computes in float32 either way."""
        narrow = self.call.selects and not self.with_lse
        return self.call.operands.query.dtype if narrow else self.call.dtype

    def _block(self, block: Block, chain: Chain) -> tuple[Tensor, Tensor | None]:
        call = self.call
        block, used, lse = self._weights(block, chain)
        value = call.keys_of(block, call.operands.value)
        if used.dtype != value.dtype:
            used = WORKSPACE.take("used", used.shape, value.dtype).copy_(used)
        out = torch.bmm(used, value)
        return out.view(*block.shape[:-1], -1), lse

    def _weights(self, block: Block, chain: Chain) -> tuple[Block, Tensor, Tensor | None]:
        block, logit = logits(self.call, block, chain, self._stored)
        keys = block.shape[-1]
        top = logit.amax(dim=-1) if self.with_lse else None
        weight = weights_(self.call, logit)
        lse = None if top is None else self._lse(top, weight)
        return block, weighed(self.call, block, weight[..., :keys]).reshape(block.lead, -1, keys), lse

    def _lse(self, top: Tensor, weight: Tensor) -> Tensor:
        """The largest logit of a row has weight ``1 / sum(exp(logit - top))``. ``top`` alone where it is infinite."""
        if self.call.spec.normaliser == "none":
            return torch.zeros_like(top)
        return torch.where(top.isinf(), top, top - weight.amax(dim=-1).log_())
