"""The kernel ``gluon``: warp-specialised attention on NVIDIA Hopper."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from importlib import import_module
from typing import ClassVar

import torch
from torch import Tensor

from attnfuse.kernels.gluon.meta import Meta
from attnfuse.kernels.gluon.tuned import BLOCKS, NAME, choices
from attnfuse.kernels.kernel import Kernel, Residual
from attnfuse.kernels.problem import Problem
from attnfuse.kernels.registry import kernel, lookup
from attnfuse.kernels.rows import band_of
from attnfuse.kernels.triton import logit_of, untranslatable
from attnfuse.reference import attention
from attnfuse.score import P, S
from attnfuse.spec import AttentionSpec
from attnfuse.target import Target

__all__ = ["Gluon"]

DTYPES = (torch.bfloat16, torch.float16)
#: The kernel whose backward is used where this one's declines, and the widest head of this one's.
BACKWARD, WIDEST_BACKWARD = "triton", 128
#: Operations a second of both products, by the widest head's tile, and the share of it with a program; measured on one
#: H200, long sequences.
RATES = {64: 480e12, 128: 640e12, 256: 680e12}
WITH_PROGRAM = 0.75
#: The same of a backward's five products, which are so many times the forward's two; seconds of its launches.
BACKWARD_RATES = {64: 400e12, 128: 550e12}
BACKWARD_WITH_PROGRAM, PRODUCTS, BACKWARD_LAUNCH = 0.7, 2.5, 100e-6
#: Seconds of a launch, and bytes a second from memory.
LAUNCH, BANDWIDTH = 12e-6, 4.0e12


@kernel
class Gluon(Kernel):
    """One warp loads tiles by TMA, two or three warpgroups multiply: :mod:`attnfuse.kernels.gluon.forward`."""

    name: ClassVar[str] = NAME
    devices: ClassVar[tuple[str, ...]] = ("cuda",)
    gives_lse: ClassVar[bool] = True
    saves_lse: ClassVar[bool] = True

    def refuses(self, problem: Problem, target: Target) -> tuple[str, ...]:
        """What the body cannot compute, and where it cannot run."""
        return (*_elsewhere(target), *_programs(problem.spec), *_operands(problem), *_training(problem, target))

    def cost(self, problem: Problem, target: Target) -> float:
        """Products at the measured rates, masked tiles skipped, at least the bytes; the rest as another kernel does."""
        return _forward_seconds(problem) + (_backward_seconds(problem, target) if problem.training else 0.0)

    def schedules(self, problem: Problem, target: Target) -> tuple[Meta, ...]:
        """What the table has for any attention of these widths; where scores read a panel, its room decides."""
        return () if problem.captured_bytes else choices(problem.query.shape[-1], problem.value.shape[-1])

    def run_by(
        self,
        schedule: Meta,
        spec: AttentionSpec,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        captures: Sequence[Tensor],
        symbols: Sequence[int],
    ) -> Tensor:
        """``out`` by these choices."""
        return _forward(spec, query, key, value, captures, symbols, with_lse=False, meta=schedule)[0]

    def run(
        self,
        spec: AttentionSpec,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        captures: Sequence[Tensor],
        symbols: Sequence[int],
    ) -> Tensor:
        """``out``, laid out as ``[*B, M, H, Dv]``."""
        if 0 in (*query.shape, *key.shape, *value.shape):
            return attention(spec, query, key, value, captures, symbols)[0]
        out, _ = _forward(spec, query, key, value, captures, symbols, with_lse=False)
        return out

    def run_with_lse(
        self,
        spec: AttentionSpec,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        captures: Sequence[Tensor],
        symbols: Sequence[int],
    ) -> tuple[Tensor, Tensor]:
        """``out`` and ``lse``."""
        if 0 in (*query.shape, *key.shape, *value.shape):
            return attention(spec, query, key, value, captures, symbols)
        out, lse = _forward(spec, query, key, value, captures, symbols, with_lse=True)
        assert lse is not None
        return out, lse

    def backward(
        self,
        spec: AttentionSpec,
        grad_out: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        captures: Sequence[Tensor],
        symbols: Sequence[int],
        needs: Sequence[bool],
        residual: Residual,
    ) -> tuple[Tensor | None, ...]:
        """Gradients in five products a tile; those of the kernel ``triton`` where :func:`declined` has a reason."""
        shapes = (query.shape, key.shape, value.shape)
        if 0 in (*query.shape, *key.shape, *value.shape) or declined(spec, *shapes):
            other = lookup(BACKWARD)
            return other.backward(spec, grad_out, query, key, value, captures, symbols, needs, residual)
        if residual.lse is None:
            out, lse = _forward(spec, query, key, value, captures, symbols, with_lse=True)
            residual = Residual(out, lse, residual.grad_lse)
        from attnfuse.kernels.gluon.gradients import HopperGradients  # noqa: PLC0415 - see _forward

        return HopperGradients(spec, grad_out, query, key, value, captures, symbols, needs, residual).run()


def _forward(
    spec: AttentionSpec,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    captures: Sequence[Tensor],
    symbols: Sequence[int],
    *,
    with_lse: bool,
    meta: Meta | None = None,
) -> tuple[Tensor, Tensor | None]:
    # Triton is imported where it runs, so that a machine without it can still be told why not
    from attnfuse.kernels.gluon.launch import forward  # noqa: PLC0415

    if spec.batch:
        return forward(spec, query, key, value, captures, symbols, with_lse=with_lse, meta=meta)
    out, lse = forward(spec, query[None], key[None], value[None], captures, symbols, with_lse=with_lse, meta=meta)
    return out[0], None if lse is None else lse[0]


def declined(spec: AttentionSpec, query: Sequence[int], key: Sequence[int], value: Sequence[int]) -> tuple[str, ...]:
    """Why a backward of operands of these shapes is left to another kernel, one sentence a reason."""
    widths, pairs = (query[-1], value[-1]), math.prod(query[:-2])
    reasons = [
        (torch.are_deterministic_algorithms_enabled(), "it adds to the query's gradient in no order"),
        (max(widths) > WIDEST_BACKWARD, f"it has heads of {WIDEST_BACKWARD} at most, not {max(widths)}"),
        (tuple(query[:-3]) != tuple(key[:-3]), "its key and value have a batch of their own"),
        (pairs * query[-2] >= 2**31, "it counts rows in 31 bits"),
        (_cannot_add(), "this Triton's Gluon does not let the copy engine add; 3.6 and 3.7 do"),
    ]
    return tuple(reason for holds, reason in reasons if holds)


@lru_cache(maxsize=1)
def _cannot_add() -> bool:
    try:
        builder = import_module("triton._C.libtriton").gluon_ir.GluonOpBuilder
    except (ImportError, AttributeError):
        # without Gluon the forward refuses first
        return False
    return not hasattr(builder, "create_async_tma_reduce")


# --- what it refuses --------------------------------------------------------------------------------


def _elsewhere(target: Target) -> tuple[str, ...]:
    if target.arch != "sm90":
        return (f"its instructions are Hopper's (sm90), the target is {target}",)
    return _missing()


#: Modules of Gluon, and the names in them that the body calls; 3.6 and 3.7 have them.
_NAMES = {
    "triton.experimental.gluon.language": ("warp_specialize", "NVMMADistributedLayout", "NVMMASharedLayout"),
    "triton.experimental.gluon.language.nvidia.hopper": ("warpgroup_mma", "warpgroup_mma_wait", "fence_async_shared"),
    "triton.experimental.gluon.language.nvidia.hopper.tma": (
        "async_copy_global_to_shared", "async_copy_shared_to_global", "store_wait",
    ),
    "triton.experimental.gluon.language.nvidia.hopper.mbarrier": ("expect", "arrive", "wait", "init"),
}  # fmt: skip


@lru_cache(maxsize=1)
def _missing() -> tuple[str, ...]:
    for name, wanted in _NAMES.items():
        try:
            module = import_module(name)
        except ImportError as error:
            return (f"Triton with Gluon is not installed ({error})",)
        if lacking := [each for each in wanted if not hasattr(module, each)]:
            return (f"this Triton's Gluon has no {', '.join(lacking)} in {name}; 3.6 and 3.7 have",)
    return ()


def _programs(spec: AttentionSpec) -> tuple[str, ...]:
    reasons = [
        (spec.weight != P, "it has no weight program"),
        (spec.dropout > 0, "it has no dropout"),
        (spec.batch > 1, f"it takes one batch dimension, not {spec.batch}"),
    ]
    programs = (spec.score, *([] if spec.sink is None else [spec.sink]))
    return (
        *(reason for holds, reason in reasons if holds),
        *(reason for program in programs for reason in untranslatable(program)),
    )


def _operands(problem: Problem) -> tuple[str, ...]:
    dtypes = {problem.query.dtype, problem.key.dtype, problem.value.dtype}
    widths = (problem.query.shape[-1], problem.value.shape[-1])
    reasons = [
        (len(dtypes) > 1 or not dtypes <= set(DTYPES), "it needs operands of one half type, bfloat16 or float16"),
        (any(width % 8 for width in widths), f"it loads 16 bytes at a time, and heads are {widths} wide"),
        (max(widths) > BLOCKS[-1], f"its tiles are at most {BLOCKS[-1]} wide, and heads are {widths} wide"),
    ]
    return tuple(reason for holds, reason in reasons if holds)


def _training(problem: Problem, target: Target) -> tuple[str, ...]:
    if not problem.training:
        return ()
    return tuple(f"its backward is that of {BACKWARD}: {each}" for each in lookup(BACKWARD).refuses(problem, target))


# --- what it costs ----------------------------------------------------------------------------------


def _forward_seconds(problem: Problem) -> float:
    width = max(problem.query.shape[-1], problem.value.shape[-1])
    rate = next(rate for block, rate in RATES.items() if width <= block)
    if logit_of(problem.spec, rows_kept=problem.rows_kept).core != S:
        rate *= WITH_PROGRAM
    operands = (problem.query, problem.key, problem.value, *problem.captures)
    moved = sum(math.prod(x.shape) * x.dtype.itemsize for x in operands)
    return max(problem.flops * _reached(problem) / rate, moved / BANDWIDTH) + LAUNCH


def _backward_seconds(problem: Problem, target: Target) -> float:
    shapes = problem.query.shape, problem.key.shape, problem.value.shape
    if declined(problem.spec, *shapes):
        return _other_backward(problem, target)
    width = max(problem.query.shape[-1], problem.value.shape[-1])
    rate = next(rate for block, rate in BACKWARD_RATES.items() if width <= block)
    if logit_of(problem.spec).core != S:
        rate *= BACKWARD_WITH_PROGRAM
    own = PRODUCTS * problem.flops * _reached(problem) / rate + BACKWARD_LAUNCH
    # gradients of captures are the other kernel's
    bare = _with_gradients(problem, operands=True, captures=False)
    return own + _other_backward(_with_gradients(problem, operands=True), target) - _other_backward(bare, target)


def _other_backward(problem: Problem, target: Target) -> float:
    other, without = lookup(BACKWARD), _with_gradients(problem, operands=False, captures=False)
    return other.cost(problem, target) - other.cost(without, target)


def _with_gradients(problem: Problem, *, operands: bool, captures: bool = True) -> Problem:
    """The same attention, gradients being asked for of query, key and value or not, and of captures no longer."""
    query, key, value = (replace(x, requires_grad=operands) for x in (problem.query, problem.key, problem.value))
    read = tuple(replace(x, requires_grad=captures and x.requires_grad) for x in problem.captures)
    return replace(problem, query=query, key=key, value=value, captures=read)


def _reached(problem: Problem) -> float:
    """The share of scores in tiles that the mask's band does not skip."""
    band = band_of(problem.spec, problem.symbols)
    if band.open or not problem.scores:
        return 1.0
    spans = (band.reach(first, min(first + 128, problem.rows), problem.keys) for first in range(0, problem.rows, 128))
    return min(1.0, sum(128 * (stop - start) for start, stop in spans) / (problem.rows * problem.keys))
