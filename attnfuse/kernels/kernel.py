"""What a kernel is. To add one: subclass :class:`Kernel` in a file of its own and decorate it with ``@kernel``."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from attnfuse.kernels.differentiated import weights_gradients
from attnfuse.kernels.problem import Problem
from attnfuse.operands import Operands
from attnfuse.spec import AttentionSpec, Normaliser
from attnfuse.target import Target

__all__ = ["Kernel", "Residual"]


@dataclass(frozen=True)
class Residual:
    """What the forward left for the backward: its ``out`` and, where it was asked for, its ``lse``.

    ``grad_lse [*B, H, M]`` is the gradient that reached the returned lse, None when none did.
    """

    out: Tensor
    lse: Tensor | None = None
    grad_lse: Tensor | None = None


class Kernel(ABC):
    """One way to compute attention. Stateless: one instance serves every call.

    ``name`` identifies it in reports and in the op's ``kernel`` argument; ``devices`` are the target
    kinds it runs on; ``portable`` says that :meth:`expand` is made of ATen operations alone, so that a
    graph may hold its trace instead of the op; ``gives_lse`` that :meth:`run_with_lse` and
    :meth:`backward` know the lse; ``saves_lse`` that the backward is faster when the forward kept it;
    ``normalisers`` and ``zeroes_empty_rows`` which of the spec's facts it knows, and ``gives_weights`` that it has
    :meth:`weights`: a problem with another is refused before :meth:`refuses` is asked.
    """

    name: ClassVar[str]
    devices: ClassVar[tuple[str, ...]]
    portable: ClassVar[bool] = False
    gives_lse: ClassVar[bool] = False
    saves_lse: ClassVar[bool] = False
    normalisers: ClassVar[tuple[Normaliser, ...]] = ("softmax",)
    zeroes_empty_rows: ClassVar[bool] = False
    gives_weights: ClassVar[bool] = False

    def reasons_against(self, problem: Problem, target: Target) -> tuple[str, ...]:
        """Why this kernel is no candidate: what the spec says that it has never heard of, else what it refuses."""
        # a kernel that knows less than the spec says may not be asked what it makes of it
        return self._unknown_facts(problem) or self.refuses(problem, target)

    def _unknown_facts(self, problem: Problem) -> tuple[str, ...]:
        spec, reasons = problem.spec, []
        if spec.normaliser not in self.normalisers:
            reasons.append("computes a softmax, and here the scores themselves are the weights")
        if spec.empty_rows == "zero" and not (self.zeroes_empty_rows or problem.rows_kept):
            reasons.append("leaves a row that keeps no key NaN, and here such rows are zero")
        if problem.weights and not self.gives_weights:
            reasons.append("gives no weights")
        return tuple(reasons)

    @abstractmethod
    def refuses(self, problem: Problem, target: Target) -> tuple[str, ...]:
        """Every reason why this kernel cannot compute ``problem`` on ``target``; empty when it can."""

    @abstractmethod
    def cost(self, problem: Problem, target: Target) -> float:
        """Estimated seconds, forward (and backward when ``problem.training``)."""

    def inlines(self, problem: Problem) -> bool:
        """Whether the graph is to hold the trace of :meth:`expand` where it could hold the op.

        It pays where a compiler makes more of the operations than the op would.
        """
        return False

    @abstractmethod
    def run(self, spec: AttentionSpec, operands: Operands) -> Tensor:
        """``out [*B, H, M, Dv]`` in value's dtype."""

    def schedules(self, problem: Problem, target: Target) -> tuple[Any, ...]:
        """Ways to run the forward that ``attnfuse tune`` measures: dataclasses whose fields JSON can say."""
        return ()

    def run_by(self, schedule: Any, spec: AttentionSpec, operands: Operands) -> Tensor:
        """:meth:`run` by one of :meth:`schedules`."""
        raise NotImplementedError(f"kernel {self.name} has one schedule")

    def expand(self, spec: AttentionSpec, operands: Operands) -> Tensor:
        """:meth:`run` as a program to be traced: differentiable, without mutation, blind to data.

        Sizes may be symbolic.
        """
        return self.run(spec, operands)

    def run_with_lse(self, spec: AttentionSpec, operands: Operands) -> tuple[Tensor, Tensor]:
        """:meth:`run`, and ``lse [*B, H, M]`` in float32: the natural log of each row's sum, sink included.

        Zero without a softmax.
        """
        raise NotImplementedError(f"kernel {self.name} gives no lse")

    def backward(
        self, spec: AttentionSpec, grad_out: Tensor, operands: Operands, needs: Sequence[bool], residual: Residual
    ) -> tuple[Tensor | None, ...]:
        """Gradients of query, key, value and each capture, None where ``needs`` is False."""
        raise NotImplementedError(f"kernel {self.name} has no backward; its refuses() must say so")

    def weights(self, spec: AttentionSpec, operands: Operands) -> Tensor:
        """The normalised weights ``[*B, H, M, N]``, contiguous, in :func:`attnfuse.reference.weights_dtype`.

        The value has no columns.
        """
        raise NotImplementedError(f"kernel {self.name} gives no weights")

    def weights_backward(
        self, spec: AttentionSpec, grad: Tensor, operands: Operands, needs: Sequence[bool]
    ) -> tuple[Tensor | None, ...]:
        """Gradients of query, key and each capture from that of the weights, None where ``needs`` is False."""
        return weights_gradients(spec, grad, operands, needs)
