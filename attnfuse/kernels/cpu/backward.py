"""The backward of the blocked kernel: each block's weights are computed again and differentiated.

With ``w`` the weights, ``g`` the gradient that reaches them and ``x`` the logits, ``dx = w * (g - sum(w * g))``,
row by row (Rabe and Staats 2021); without a softmax ``dx = g``. The programs before and after it go through their
pullbacks (:mod:`attnfuse.derivative`). Sums over blocks are kept in float32, or float64 for float64 operands and
captures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from attnfuse.derivative import pullback
from attnfuse.kernels.cpu.blocks import Block
from attnfuse.kernels.cpu.call import Call
from attnfuse.kernels.cpu.chain import Chain
from attnfuse.kernels.cpu.forward import WORKSPACE, logits, scores, weights_
from attnfuse.reference import Scope, evaluate
from attnfuse.score import Capture, Const, Expr, P, S, reads_score

__all__ = ["Gradients"]


@dataclass
class Gradients:
    """One backward. ``needs`` says for query, key, value and each capture whether its gradient is asked for."""

    call: Call
    grad_out: Tensor
    grad_lse: Tensor | None
    needs: Sequence[bool]
    sums: list[Tensor | None] = field(init=False)

    def __post_init__(self) -> None:
        """Room for the sums; a broadcast batch of key or value is summed over at the end."""
        call = self.call
        query, key, value = call.operands.qkv
        shapes = [query.shape, *((*call.layout.batch, *x.shape[-3:]) for x in (key, value))]
        shapes += [capture.shape for capture in call.operands.captures]
        # the gradient of a small capture is a sum over very many scores, whose terms cancel
        small = [1 in capture.shape[-2:] for capture in call.operands.captures]
        dtypes = [call.dtype] * 3 + [torch.float64 if each else call.dtype for each in small]
        self.sums = [
            query.new_zeros(shape, dtype=dtype) if needed else None
            for shape, dtype, needed in zip(shapes, dtypes, self.needs, strict=True)
        ]

    def run(self) -> tuple[Tensor | None, ...]:
        """The gradients, each in its operand's shape and dtype."""
        for block, chain in self.call.blocks():
            self._block(block, chain)
        return tuple(
            None if found is None else found.sum_to_size(operand.shape).to(operand.dtype)
            for found, operand in zip(self.sums, self.call.operands.tensors, strict=True)
        )

    def _block(self, block: Block, chain: Chain) -> None:
        call = self.call
        block, logit = logits(call, block, chain, call.dtype)
        keys, scope = block.shape[-1], call.scope(block)
        weight = weights_(call, logit)
        grad = self._weight_gradient(block, scope, weight)
        if call.spec.normaliser == "softmax":
            grad = torch.ops.aten._softmax_backward_data.out(grad, weight, -1, weight.dtype, grad_input=grad)
            if self.grad_lse is not None:
                grad.addcmul_(weight, call.heads_of(block, self.grad_lse).unsqueeze(-1).to(weight.dtype))
        if call.spec.sink is not None:
            self._pull_captures(call.spec.sink, replace(scope, weight=grad[..., keys : keys + 1]))
        inner = replace(scope, score=self._raw_scores(block), weight=grad[..., :keys])
        self._pull_captures(call.spec.score, inner)
        if self.needs[0] or self.needs[1]:
            pulled = chain.run(pullback(call.spec.score).get(S, Const(0.0)), inner, P)
            self._products(block, pulled.expand(block.shape).reshape(block.lead, -1, keys))

    def _raw_scores(self, block: Block) -> Tensor | None:
        """The scores before the program, where its derivative reads them."""
        if not any(map(reads_score, pullback(self.call.spec.score).values())):
            return None
        # scores come times alpha, which the program's derivative applies itself
        return scores(self.call, block, self.call.dtype)[..., : block.shape[-1]] / self.call.alpha

    def _weight_gradient(self, block: Block, scope: Scope, weight: Tensor) -> Tensor:
        """The gradient of the weights, the sink's columns included; sums value's gradient."""
        call, keys = self.call, block.shape[-1]
        grad_out, value = call.rows_of(block, self.grad_out), call.keys_of(block, call.operands.value)
        room, grad = self._room(block)
        grad.copy_(torch.bmm(grad_out, value.transpose(-1, -2)).view(block.shape))
        used = weight[..., :keys]
        inner = replace(scope, weight=used)
        if call.spec.weight != P:
            used = evaluate(call.spec.weight, inner).expand(block.shape)
        if call.spec.dropout:
            kept = call.kept(block)
            used = used * kept
            grad.mul_(kept)
        if self.sums[2] is not None:
            used = used.reshape(block.lead, -1, keys).to(value.dtype)
            self._add_keys(block, self.sums[2], used, grad_out)
        if call.spec.weight != P:
            inner = replace(inner, score=grad)
            self._pull_captures(call.spec.weight, inner)
            grad.copy_(evaluate(pullback(call.spec.weight).get(P, Const(0.0)), inner))
        return room

    def _room(self, block: Block) -> tuple[Tensor, Tensor]:
        """Memory for the gradient of the weights, and its part without the sink's columns, which are zero."""
        *rows, keys = block.shape
        room = WORKSPACE.take("gradient", (*rows, self.call.columns(keys, self.call.dtype)), self.call.dtype)
        room[..., keys:].zero_()
        return room, room[..., :keys]

    def _products(self, block: Block, grad: Tensor) -> None:
        """Gradients of query and key from that of the raw scores, ``[lead, groups * rows, keys]``."""
        call = self.call
        key = call.keys_of(block, call.operands.key)
        grad = grad.to(key.dtype)
        if self.sums[0] is not None:
            found = torch.bmm(grad, key)
            call.heads_of(block, self.sums[0]).copy_(found.view(*block.shape[:-1], -1))
        if self.sums[1] is not None:
            self._add_keys(block, self.sums[1], grad, call.rows_of(block, call.operands.query))

    def _add_keys(self, block: Block, total: Tensor, left: Tensor, right: Tensor) -> None:
        """``total += left^T @ right`` on the block's keys."""
        for axis, (first, last) in enumerate((*block.batch, block.kv_heads, block.keys)):
            total = total.narrow(axis, first, last - first)
        total.add_(torch.bmm(left.transpose(-1, -2), right).view(total.shape))

    def _pull_captures(self, program: Expr, scope: Scope) -> None:
        for leaf, pulled in pullback(program).items():
            if isinstance(leaf, Capture) and (total := self.sums[3 + leaf.slot]) is not None:
                for axis, (first, last) in enumerate(scope.spans):
                    total = total if total.shape[axis] == 1 else total.narrow(axis, first, last - first)
                grad = evaluate(pulled, scope)
                # an empty list of axes would mean all of them
                summed = [axis for axis, size in enumerate(total.shape) if size != grad.shape[axis]]
                total.add_(grad.sum(summed, keepdim=True, dtype=total.dtype) if summed else grad)
