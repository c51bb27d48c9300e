"""Attention of a block without writing to memory: what a graph may hold, and what any compiler may fuse."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from attnfuse.kernels.cpu.blocks import Block, row_blocks
from attnfuse.kernels.cpu.call import Call
from attnfuse.kernels.cpu.forward import weighed
from attnfuse.reference import evaluate, normalised, out_dtype

__all__ = ["attend_by_rows", "attend_whole"]

#: Scores of a block of an unrolled loop: each block is a dozen nodes of a graph.
UNROLLED = 1 << 24


def attend(call: Call, block: Block) -> Tensor:
    """``out`` of a block, ``[*B, H, M, Dv]`` of the block's spans; key and value heads are not repeated."""
    spec, scope, keys = call.spec, call.scope(block), block.shape[-1]
    query, key = call.rows_of(block, call.operands.query), call.keys_of(block, call.operands.key)
    score = torch.bmm(query, key.transpose(-1, -2)).view(block.shape).to(call.dtype)
    logit = evaluate(spec.score, replace(scope, score=score)).to(call.dtype).expand(block.shape)
    if spec.sink is not None:
        sink = evaluate(spec.sink, scope).to(call.dtype)
        logit = torch.cat([logit, sink.expand(*block.shape[:-1], 1)], dim=-1)
    weight = normalised(spec, logit)[..., :keys]
    value = call.keys_of(block, call.operands.value)
    used = weighed(call, block, weight).to(value.dtype).reshape(block.lead, query.shape[-2], keys)
    out = torch.bmm(used, value).view(*block.shape[:-1], value.shape[-1])
    return out.to(out_dtype(spec, call.operands.value.dtype))


def attend_whole(call: Call) -> Tensor:
    """``out`` in one block; sizes may be symbolic."""
    layout = call.layout
    keys = (0, layout.keys)
    batch = tuple((0, size) for size in layout.batch)
    return attend(call, Block(batch, (0, layout.kv_heads), (0, layout.rows), keys, keys, layout.groups))


def attend_by_rows(call: Call) -> Tensor:
    """``out`` as an unrolled loop over blocks of rows; in one block where a size is symbolic."""
    if not all(isinstance(size, int) for size in (*call.operands.query.shape, *call.operands.key.shape)):
        return attend_whole(call)
    found = [attend(call, block) for block in row_blocks(call.layout, call.proven_band, UNROLLED)]
    return found[0] if len(found) == 1 else torch.cat(found, dim=-2)
