"""What is timed: a kernel, a schedule of it, and the graph as it is, each as a call on operands of a problem."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._dynamo import lookup_backend
from torch.fx.experimental.proxy_tensor import make_fx

from attnfuse.form import form_of
from attnfuse.kernels import Kernel, Operand, Problem
from attnfuse.op import attention as attention_op
from attnfuse.operands import Operands
from attnfuse.reference import Scope, evaluate, normalised, repeat_heads
from attnfuse.score import Const, P

__all__ = ["Call", "as_it_is", "by_kernel", "by_schedule", "directly", "given"]

Call = Callable[[], Tensor]
#: Makes out from query, key, value and captures.
Program = Callable[..., Tensor]


def given(problem: Problem, device: torch.device) -> Operands:
    """Random operands: query, key and value as projections leave them, heads side by side."""
    query, key, value = (
        _random(each, device).transpose(-3, -2).contiguous().transpose(-3, -2)
        for each in (problem.query, problem.key, problem.value)
    )
    captures = [_random(each, device) for each in problem.captures]
    seed = [torch.zeros(1, dtype=torch.int64, device=device)] if problem.spec.dropout else []
    described = (problem.query, problem.key, problem.value, *problem.captures)
    for tensor, each in zip((query, key, value, *captures), described, strict=True):
        tensor.requires_grad_(each.requires_grad)
    return Operands(query, key, value, (*captures, *seed), problem.symbols)


def _random(operand: Operand, device: torch.device) -> Tensor:
    if operand.dtype == torch.bool:
        return torch.rand(operand.shape, device=device) < 0.7
    if not operand.dtype.is_floating_point:
        return torch.randint(0, 3, operand.shape, device=device).to(operand.dtype)
    return torch.randn(operand.shape, device=device).to(operand.dtype)


def by_kernel(kernel: Kernel, problem: Problem, operands: Operands) -> Call:
    """A kernel as a rewritten graph calls it: by the operator, or, where it is to be inlined, compiled."""
    if kernel.inlines(problem):
        return _call(_compiled(_expanded(kernel, problem, operands), operands), problem, operands)
    text, with_lse = problem.spec.to_text(), problem.training and kernel.saves_lse

    def run(query: Tensor, key: Tensor, value: Tensor, *captures: Tensor) -> Tensor:
        out: Tensor = attention_op.default(query, key, value, captures, operands.symbols, text, kernel.name, with_lse)[
            0
        ]
        return out

    return _call(run, problem, operands)


def by_schedule(kernel: Kernel, schedule: Any, problem: Problem, operands: Operands) -> Call:
    """A kernel by one of its schedules, forward."""
    return partial(kernel.run_by, schedule, problem.spec, operands)


def directly(kernel: Kernel, problem: Problem, operands: Operands) -> Call:
    """A kernel's forward, without the operator."""
    return partial(kernel.run, problem.spec, operands)


def as_it_is(problem: Problem, operands: Operands) -> Call:
    """The graph as it is, as the model has it: what Inductor turns into a call by itself is that call."""
    if problem.compiled and problem.plain:
        return _call(_compiled(partial(_called, problem), operands), problem, operands)
    run = partial(_written, problem, operands.symbols)
    return _call(_compiled(run, operands) if problem.compiled else run, problem, operands)


def _expanded(kernel: Kernel, problem: Problem, operands: Operands) -> Program:
    def run(query: Tensor, key: Tensor, value: Tensor, *captures: Tensor) -> Tensor:
        return kernel.expand(problem.spec, Operands(query, key, value, captures, operands.symbols))

    return run


def _called(problem: Problem, query: Tensor, key: Tensor, value: Tensor, *captures: Tensor) -> Tensor:
    form, heads = form_of(problem.spec.score), query.shape[-3]
    scale = form.scale.value if form is not None and isinstance(form.scale, Const) else None
    key, value = repeat_heads(key, heads), repeat_heads(value, heads)
    return F.scaled_dot_product_attention(query, key, value, scale=scale)


def _written(
    problem: Problem, symbols: tuple[int, ...], query: Tensor, key: Tensor, value: Tensor, *captures: Tensor
) -> Tensor:
    """As models write it: products in the operands' type, softmax in float32."""
    spec, heads = problem.spec, query.shape[-3]
    scope = replace(Scope.whole(Operands(query, key, value, captures, symbols)), dtype=query.dtype)
    score = query @ repeat_heads(key, heads).transpose(-1, -2)
    logit = evaluate(spec.score, replace(scope, score=score)).expand(score.shape)
    if spec.sink is not None:
        sink = evaluate(spec.sink, scope).to(logit.dtype)
        logit = torch.cat([logit, sink.expand(*logit.shape[:-1], 1)], dim=-1)
    weight = normalised(spec, logit.float())[..., : score.shape[-1]]
    if spec.weight != P:
        weight = evaluate(spec.weight, replace(scope, weight=weight)).expand(score.shape)
    weight = F.dropout(weight, spec.dropout) if spec.dropout else weight
    return weight.to(value.dtype) @ repeat_heads(value, heads)


def _compiled(run: Program, operands: Operands) -> Program:
    trace = make_fx(run, tracing_mode="fake", pre_dispatch=True)(*operands.tensors)
    return cast("Program", lookup_backend("inductor")(trace, list(operands.tensors)))


def _call(run: Program, problem: Problem, operands: Operands) -> Call:
    """Forward, and where a gradient is asked for, the backward too."""
    if not problem.training:
        return partial(run, *operands.tensors)
    leaves = [tensor for tensor in operands.tensors if tensor.requires_grad]

    def step() -> Tensor:
        out = run(*operands.tensors)
        torch.autograd.grad(out, leaves, out.detach(), allow_unused=True)
        return out

    return step
