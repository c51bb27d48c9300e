"""From tensors to a launch: the plan, the strides, the descriptors, the grid."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from attnfuse.form import ABSORBING, form_of
from attnfuse.kernels.gpu.cost import device_of
from attnfuse.kernels.rows import MARGIN, masking_band, rows_kept, skips_surely
from attnfuse.kernels.schedule import Schedule
from attnfuse.kernels.triton.logit import logit_of
from attnfuse.kernels.triton.plan import Plan
from attnfuse.kernels.triton.tables import Shape, schedule_for, with_splits
from attnfuse.reference import seed_of
from attnfuse.spec import AttentionSpec
from attnfuse.target import Target

__all__ = ["Launch", "attend", "capture_strides", "on_device", "options_of", "plan_of", "prepare", "strides_of"]

#: Rows of a tile below which query heads that share a key head are put into one tile.
PACKED_BELOW = 64


def attend(
    spec: AttentionSpec,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    captures: Sequence[Tensor],
    symbols: Sequence[int],
    *,
    with_lse: bool = False,
    schedule: Schedule | None = None,
) -> tuple[Tensor, Tensor]:
    """``out``, laid out as ``[*B, M, H, Dv]``, and ``lse [*B, H, M]`` in float32, empty unless asked for.

    Shapes as in :mod:`attnfuse.spec`, none of them zero; two batch axes at most.
    """
    from attnfuse.kernels.triton.forward import forward, merge  # noqa: PLC0415 - Triton is imported when it is launched

    *batch, heads, rows, _ = query.shape
    out = value.new_empty((*batch, rows, heads, value.shape[-1])).transpose(-3, -2)
    lse = query.new_empty((*batch, heads, rows) if with_lse else 0, dtype=torch.float32)
    launch = prepare(spec, query, key, value, captures, symbols, out, lse, schedule)
    with on_device(query.device):
        forward[(launch.programs,)](*launch.arguments, **launch.options)
        if launch.merging is not None:
            merge[(query.shape[:-1].numel(),)](*launch.merging, num_warps=1)
    return out, lse


@dataclass(frozen=True)
class Launch:
    """What a body is launched with, and the merge after it, where keys are split."""

    programs: int
    arguments: tuple[Any, ...]
    options: dict[str, Any]
    merging: tuple[Any, ...] | None = None


def prepare(
    spec: AttentionSpec,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    captures: Sequence[Tensor],
    symbols: Sequence[int],
    out: Tensor,
    lse: Tensor,
    schedule: Schedule | None = None,
    target: Target | None = None,
) -> Launch:
    """The launch of the forward body that writes ``out``, and ``lse`` where it is not empty."""
    *batch, heads, rows, _ = query.shape
    band, asked, target = masking_band(spec, tuple(symbols)), lse.numel() > 0, target or Target.of(query.device)
    plan = _plan(spec, _described(query, key, value), tuple(symbols), schedule, asked, target)
    plan = _loadable(plan, batch, key, value)
    b0, b1 = (*batch, 1, 1)[:2]
    group = plan.groups if plan.packed else 1
    work = -(-rows * group // plan.rows) * b0 * b1 * (heads // group) * plan.splits
    sizes = (b1, heads, rows, key.shape[-2], work, b0 * b1 * heads * rows)
    partial = _partial(query, value, plan.splits)
    arguments = (
        query,
        _source(key, batch, plan, plan.padded),
        _source(value, batch, plan, plan.value_padded, plan.value_minor),
        out,
        lse if asked else None,
        partial,
        (tuple(captures[: len(spec.captures)]), capture_strides(spec, captures), tuple(symbols)),
        seed_of(spec, captures) if spec.dropout else None,
        *(strides_of(x, batch) for x in (query, key, value, out)),
        sizes,
        (band.left or 0, band.right or 0),
        plan,
    )
    programs = min(work, _processors(query.device)) if plan.order == "persistent" else work
    merging = None if partial is None else (partial, out, lse if asked else None, strides_of(out, batch), sizes, plan)
    return Launch(programs, arguments, options_of(plan.schedule), merging)


def _partial(query: Tensor, value: Tensor, splits: int) -> tuple[Tensor, ...] | None:
    """Room for maximum, sum and unnormalised out of every row in every split."""
    if splits == 1:
        return None
    rows = query.shape[:-1].numel()
    shapes = ((splits, rows), (splits, rows), (splits, rows, value.shape[-1]))
    return tuple(query.new_empty(shape, dtype=torch.float32) for shape in shapes)


def on_device(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Launches go to the current device."""
    return torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()


@lru_cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def options_of(schedule: Schedule) -> dict[str, Any]:
    """What of a schedule the compiler is told."""
    options: dict[str, Any] = {"num_warps": schedule.warps, "num_stages": schedule.stages, **dict(schedule.knobs)}
    return options if schedule.registers is None else {**options, "maxnreg": schedule.registers}


def precision_of(dtype: torch.dtype) -> str:
    """How float32 is multiplied: as torch's own products are."""
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


# --- the plan ---------------------------------------------------------------------------------------

Described = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...], torch.dtype, str, str]


def _described(query: Tensor, key: Tensor, value: Tensor) -> Described:
    """What of the operands decides the plan."""
    minor = "n" if value.stride(-1) != 1 and value.stride(-2) == 1 else "d"
    return tuple(query.shape), tuple(key.shape), tuple(value.shape), query.dtype, minor, precision_of(query.dtype)


def plan_of(
    spec: AttentionSpec, query: Tensor, key: Tensor, value: Tensor, symbols: Sequence[int], schedule: Schedule
) -> Plan:
    """The plan of these operands, loaded by pointers."""
    target = Target.of(query.device)
    return _plan(spec, _described(query, key, value), tuple(symbols), schedule, with_lse=False, target=target)


@lru_cache(maxsize=4096)
def _plan(
    spec: AttentionSpec,
    described: Described,
    symbols: tuple[int, ...],
    schedule: Schedule | None,
    with_lse: bool,
    target: Target,
) -> Plan:
    query, key, value, dtype, minor, precision = described
    band, form = masking_band(spec, symbols), form_of(spec.score)
    rows, keys, groups = query[-2], key[-2], query[-3] // key[-3]
    logit = logit_of(spec, rows_kept=rows_kept(spec, rows, keys, symbols))
    packed = groups > 1 and rows <= PACKED_BELOW
    padded, value_padded = _padded(query[-1]), _padded(value[-1])
    if schedule is None:
        shape = Shape(padded, value_padded, dtype.itemsize, not band.open, rows * (groups if packed else 1))
        schedule = schedule_for(target, shape)
        work = math.prod(query[:-3]) * key[-3] * -(-rows * groups // schedule.rows)
        if shape.rows <= PACKED_BELOW and skips_surely(spec, rows, keys, symbols):
            schedule = with_splits(schedule, work, keys, device_of(target).processors)
    fill = float("-inf") if form is None else form.fill
    return Plan(
        schedule=schedule,
        captures=spec.captures,
        masked_program=logit.masked,
        core_program=logit.masked if band.open else logit.core,
        sink_program=None if spec.sink is None else logit.shrunk(spec.sink, spec.captures),
        exponent=logit.exponent,
        factor=logit.factor,
        huge=logit.huge,
        batch=spec.batch,
        groups=groups,
        packed=packed,
        width=query[-1],
        value_width=value[-1],
        padded=padded,
        value_padded=value_padded,
        value_minor=minor,
        left=band.left is not None,
        right=band.right is not None,
        rest=not band.open and not skips_surely(spec, rows, keys, symbols),
        floor=max(fill + MARGIN, ABSORBING) / logit.factor,
        even=keys % schedule.keys == 0,
        # a tile of a few rows is bound by memory: exact products cost nothing there
        precision="ieee" if packed or rows <= 16 else precision,
        dropout=spec.dropout,
        with_lse=with_lse,
        fast=dtype != torch.float32 and target.kind == "cuda",
        wide=False,
    )


def _padded(width: int) -> int:
    return max(16, 1 << (width - 1).bit_length())


# --- operands ---------------------------------------------------------------------------------------


def strides_of(tensor: Tensor, batch: Sequence[int]) -> tuple[int, ...]:
    """Strides of ``[b0, b1, h, m, d]``; zero where a batch axis is missing or broadcast."""
    outer = [0 if size == 1 else stride for size, stride in zip(tensor.shape[:-3], tensor.stride(), strict=False)]
    padding = [0] * (2 - len(batch))
    return (*outer, *padding, *tensor.stride()[-3:])


def capture_strides(spec: AttentionSpec, captures: Sequence[Tensor]) -> tuple[int, ...]:
    """What a program's text calls ``strides``; zero along an axis that broadcasts."""
    return tuple(
        0 if tensor.shape[place] == 1 else tensor.stride(place)
        for tensor, captured in zip(captures, spec.captures, strict=False)
        for place, axis in enumerate(spec.axes)
        if axis in captured.axes
    )


def _loadable(plan: Plan, batch: Sequence[int], key: Tensor, value: Tensor) -> Plan:
    """The plan, with pointers where the memory of key or value cannot be described."""
    spread = all(list(x.shape[:-3]) == list(batch) for x in (key, value))
    if not plan.descriptors or (spread and _describable(key, "d") and _describable(value, plan.value_minor)):
        return plan
    return replace(plan, schedule=replace(plan.schedule, loading="pointer"))


def _describable(tensor: Tensor, minor: str) -> bool:
    """Whether a descriptor can load its tiles: the innermost axis dense, the others in steps of 16 bytes."""
    inner = -1 if minor == "d" else -2
    others = [s for place, s in enumerate(tensor.stride()) if place != tensor.dim() + inner and tensor.shape[place] > 1]
    aligned = all(stride > 0 and stride * tensor.element_size() % 16 == 0 for stride in others)
    return tensor.stride(inner) == 1 and aligned and tensor.data_ptr() % 16 == 0


def _source(tensor: Tensor, batch: Sequence[int], plan: Plan, padded: int, minor: str = "d") -> Any:
    """What a body loads tiles of key or value from."""
    if not plan.descriptors:
        return tensor
    from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: PLC0415 - see attend

    lead = max(len(batch), 1)
    shape = [1] * (lead - len(batch)) + list(tensor.shape)
    # a descriptor wants every stride in steps of 16 bytes, of axes of one element too
    step = 16 // tensor.element_size()
    strides = [step] * (lead - len(batch)) + [
        stride if size > 1 else step for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    ]
    block = [plan.keys, padded]
    if minor == "n":
        shape[-2:], strides[-2:], block = shape[:-3:-1], strides[:-3:-1], block[::-1]
    strides[-1] = 1
    return TensorDescriptor(tensor, shape, strides, [1] * (lead + 1) + block)
