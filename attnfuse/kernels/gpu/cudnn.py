"""cuDNN's attention, through ATen: the fastest there is on Hopper for plain and causal attention."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor
from torch.backends.cuda import SDPAParams, can_use_cudnn_attention
from torch.utils._python_dispatch import _disable_current_modes  # torch offers no public way to leave all modes

from attnfuse.form import form_of
from attnfuse.kernels.cpu.batches import four_d, gradients
from attnfuse.kernels.cpu.sdpa import Sdpa, is_causal, scale_of
from attnfuse.kernels.gpu import cost
from attnfuse.kernels.kernel import Residual
from attnfuse.kernels.problem import Problem
from attnfuse.kernels.registry import kernel, lookup
from attnfuse.operands import Operands
from attnfuse.reference import attention
from attnfuse.spec import AttentionSpec
from attnfuse.target import Target

__all__ = ["Cudnn"]

#: The widest heads that every cuDNN takes; about wider ones torch is asked, on the device there is.
WIDEST = 128
#: Zero, and no zero of anyone else's. torch 2.11 remembers plans of cuDNN's backward by the bytes of the dropout's
#: probability and by the strides of query, key and value, not by those of out and its gradient, which are part of a
#: plan too: after another call of the same sizes, whose gradient lay otherwise, one would be read in the wrong order.
#: Ours lie in one way always, and plans with this probability are ours.
OWN_ZERO = -0.0


@kernel
class Cudnn(Sdpa):
    """One call of cuDNN's fused attention, forward and backward, of half types."""

    name: ClassVar[str] = "cudnn"
    devices: ClassVar[tuple[str, ...]] = ("cuda",)
    portable: ClassVar[bool] = False

    def refuses(self, problem: Problem, target: Target) -> tuple[str, ...]:
        """What SDPA cannot say, and what cuDNN does not compute."""
        return (*super().refuses(problem, target), *_unsupported(problem, target))

    def slow_path(self, problem: Problem) -> tuple[str, ...]:
        """Nothing: what cuDNN cannot do, it cannot do at all."""
        return ()

    def cost(self, problem: Problem, target: Target) -> float:
        """See :mod:`attnfuse.kernels.gpu.cost`."""
        return cost.cudnn(problem, target)

    def run(self, spec: AttentionSpec, operands: Operands) -> Tensor:
        """``out``."""
        return attention(spec, operands)[0] if operands.empty else _forward(spec, operands, with_lse=False)[0]

    def run_with_lse(self, spec: AttentionSpec, operands: Operands) -> tuple[Tensor, Tensor]:
        """``out`` and ``lse``."""
        return attention(spec, operands) if operands.empty else _forward(spec, operands, with_lse=True)

    def backward(
        self, spec: AttentionSpec, grad_out: Tensor, operands: Operands, needs: Sequence[bool], residual: Residual
    ) -> tuple[Tensor | None, ...]:
        """The backward of cuDNN, of the lse that the forward kept; our own where a gradient reached the lse."""
        if residual.grad_lse is not None or operands.empty:
            return lookup("triton").backward(spec, grad_out, operands, needs, residual)
        query, key = operands.query, operands.key
        batch = query.shape[:-3]
        out, lse = residual.out, residual.lse
        if lse is None:
            out, lse = _forward(spec, operands, with_lse=True)
        query_4d, key_4d, value_4d = (_dense(four_d(x, batch)) for x in operands.qkv)
        grad_4d, out_4d = (_tokens_first(four_d(x, batch)) for x in (grad_out, out))
        # the seed and offset of a dropout that there is not
        nothing = query.new_empty((), dtype=torch.int64)
        grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            grad_4d, query_4d, key_4d, value_4d, out_4d, lse.reshape(*query_4d.shape[:3], 1), nothing, nothing,
            None, None, None, query.shape[-2], key.shape[-2], OWN_ZERO, is_causal(spec), scale=scale_of(spec),
        )  # fmt: skip
        return gradients(grads, operands, needs)


def _unsupported(problem: Problem, target: Target) -> tuple[str, ...]:
    spec = problem.spec
    form = form_of(spec.score)
    plain = form is not None and not form.bias and (not form.keep or is_causal(spec))
    dtypes = set(problem.dtypes)
    widths = (problem.query.shape[-1], problem.value.shape[-1])
    wide = max(widths) > WIDEST and not _takes(target, max(widths), training=problem.training)
    reasons = [
        (not plain, "cuDNN is called for plain and top-left causal attention only"),
        (spec.dropout > 0, "cuDNN's dropout draws a random stream of its own"),
        (len(dtypes) > 1 or not dtypes <= {torch.float16, torch.bfloat16}, "cuDNN needs operands of one half type"),
        (
            wide or any(width % 8 for width in widths),
            f"cuDNN needs heads of {WIDEST} at most, in eights, but where torch says that it takes wider ones",
        ),
        (widths[0] != widths[1], "cuDNN is called for value as wide as query"),
    ]
    return tuple(reason for holds, reason in reasons if holds)


@lru_cache
def _takes(target: Target, width: int, *, training: bool) -> bool:
    """Whether this torch's cuDNN takes heads of that width on the device there is; on no other target."""
    if not torch.cuda.is_available() or Target.of(torch.device("cuda")) != target:
        return False
    # torch asks whether gradients are being recorded
    with _disable_current_modes(), torch.set_grad_enabled(training):
        x = torch.empty(1, 1, 64, width, dtype=torch.bfloat16, device="cuda", requires_grad=training)
        return bool(can_use_cudnn_attention(SDPAParams(x, x, x, None, 0.0, False, False)))


def _forward(spec: AttentionSpec, operands: Operands, *, with_lse: bool) -> tuple[Tensor, Tensor]:
    *batch, heads, rows, _ = operands.query.shape
    read = [_dense(four_d(x, batch)) for x in operands.qkv]
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *read, None, with_lse, 0.0, is_causal(spec), False, scale=scale_of(spec)
    )
    out = out.view(*batch, *out.shape[-3:])
    return out, lse.reshape(*batch, heads, rows) if with_lse else lse


def _tokens_first(tensor: Tensor) -> Tensor:
    """``[B, H, M, D]`` laid out as ``[B, M, H, D]``, without gaps."""
    return tensor.transpose(1, 2).contiguous().transpose(1, 2)


def _dense(tensor: Tensor) -> Tensor:
    """As cuDNN wants it: the last dimension contiguous."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
