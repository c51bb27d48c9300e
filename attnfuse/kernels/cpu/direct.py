"""The written-out program on whole tensors, with key and value heads grouped instead of repeated.

Memory is that of the scores, so this is for few query rows: in decoding it reads each key once for all
query heads that share it, and for sizes that are symbolic. 32 query heads over 8 of 4096 keys, 128 wide,
bfloat16, one query row, one core: eager with repeated heads 77 ms, SDPA 53 ms, this 1.4 ms, and Inductor
1.8 ms where it does not take the program for SDPA.
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from attnfuse.kernels.cpu import cost
from attnfuse.kernels.cpu.blocked import Blocked
from attnfuse.kernels.cpu.call import Call
from attnfuse.kernels.cpu.functional import attend_whole
from attnfuse.kernels.prices import factor
from attnfuse.kernels.problem import Problem
from attnfuse.kernels.registry import kernel
from attnfuse.operands import Operands
from attnfuse.spec import AttentionSpec
from attnfuse.target import Target

__all__ = ["Direct"]


@kernel
class Direct(Blocked):
    """Any spec, any strides, any sizes, symbolic ones too; the backward and the lse are the blocked kernel's."""

    name: ClassVar[str] = "direct"
    # they are for the caller, and whole in memory whoever computes them
    gives_weights: ClassVar[bool] = False

    def cost(self, problem: Problem, target: Target) -> float:
        """See :mod:`attnfuse.kernels.cpu.cost`."""
        return cost.direct(problem) * factor(self.name, problem, target)

    def run(self, spec: AttentionSpec, operands: Operands) -> Tensor:
        """``out`` in one block."""
        return attend_whole(Call(spec, operands))

    expand = run
