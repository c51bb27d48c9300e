"""From tensors to a launch. What does not depend on addresses is worked out once for each geometry of a call."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attnfuse.kernels.rows import masking_band
from attnfuse.kernels.schedule import Schedule
from attnfuse.kernels.triton.memory import Memory, capture_strides, memory_of
from attnfuse.kernels.triton.plan import Plan
from attnfuse.kernels.triton.planning import plan_of, precision_of
from attnfuse.operands import Operands
from attnfuse.reference import out_dtype, seed_of
from attnfuse.spec import AttentionSpec
from attnfuse.target import Target

__all__ = ["Geometry", "Launch", "attend", "on_device", "options_of", "prepare", "sources", "target_of"]


def attend(
    spec: AttentionSpec, operands: Operands, *, with_lse: bool = False, schedule: Schedule | None = None
) -> tuple[Tensor, Tensor]:
    """``out``, laid out as ``[*B, M, H, Dv]``, and ``lse [*B, H, M]`` in float32, empty unless asked for.

    No size is zero; two batch axes at most.
    """
    query, value = operands.query, operands.value
    *batch, heads, rows, _ = query.shape
    dtype = out_dtype(spec, value.dtype)
    out = value.new_empty((*batch, rows, heads, value.shape[-1]), dtype=dtype).transpose(-3, -2)
    lse = query.new_empty((*batch, heads, rows) if with_lse else 0, dtype=torch.float32)
    launch = prepare(spec, operands, out, lse, schedule)
    with on_device(query.device):
        launch.body[(launch.programs,)](*launch.arguments, **launch.options)
        if launch.merging is not None:
            from attnfuse.kernels.triton.forward import merge  # noqa: PLC0415 - Triton is imported when it is launched

            merge[(query.shape[:-1].numel(),)](*launch.merging, num_warps=1)
    return out, lse


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Launches go to the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


def options_of(schedule: Schedule) -> dict[str, Any]:
    """What of a schedule the compiler is told."""
    options: dict[str, Any] = {"num_warps": schedule.warps, "num_stages": schedule.stages, **dict(schedule.knobs)}
    return options if schedule.registers is None else {**options, "maxnreg": schedule.registers}


# --- what does not depend on addresses --------------------------------------------------------------


@dataclass(frozen=True)
class Geometry:
    """A call's plan, grid, strides of its tensors, ``sizes`` and ``band`` as the body takes them.

    ``descriptors`` are those of what the body loads tiles from, where it loads by them.
    """

    plan: Plan
    programs: int
    strides: tuple[tuple[int, ...], ...]
    captures: tuple[int, ...]
    sizes: tuple[int, ...]
    band: tuple[int, int]
    descriptors: tuple[tuple[list[int], list[int], list[int]], ...]


@lru_cache(maxsize=4096)
def _geometry(
    spec: AttentionSpec,
    operands: tuple[Memory, Memory, Memory, Memory],
    captures: tuple[Memory, ...],
    symbols: tuple[int, ...],
    schedule: Schedule | None,
    with_lse: bool,
    target: Target,
    precision: str,
) -> Geometry:
    query, key, value, _ = operands
    *batch, heads, rows, _ = query.shape
    plan = plan_of(spec, query, key, value, captures, symbols, target, precision, schedule, with_lse=with_lse)
    if not (key.describable("d", batch) and value.describable(plan.value_minor, batch)):
        plan = replace(plan, schedule=replace(plan.schedule, loading="pointer"))
    of_rows = plan.spans if plan.keys_outside else -(-rows * plan.group // plan.rows)
    work = of_rows * math.prod(batch) * (heads // plan.group) * plan.splits
    b1, band = (*batch, 1, 1)[1], masking_band(spec, symbols)
    descriptors = (
        key.described("d", plan.keys, plan.padded),
        value.described(plan.value_minor, plan.keys, plan.value_padded),
    )
    return Geometry(
        plan=plan,
        programs=work,
        strides=tuple(memory.five() for memory in operands),
        captures=capture_strides(spec, captures),
        sizes=(b1, heads, rows, key.shape[-2], work, math.prod(query.shape[:-1])),
        band=(band.left or 0, band.right or 0),
        descriptors=descriptors if plan.descriptors else (),
    )


# --- a call -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Launch:
    """A body, what it is launched with, and the merge after it, where keys are split."""

    body: Any
    programs: int
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    merging: tuple[Any, ...] | None = None


def prepare(
    spec: AttentionSpec,
    operands: Operands,
    out: Tensor,
    lse: Tensor,
    schedule: Schedule | None = None,
    target: Target | None = None,
) -> Launch:
    """The launch of the forward body that writes ``out``, and ``lse`` where it is not empty."""
    (query, key, value), symbols = operands.qkv, operands.symbols
    named = operands.captures[: len(spec.captures)]
    known = _geometry(
        spec, tuple(map(memory_of, (query, key, value, out))), tuple(map(memory_of, named)), symbols,
        schedule, lse.numel() > 0, target or target_of(query.device), precision_of(out.dtype),
    )  # fmt: skip
    plan = known.plan
    asked, kept = lse if plan.with_lse else None, _sums(plan, query, value)
    arguments = (
        query, *sources(known, key, value), out, asked, kept, (named, known.captures, symbols),
        seed_of(spec, operands.captures) if plan.dropout else None, *known.strides, known.sizes, known.band, plan,
    )  # fmt: skip
    programs = min(known.programs, _processors(query.device)) if plan.order == "persistent" else known.programs
    merging = (kept, out, asked, known.strides[-1], known.sizes, plan) if plan.splits > 1 else None
    return Launch(_body(plan), programs, arguments, options_of(plan.schedule), merging)


target_of = lru_cache(Target.of)


@lru_cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def sources(known: Geometry, *operands: Tensor) -> tuple[Any, ...]:
    """What the body loads tiles of key and, where it is read, value from."""
    if not known.descriptors:
        return operands
    from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: PLC0415 - see attend

    made = []
    for operand, how in zip(operands, known.descriptors, strict=True):
        # what its constructor would check at every launch, the geometry was made by
        descriptor = object.__new__(TensorDescriptor)
        descriptor.base = operand
        descriptor.shape, descriptor.strides, descriptor.block_shape = how
        made.append(descriptor)
    return tuple(made)


def _body(plan: Plan) -> Any:
    from attnfuse.kernels.triton.forward import forward  # noqa: PLC0415 - Triton is imported when it is launched
    from attnfuse.kernels.triton.keys_outside import keys_outside  # noqa: PLC0415

    return keys_outside if plan.keys_outside else forward


def _sums(plan: Plan, query: Tensor, value: Tensor) -> tuple[Tensor, ...] | None:
    """Room for maximum, sum and unnormalised out of every row: in every split, or between tiles of keys."""
    if plan.keys_outside:
        *batch, heads, rows, _ = query.shape
        tiles = math.prod(batch) * (heads // plan.group) * -(-rows * plan.group // plan.rows)
        shapes = ((tiles, plan.rows), (tiles, plan.rows), (tiles, plan.rows, plan.value_padded))
    elif plan.splits > 1:
        every = query.shape[:-1].numel()
        shapes = ((plan.splits, every), (plan.splits, every), (plan.splits, every, value.shape[-1]))
    else:
        return None
    return tuple(query.new_empty(shape, dtype=torch.float32) for shape in shapes)
