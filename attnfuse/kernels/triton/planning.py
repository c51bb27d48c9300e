"""Which plan a problem is given: programs, schedule and the parts of a body that it needs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch

from attnfuse.errors import BadProgram
from attnfuse.form import ABSORBING, masked_by, weight_factor
from attnfuse.kernels.float8 import HEADROOM, product_types
from attnfuse.kernels.gpu.cost import device_of
from attnfuse.kernels.measured import fastest_schedule
from attnfuse.kernels.problem import Operand
from attnfuse.kernels.rows import MARGIN, masking_band, rows_kept, skips_surely
from attnfuse.kernels.schedule import Schedule
from attnfuse.kernels.triton.logit import logit_of
from attnfuse.kernels.triton.memory import Memory
from attnfuse.kernels.triton.plan import Plan
from attnfuse.kernels.triton.tables import Shape, schedule_for, with_spans, with_splits
from attnfuse.score import Const, Expr, text
from attnfuse.spec import AttentionSpec, axes_of
from attnfuse.target import Target

__all__ = ["NAME", "filled", "plan_of", "precision_of", "shape_of", "shipped"]

#: What the kernel that plans are for is called.
NAME = "triton"
#: Rows below which the query heads that share a key head are put into one tile.
PACKED_BELOW = 64
#: Types by the language's names.
_NAMES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float8_e4m3fn: "float8e4nv",
    torch.float8_e5m2: "float8e5",
    torch.float8_e4m3fnuz: "float8e4b8",
    torch.float8_e5m2fnuz: "float8e5b16",
}
#: Rows of a tile at most that is bound by memory, so that exact products cost nothing.
FEW = 16


def precision_of(dtype: torch.dtype) -> str:
    """How float32 is multiplied: as torch's own products are."""
    if dtype != torch.float32:
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"


@lru_cache(maxsize=4096)
def plan_of(
    spec: AttentionSpec,
    query: Memory,
    key: Memory,
    value: Memory,
    captures: tuple[Memory, ...],
    symbols: tuple[int, ...],
    target: Target,
    precision: str,
    schedule: Schedule | None = None,
    *,
    with_lse: bool = False,
) -> Plan:
    """The plan of operands in memory; ``schedule`` None leaves it to the target's table."""
    band = masking_band(spec, symbols)
    rows, keys, groups = query.shape[-2], key.shape[-2], query.shape[-3] // key.shape[-3]
    logit = logit_of(spec, rows_kept=rows_kept(spec, rows, keys, symbols))
    scores, weights = _types(spec, query, key, value, target)
    in_tile, of_row = factors_of_weights(spec)
    schedule = _able(schedule or _chosen(spec, query, key, value, symbols, target))
    return Plan(
        schedule=schedule,
        captures=spec.captures,
        masked_program=logit.masked,
        core_program=logit.masked if band.open else logit.core,
        sink_program=None if spec.sink is None else logit.shrunk(spec.sink, spec.captures),
        exponent=logit.exponent,
        factor=logit.factor,
        huge=logit.huge,
        precise=logit.huge or torch.float32 in (scores, weights),
        batch=spec.batch,
        groups=groups,
        packed=_is_packed(rows, groups),
        width=query.shape[-1],
        value_width=value.shape[-1],
        padded=_padded(query.shape[-1], scores),
        value_padded=_padded(value.shape[-1]),
        value_minor=value.minor,
        left=band.left is not None,
        right=band.right is not None,
        rest=not band.open and not skips_surely(spec, rows, keys, symbols),
        floor=max(_fill(spec) + MARGIN, ABSORBING) / logit.factor,
        even=keys % schedule.keys == 0,
        precision="ieee" if rows <= FEW or _is_packed(rows, groups) else precision,
        dropout=spec.dropout,
        with_lse=with_lse,
        fast=torch.float32 not in (scores, weights) and target.kind == "cuda",
        wide=any(keys * each.strides[-1] >= 2**31 for each in captures),
        key_factor_program=in_tile,
        row_factor_program=of_row,
        scores=_NAMES[scores],
        weights=_NAMES[weights],
        headroom=HEADROOM.get(weights, 0.0),
    )


def _able(schedule: Schedule) -> Schedule:
    """The schedule itself. Raises :class:`BadProgram` for one that no body carries out."""
    if schedule.algorithm == "keys outside" and schedule.pipelining != "none":
        raise BadProgram(
            f"with keys outside a tile of rows meets one tile of keys at a time, which leaves nothing to pipeline:"
            f" {schedule.pipelining!r} must be 'none'"
        )
    if schedule.algorithm == "keys outside" and schedule.splits > 1:
        raise BadProgram(
            f"with keys outside rows are split, in spans, and not keys: splits={schedule.splits} must be 1"
        )
    return schedule


def _is_packed(rows: int, groups: int) -> bool:
    """Whether a tile has the rows of all query heads that share a key head."""
    return groups > 1 and rows <= PACKED_BELOW


def _fill(spec: AttentionSpec) -> float:
    mask = masked_by(spec)
    return float("-inf") if mask is None else mask.fill


def factors_of_weights(spec: AttentionSpec) -> tuple[Expr | None, Expr | None]:
    """What weights are multiplied by, None for one: in the tile where it varies along the keys, else row by row.

    Raises :class:`BadProgram` for another weight program.
    """
    factor = weight_factor(spec.weight)
    if factor is None:
        raise BadProgram(f"the body was asked for a weight program it refuses: {text(spec.weight)}")
    if factor == Const(1.0):
        return None, None
    return (factor, None) if "n" in axes_of(factor, spec.captures) else (None, factor)


def _chosen(
    spec: AttentionSpec, query: Memory, key: Memory, value: Memory, symbols: tuple[int, ...], target: Target
) -> Schedule:
    measured = fastest_schedule(NAME, spec, query.dtype, query.shape, key.shape, value.shape, target)
    base = shipped(spec, query, key, value, symbols, target) if measured is None else _read(measured)
    return filled(base, spec, query, key, symbols, target)


def _read(fields: Mapping[str, Any]) -> Schedule:
    found = Schedule(**{**fields, "knobs": tuple(map(tuple, fields["knobs"]))})
    # whether keys may be split, and in how many, is a question of each call
    return found if found.splits == 1 else replace(found, algorithm="rows outside", splits=1)


def shipped(
    spec: AttentionSpec,
    query: Memory | Operand,
    key: Memory | Operand,
    value: Memory | Operand,
    symbols: tuple[int, ...],
    target: Target,
) -> Schedule:
    """The schedule that the target's table has for operands, keys not yet split."""
    return schedule_for(target, shape_of(spec, query, key, value, symbols, target))


def shape_of(
    spec: AttentionSpec,
    query: Memory | Operand,
    key: Memory | Operand,
    value: Memory | Operand,
    symbols: tuple[int, ...],
    target: Target,
) -> Shape:
    """What tables know of operands."""
    widths = _padded(query.shape[-1]), _padded(value.shape[-1])
    banded = not masking_band(spec, symbols).open
    scores, weights = _types(spec, query, key, value, target)
    wider = max(scores.itemsize, weights.itemsize)
    return Shape(*widths, wider, banded, _in_tiles(query, key), narrow=scores.itemsize == 1)


def filled(
    schedule: Schedule,
    spec: AttentionSpec,
    query: Memory | Operand,
    key: Memory | Operand,
    symbols: tuple[int, ...],
    target: Target,
) -> Schedule:
    """The schedule with keys split where a few rows would not fill the processors; with keys outside, rows."""
    rows, keys, in_tiles = query.shape[-2], key.shape[-2], _in_tiles(query, key)
    if schedule.algorithm == "keys outside":
        heads = math.prod(query.shape[:-1]) // in_tiles
        return with_spans(schedule, heads, in_tiles, device_of(target).processors)
    if in_tiles > PACKED_BELOW or not skips_surely(spec, rows, keys, symbols):
        return schedule
    programs = math.prod(key.shape[:-2]) * -(-in_tiles // schedule.rows)
    return with_splits(schedule, programs, keys, device_of(target).processors)


def _in_tiles(query: Memory | Operand, key: Memory | Operand) -> int:
    """Rows that are computed together for one key head."""
    rows, groups = query.shape[-2], query.shape[-3] // key.shape[-3]
    return rows * groups if _is_packed(rows, groups) else rows


def _types(
    spec: AttentionSpec, query: Memory | Operand, key: Memory | Operand, value: Memory | Operand, target: Target
) -> tuple[torch.dtype, torch.dtype]:
    return product_types(spec, (query.dtype, key.dtype, value.dtype), target, value.minor)


def _padded(width: int, dtype: torch.dtype = torch.bfloat16) -> int:
    """A power of two that matrix units sum over: 16 at least, of elements of one byte 32."""
    return max(32 if dtype.itemsize == 1 else 16, 1 << (width - 1).bit_length())
