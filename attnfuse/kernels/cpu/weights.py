"""The blocked kernel up to the weights: a block's scores stay in the cache, its weights are written once.

Keys outside of the mask's band are not multiplied. Their weights are zero, or NaN where the row's are: a row of weights
is NaN throughout, as in the written-out program, or nowhere.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from attnfuse.kernels.cpu.backward import Gradients
from attnfuse.kernels.cpu.blocks import Block
from attnfuse.kernels.cpu.call import Call
from attnfuse.kernels.cpu.forward import logits, weights_
from attnfuse.reference import Scope, weights_dtype

__all__ = ["WeightsGradients", "weights"]


def weights(call: Call) -> Tensor:
    """``[*B, H, M, N]``, contiguous; there is a row and a key, and value has no columns."""
    query = call.operands.query
    dtype = weights_dtype(call.spec, query.dtype)
    out = query.new_empty((*query.shape[:-1], call.layout.keys), dtype=dtype)
    stored = dtype if call.selects and dtype == query.dtype else call.dtype
    for each, chain in call.blocks():
        block, logit = logits(call, each, chain, stored)
        first, last = block.keys
        target = call.heads_of(block, out)
        weight = weights_(call, logit)[..., : last - first]
        target[..., first:last].copy_(weight)
        if last - first < call.layout.keys:
            beside = weight[..., :1] * 0.0
            target[..., :first].copy_(beside)
            target[..., last:].copy_(beside)
    return out


@dataclass
class WeightsGradients(Gradients):
    """One backward from the weights' gradient ``grad_out [*B, H, M, N]``; ``needs`` has no value's."""

    def __post_init__(self) -> None:
        """The value's gradient is nobody's."""
        self.needs = (*self.needs[:2], False, *self.needs[2:])
        super().__post_init__()

    def _weight_gradient(self, block: Block, scope: Scope, weight: Tensor) -> Tensor:
        room, grad = self._room(block)
        first, last = block.keys
        grad.copy_(self.call.heads_of(block, self.grad_out)[..., first:last])
        return room
