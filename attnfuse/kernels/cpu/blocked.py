"""Ours: attention by blocks of query rows, in memory O(block x N), for any spec.

A block computes all keys that its rows can keep, so its softmax is the plain one: rows are normalised
by their sum, and NaN, infinities and fully masked rows come out as in the written-out program. Keys
that the mask's band excludes for the whole block are never read.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from attnfuse import reference
from attnfuse.kernels.cpu import cost
from attnfuse.kernels.cpu.backward import Gradients
from attnfuse.kernels.cpu.call import Call
from attnfuse.kernels.cpu.forward import Forward
from attnfuse.kernels.cpu.functional import attend_by_rows
from attnfuse.kernels.cpu.weights import WeightsGradients, weights
from attnfuse.kernels.differentiated import weights_gradients
from attnfuse.kernels.kernel import Kernel, Residual
from attnfuse.kernels.prices import factor
from attnfuse.kernels.problem import Problem
from attnfuse.kernels.registry import kernel
from attnfuse.operands import Operands
from attnfuse.reference import attention, is_float8, name_of
from attnfuse.spec import AttentionSpec, Normaliser
from attnfuse.target import Target

__all__ = ["Blocked"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@kernel
class Blocked(Kernel):
    """Any spec, any strides, forward and backward."""

    name: ClassVar[str] = "blocked"
    devices: ClassVar[tuple[str, ...]] = ("cpu",)
    portable: ClassVar[bool] = True
    gives_lse: ClassVar[bool] = True
    normalisers: ClassVar[tuple[Normaliser, ...]] = ("softmax", "none")
    zeroes_empty_rows: ClassVar[bool] = True
    gives_weights: ClassVar[bool] = True

    def refuses(self, problem: Problem, target: Target) -> tuple[str, ...]:
        """Only dtypes that torch has no matrix product for."""
        return tuple(
            f"{name} is {name_of(operand.dtype)}"
            for name, operand in (("query", problem.query), ("key", problem.key), ("value", problem.value))
            if operand.dtype not in DTYPES and not is_float8(operand.dtype)
        )

    def cost(self, problem: Problem, target: Target) -> float:
        """See :mod:`attnfuse.kernels.cpu.cost`."""
        return cost.blocked(problem) * factor(self.name, problem, target)

    def run(self, spec: AttentionSpec, operands: Operands) -> Tensor:
        """``out``, laid out as ``[*B, M, H, Dv]``."""
        call = Call(spec, operands)
        return attention(spec, operands)[0] if call.empty else Forward(call).run()[0]

    def expand(self, spec: AttentionSpec, operands: Operands) -> Tensor:
        """An unrolled loop over blocks of rows, of sizes that are known."""
        return attend_by_rows(Call(spec, operands))

    def run_with_lse(self, spec: AttentionSpec, operands: Operands) -> tuple[Tensor, Tensor]:
        """``out`` and ``lse``."""
        call = Call(spec, operands)
        return attention(spec, operands) if call.empty else Forward(call, with_lse=True).run()

    def backward(
        self, spec: AttentionSpec, grad_out: Tensor, operands: Operands, needs: Sequence[bool], residual: Residual
    ) -> tuple[Tensor | None, ...]:
        """Gradients, from weights computed again block by block."""
        call = Call(spec, operands, training=True)
        if call.empty:
            pairs = zip(operands.tensors, needs, strict=True)
            return tuple(torch.zeros_like(x) if need else None for x, need in pairs)
        return Gradients(call, grad_out, residual.grad_lse, needs).run()

    def weights(self, spec: AttentionSpec, operands: Operands) -> Tensor:
        """The weights, in no more memory than they take and a block."""
        if operands.scoreless:
            return reference.weights(spec, operands)
        return weights(Call(spec, operands))

    def weights_backward(
        self, spec: AttentionSpec, grad: Tensor, operands: Operands, needs: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        """Gradients, from weights computed again block by block."""
        if operands.scoreless:
            return weights_gradients(spec, grad, operands, needs)
        call = Call(spec, operands, training=True)
        for_query, for_key, _, *others = WeightsGradients(call, grad, None, needs).run()
        return for_query, for_key, *others
