"""Ours for GPUs: any score program in Triton, on NVIDIA, AMD and Intel."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from importlib.util import find_spec
from typing import ClassVar

import torch
from torch import Tensor

from attnfuse import reference
from attnfuse.form import weight_factor
from attnfuse.kernels.float8 import readable
from attnfuse.kernels.gpu import cost
from attnfuse.kernels.kernel import Kernel, Residual
from attnfuse.kernels.prices import factor
from attnfuse.kernels.problem import Problem
from attnfuse.kernels.registry import kernel
from attnfuse.kernels.schedule import Schedule
from attnfuse.kernels.triton.differentiating import differentiable
from attnfuse.kernels.triton.gradients import Gradients
from attnfuse.kernels.triton.launch import attend
from attnfuse.kernels.triton.neighbours import neighbours
from attnfuse.kernels.triton.planning import NAME
from attnfuse.kernels.triton.text import untranslatable
from attnfuse.kernels.triton.weighing import weights
from attnfuse.operands import Operands
from attnfuse.reference import attention, is_float8, name_of
from attnfuse.score import P, text
from attnfuse.spec import AttentionSpec
from attnfuse.target import Target

__all__ = ["Triton"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CAPTURED = ("float32", "bfloat16", "float16", "bool", "int64", "int32", "int16", "int8", "uint8")
WIDEST, BATCHES = 512, 2


@kernel
class Triton(Kernel):
    """Any score program: masks skip tiles, biases, softcaps, sinks and dropout are computed in the tile."""

    name: ClassVar[str] = NAME
    devices: ClassVar[tuple[str, ...]] = ("cuda", "rocm", "xpu")
    gives_lse: ClassVar[bool] = True
    saves_lse: ClassVar[bool] = True
    gives_weights: ClassVar[bool] = True

    def refuses(self, problem: Problem, target: Target) -> tuple[str, ...]:
        """What its body does not compute."""
        return (*_programs(problem), *_operands(problem, target), *_installed())

    def cost(self, problem: Problem, target: Target) -> float:
        """See :mod:`attnfuse.kernels.gpu.cost`; value is wanted transposed where it is multiplied as float8."""
        if problem.weights:
            return cost.weights(problem, target)
        return cost.triton(problem, target) * factor(self.name, problem, target)

    def schedules(self, problem: Problem, target: Target) -> tuple[Schedule, ...]:
        """Those near the table's."""
        return neighbours(problem, target)

    def run_by(self, schedule: Schedule, spec: AttentionSpec, operands: Operands) -> Tensor:
        """``out`` by a schedule."""
        return attend(spec, operands, schedule=schedule)[0]

    def run(self, spec: AttentionSpec, operands: Operands) -> Tensor:
        """``out``, laid out as ``[*B, M, H, Dv]``."""
        return attention(spec, operands)[0] if operands.empty else attend(spec, operands)[0]

    def run_with_lse(self, spec: AttentionSpec, operands: Operands) -> tuple[Tensor, Tensor]:
        """``out`` and ``lse``."""
        return attention(spec, operands) if operands.empty else attend(spec, operands, with_lse=True)

    def backward(
        self, spec: AttentionSpec, grad_out: Tensor, operands: Operands, needs: Sequence[bool], residual: Residual
    ) -> tuple[Tensor | None, ...]:
        """Gradients, from weights computed again tile by tile."""
        if operands.empty:
            pairs = zip(operands.tensors, needs, strict=True)
            return tuple(torch.zeros_like(x) if need else None for x, need in pairs)
        if residual.lse is None:
            out, lse = attend(spec, operands, with_lse=True)
            residual = Residual(out, lse, residual.grad_lse)
        return Gradients(spec, grad_out, operands, needs, residual).run()

    def weights(self, spec: AttentionSpec, operands: Operands) -> Tensor:
        """The weights; their gradients are the reference's, by autograd."""
        return reference.weights(spec, operands) if operands.scoreless else weights(spec, operands)


@lru_cache
def _installed() -> tuple[str, ...]:
    return () if find_spec("triton") is not None else ("Triton is not installed",)


def _programs(problem: Problem) -> tuple[str, ...]:
    # the backward of weights is no text of ours
    spec, training = problem.spec, problem.training and not problem.weights
    by = weight_factor(spec.weight)
    programs = (spec.score, *(() if spec.sink is None else (spec.sink,)), *(() if by is None else (by,)))
    reasons = [
        (by is None, f"has no weight program such as {text(spec.weight)}"),
        (training and spec.weight != P, "has no backward of a weight program"),
        (spec.batch > BATCHES, f"has {BATCHES} batch axes at most, not {spec.batch}"),
    ]
    texts = (*programs, *(differentiable(spec) if training else ()))
    return (
        *(reason for holds, reason in reasons if holds),
        *dict.fromkeys(reason for program in texts for reason in untranslatable(program)),
    )


def _operands(problem: Problem, target: Target) -> tuple[str, ...]:
    narrow = set(filter(is_float8, problem.dtypes))
    wide = set(problem.dtypes) - narrow
    captured = {each.dtype for each in problem.spec.captures} - set(CAPTURED)
    reasons = [
        (len(wide) > 1 or not wide <= set(DTYPES), "needs operands of one dtype: float32, bfloat16 or float16"),
        (not narrow <= readable(target), f"reads no {', '.join(map(name_of, narrow - readable(target)))} there"),
        (bool(narrow) and problem.training, "has no backward of float8"),
        (max(problem.query.shape[-1], problem.value.shape[-1]) > WIDEST, f"has heads of {WIDEST} at most"),
        (bool(captured), f"reads no captures of {', '.join(sorted(captured))}"),
    ]
    return tuple(reason for holds, reason in reasons if holds)
