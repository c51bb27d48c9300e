"""The forward of the blocked kernel: logits, weights and output of each block."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from attnfuse.kernels.cpu.blocks import Block
from attnfuse.kernels.cpu.call import Call
from attnfuse.kernels.cpu.chain import Chain
from attnfuse.reference import evaluate
from attnfuse.score import P

__all__ = ["Forward", "Workspace", "logits", "weighed"]


@dataclass
class Workspace:
    """Memory that blocks use one after the other, so that it stays in the cache."""

    memory: dict[str, Tensor] = field(default_factory=dict)

    def take(self, name: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
        """Uninitialised memory of that shape; what it held under that name is lost."""
        size = torch.Size(shape).numel()
        if name not in self.memory or self.memory[name].numel() < size:
            self.memory[name] = like.new_empty(size, dtype=dtype)
        return self.memory[name][:size].view(shape)


def scores(call: Call, block: Block, workspace: Workspace) -> Tensor:
    """``query . key`` on a block, with room for the sink as one more column: ``[*B, H, M, N (+ 1)]``."""
    *rows, keys = block.shape
    room = workspace.take("scores", (*rows, keys + (call.spec.sink is not None)), call.query, call.dtype)
    query, key = call.rows_of(block, call.query), call.keys_of(block, call.key).transpose(-1, -2)
    target = room[..., :keys].view(block.lead, -1, keys)
    if query.dtype == call.dtype:
        torch.bmm(query, key, out=target)
    else:
        product = workspace.take("product", tuple(target.shape), query, query.dtype)
        target.copy_(torch.bmm(query, key, out=product))
    return room


def logits(call: Call, block: Block, chain: Chain, workspace: Workspace) -> tuple[Block, Tensor]:
    """The logits of a block, the sink's as the last column; and the block, with all keys if a row needs them."""
    logit = _logits(call, block, chain, workspace)
    if call.certain or block.keys == (0, call.layout.keys) or call.alive(logit):
        return block, logit
    block = block.with_all(call.layout.keys)
    return block, _logits(call, block, chain, workspace)


def _logits(call: Call, block: Block, chain: Chain, workspace: Workspace) -> Tensor:
    room, keys = scores(call, block, workspace), block.shape[-1]
    scope = call.scope(block)
    target = room[..., :keys]
    found = chain.run(call.spec.score, replace(scope, score=target))
    if found is not target:
        target.copy_(found)
    if call.spec.sink is not None:
        room[..., keys:].copy_(chain.value(call.spec.sink, scope))
    return room


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
    workspace: Workspace = field(default_factory=Workspace)

    def run(self) -> tuple[Tensor, Tensor]:
        """``out`` and ``lse``."""
        call = self.call
        *batch, heads, rows, _ = call.query.shape
        size = call.value.shape[-1]
        out = call.value.new_empty((*batch, rows, heads, size)).transpose(-3, -2)
        lse = call.query.new_empty((*batch, heads, rows) if self.with_lse else 0, dtype=torch.float32)
        for block, chain in call.blocks():
            found, sums = self._block(block, chain)
            call.heads_of(block, out).copy_(found)
            if sums is not None:
                call.heads_of(block, lse).copy_(sums)
        return out, lse

    def _block(self, block: Block, chain: Chain) -> tuple[Tensor, Tensor | None]:
        call = self.call
        block, logit = logits(call, block, chain, self.workspace)
        keys = block.shape[-1]
        top = logit.amax(dim=-1) if self.with_lse else None
        # row by row, so the weights may overwrite the logits
        weight = torch.softmax(logit, dim=-1, out=logit)
        lse = None if top is None else _lse(top, weight)
        used = weighed(call, block, weight[..., :keys]).reshape(block.lead, -1, keys)
        if used.dtype != call.value.dtype:
            used = self.workspace.take("used", tuple(used.shape), call.value, call.value.dtype).copy_(used)
        out = torch.bmm(used, call.keys_of(block, call.value))
        return out.view(*block.shape[:-1], -1), lse


def _lse(top: Tensor, weight: Tensor) -> Tensor:
    """The largest logit of a row has weight ``1 / sum(exp(logit - top))``. ``top`` alone where it is infinite."""
    return torch.where(top.isinf(), top, top - weight.amax(dim=-1).log_())
