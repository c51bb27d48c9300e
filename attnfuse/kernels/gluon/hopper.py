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

from attnfuse.form import weight_factor
from attnfuse.kernels.float8 import product_types
from attnfuse.kernels.gluon.cost import backward_seconds, forward_seconds
from attnfuse.kernels.gluon.meta import Meta
from attnfuse.kernels.gluon.tuned import BLOCKS, NAME, WIDEST_FLOAT8, choices
from attnfuse.kernels.kernel import Kernel, Residual
from attnfuse.kernels.problem import Problem
from attnfuse.kernels.registry import kernel, lookup
from attnfuse.kernels.triton import untranslatable
from attnfuse.operands import Operands
from attnfuse.reference import attention, is_float8
from attnfuse.spec import AttentionSpec, axes_of
from attnfuse.target import Target

__all__ = ["Gluon"]

DTYPES = (torch.bfloat16, torch.float16)
#: The other kernel, whose backward is used where this one's declines, and the widest head of this one's.
BACKWARD, WIDEST_BACKWARD = "triton", 128


@kernel
class Gluon(Kernel):
    """One warp loads tiles by TMA, two or three warpgroups multiply: :mod:`attnfuse.kernels.gluon.forward`."""

    name: ClassVar[str] = NAME
    devices: ClassVar[tuple[str, ...]] = ("cuda",)
    gives_lse: ClassVar[bool] = True
    saves_lse: ClassVar[bool] = True

    def refuses(self, problem: Problem, target: Target) -> tuple[str, ...]:
        """What the body cannot compute, and where it cannot run."""
        return (*_elsewhere(target), *_programs(problem.spec), *_operands(problem, target), *_training(problem, target))

    def cost(self, problem: Problem, target: Target) -> float:
        """Products at the measured rates, masked tiles skipped, at least the bytes; the rest as another kernel does."""
        seconds = forward_seconds(problem)
        if not problem.training:
            return seconds
        own = not declined(*(x.shape for x in (problem.query, problem.key, problem.value)))
        return seconds + backward_seconds(problem, BACKWARD, target, own=own)

    def schedules(self, problem: Problem, target: Target) -> tuple[Meta, ...]:
        """What the table has for any attention of these widths; where scores read a panel, its room decides."""
        narrow = is_float8(problem.query.dtype)
        if problem.captured_bytes and not narrow:
            return ()
        return choices(problem.query.shape[-1], problem.value.shape[-1], narrow=narrow)

    def run_by(self, schedule: Meta, spec: AttentionSpec, operands: Operands) -> Tensor:
        """``out`` by these choices."""
        return _forward(spec, operands, with_lse=False, meta=schedule)[0]

    def run(self, spec: AttentionSpec, operands: Operands) -> Tensor:
        """``out``, laid out as ``[*B, M, H, Dv]``."""
        return attention(spec, operands)[0] if operands.empty else _forward(spec, operands, with_lse=False)[0]

    def run_with_lse(self, spec: AttentionSpec, operands: Operands) -> tuple[Tensor, Tensor]:
        """``out`` and ``lse``."""
        if operands.empty:
            return attention(spec, operands)
        out, lse = _forward(spec, operands, with_lse=True)
        assert lse is not None
        return out, lse

    def backward(
        self, spec: AttentionSpec, grad_out: Tensor, operands: Operands, needs: Sequence[bool], residual: Residual
    ) -> tuple[Tensor | None, ...]:
        """Gradients in five products a tile; those of the kernel ``triton`` where :func:`declined` has a reason."""
        if operands.empty or declined(*(x.shape for x in operands.qkv)):
            return lookup(BACKWARD).backward(spec, grad_out, operands, needs, residual)
        if residual.lse is None:
            out, lse = _forward(spec, operands, with_lse=True)
            residual = Residual(out, lse, residual.grad_lse)
        from attnfuse.kernels.gluon.gradients import HopperGradients  # noqa: PLC0415 - see _forward

        return HopperGradients(spec, grad_out, operands, needs, residual).run()


def _forward(
    spec: AttentionSpec, operands: Operands, *, with_lse: bool, meta: Meta | None = None
) -> tuple[Tensor, Tensor | None]:
    # Triton is imported where it runs, so that a machine without it can still be told why not
    from attnfuse.kernels.gluon.launch import forward  # noqa: PLC0415

    if spec.batch:
        return forward(spec, operands, with_lse=with_lse, meta=meta)
    query, key, value = (x[None] for x in operands.qkv)
    batched = replace(operands, query=query, key=key, value=value)
    out, lse = forward(spec, batched, with_lse=with_lse, meta=meta)
    return out[0], None if lse is None else lse[0]


def declined(query: Sequence[int], key: Sequence[int], value: Sequence[int]) -> tuple[str, ...]:
    """Why a backward of operands of these shapes is left to another kernel, one sentence a reason."""
    widths, pairs = (query[-1], value[-1]), math.prod(query[:-2])
    reasons = [
        (torch.are_deterministic_algorithms_enabled(), "it adds to the query's gradient in no order"),
        (max(widths) > WIDEST_BACKWARD, f"it has heads of {WIDEST_BACKWARD} at most, not {max(widths)}"),
        (tuple(query[:-3]) != tuple(key[:-3]), "its key and value have a batch of their own"),
        (pairs * query[-2] >= 2**31, "it counts rows in 31 bits"),
        (_cannot_add(), "this Triton's Gluon does not let the copy engine add; 3.6 to 3.9 do"),
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


#: Modules of Gluon, and the names in them that the bodies call; where one has another from some version on, both.
_NAMES = {
    "triton.experimental.gluon.language": ("warp_specialize", "NVMMADistributedLayout", "NVMMASharedLayout"),
    "triton.experimental.gluon.language.nvidia.hopper": ("warpgroup_mma", "warpgroup_mma_wait", "fence_async_shared"),
    "triton.experimental.gluon.language.nvidia.hopper.tma": (
        "async_copy_global_to_shared|async_load", "async_copy_shared_to_global|async_store", "store_wait",
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
        lacking = [each for each in wanted if not any(hasattr(module, other) for other in each.split("|"))]
        if lacking:
            names = ", ".join(each.replace("|", " or ") for each in lacking)
            return (f"this Triton's Gluon has no {names} in {name}; 3.6 to 3.9 have",)
    return ()


def _programs(spec: AttentionSpec) -> tuple[str, ...]:
    factor = weight_factor(spec.weight)
    along_keys = factor is not None and "n" in axes_of(factor, spec.captures)
    reasons = [
        (factor is None, "it has no weight program but a factor"),
        (along_keys, "its factor of weights does not vary along the keys"),
        (spec.dropout > 0, "it has no dropout"),
        (spec.batch > 1, f"it takes one batch dimension, not {spec.batch}"),
    ]
    programs = (each for each in (spec.score, spec.sink, factor) if each is not None)
    return (
        *(reason for holds, reason in reasons if holds),
        *(reason for program in programs for reason in untranslatable(program)),
    )


def _operands(problem: Problem, target: Target) -> tuple[str, ...]:
    dtypes, narrow = set(problem.dtypes), any(map(is_float8, problem.dtypes))
    widths = (problem.query.shape[-1], problem.value.shape[-1])
    loaded, widest = (16, WIDEST_FLOAT8) if narrow else (8, BLOCKS[-1])
    halves = len(dtypes) == 1 and dtypes <= set(DTYPES)
    reasons = [
        (not halves and not narrow, "it needs operands of one half type, bfloat16 or float16"),
        (narrow and not _multiplies(problem, target), _OF_FLOAT8),
        (any(width % loaded for width in widths), f"it loads 16 bytes at a time, and heads are {widths} wide"),
        (max(widths) > widest, f"its tiles are at most {widest} wide, and heads are {widths} wide"),
    ]
    return tuple(reason for holds, reason in reasons if holds)


#: What it wants of float8.
_OF_FLOAT8 = (
    "of float8 it needs query and key of one type, weights that may be rounded to value's, and an output of a half type"
)


def _multiplies(problem: Problem, target: Target) -> bool:
    """Whether both products are of float8."""
    types = product_types(problem.spec, problem.dtypes, target)
    return all(map(is_float8, types)) and types == (problem.key.dtype, problem.value.dtype)


def _training(problem: Problem, target: Target) -> tuple[str, ...]:
    if not problem.training:
        return ()
    return tuple(f"its backward is that of {BACKWARD}: {each}" for each in lookup(BACKWARD).refuses(problem, target))
