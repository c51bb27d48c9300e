"""Gradients of weights on any device: the reference, differentiated by autograd, some rows at a time."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from attnfuse.operands import Operands
from attnfuse.reference import compute_dtype, weights
from attnfuse.spec import AttentionSpec

__all__ = ["weights_gradients"]

#: Scores of a block of rows: some tensors of so many float32 live at once.
SCORES = 1 << 26


def weights_gradients(
    spec: AttentionSpec, grad: Tensor, operands: Operands, needs: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key and each capture, None where ``needs`` is False; sums over blocks are in float32.

    ``grad [*B, H, M, N]`` is that of the weights.
    """
    query, key = operands.query, operands.key
    read = (query, key, *operands.captures)
    dtype, rows = compute_dtype(query.dtype), query.shape[-2]
    sums = [torch.zeros_like(x, dtype=dtype) if need else None for x, need in zip(read, needs, strict=True)]
    step = max(SCORES // max(math.prod(query.shape[:-2]) * key.shape[-2], 1), 1)
    for first in range(0, rows, step):
        last = min(first + step, rows)
        cut = (query[..., first:last, :], *read[1:])
        leaves = [x.detach().requires_grad_(need) for x, need in zip(cut, needs, strict=True)]
        with torch.enable_grad():
            found = weights(spec, Operands.of_weights(leaves[0], leaves[1], tuple(leaves[2:]), operands.symbols), first)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        blocks = iter(torch.autograd.grad(found, wanted, grad[..., first:last, :], materialize_grads=True))
        for place, total in enumerate(sums):
            if total is not None:
                (total[..., first:last, :] if place == 0 else total).add_(next(blocks))
    return tuple(None if total is None else total.to(x.dtype) for total, x in zip(sums, read, strict=True))
