"""What a backward launch needs that depends on shapes, strides and the spec alone: made once, a call adds addresses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor

from attnfuse.kernels.gluon.backward_build import BackwardSource, build_backward
from attnfuse.kernels.gluon.backward_meta import BackwardMeta, backward_meta
from attnfuse.kernels.gluon.plan import TYPES
from attnfuse.kernels.gluon.reads import given, reads_of
from attnfuse.kernels.rows import masking_fill
from attnfuse.kernels.schedule import Schedule
from attnfuse.kernels.triton.differentiating import backward_plan
from attnfuse.kernels.triton.gradients import Gradients
from attnfuse.kernels.triton.memory import capture_strides, memory_of
from attnfuse.kernels.triton.plan import BackwardPlan as Programs
from attnfuse.kernels.triton.text import function_text
from attnfuse.score import Capture
from attnfuse.spec import AttentionSpec

__all__ = ["BackwardPlan", "backward_planned", "backward_sourced", "padded"]

#: Bytes that stay in the L2 cache while all blocks that share them run (H200 has 60 MB, in two halves).
CACHED = 24 << 20

Layout = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class BackwardPlan:
    """One compiled backward, the shapes and strides of its descriptors, and the numbers it is launched with."""

    run: Callable[..., None]
    device: int
    #: Of query, key, value, their output's gradient, what dQ is added to, and the gradients of key and value.
    layouts: tuple[Layout, ...]
    #: The capture that is read in panels, and its layout.
    panel: tuple[int, Layout] | None
    captures: int
    numbers: tuple[Any, ...]
    #: Rows of 256 numbers that dQ is added to, its tile, and what it is then multiplied by.
    added: tuple[int, int]
    tile: tuple[int, int]
    factor: float


_PLANS: dict[Any, tuple[AttentionSpec, BackwardPlan]] = {}


def backward_planned(gradients: Gradients, read: Sequence[Tensor]) -> BackwardPlan:
    """The plan of one backward, whose query, key, value and output's gradient are loaded from ``read``, 4-D."""
    spec, captures = gradients.spec, gradients.captures[: len(gradients.spec.captures)]
    facts = tuple((x.shape, x.stride(), x.dtype, x.data_ptr() % 16) for x in (*read, *captures))
    # hashing a spec walks its programs; the table keeps the spec alive, so its id stays its own
    key = (id(spec), facts, tuple(gradients.symbols), read[0].device.index)
    found = _PLANS.get(key)
    if found is None:
        found = _PLANS[key] = (spec, _made(gradients, read))
    return found[1]


def backward_sourced(gradients: Gradients, meta: BackwardMeta | None = None) -> tuple[BackwardSource, Programs]:
    """What is to be compiled, and the programs it is made of."""
    spec, symbols = gradients.spec, len(gradients.symbols)
    captures = gradients.captures[: len(spec.captures)]
    chosen = meta or backward_meta(gradients.query.shape[-1], gradients.value.shape[-1])
    schedule = Schedule(rows=chosen.block_m, keys=chosen.block_n)
    programs = backward_plan(*gradients.geometry, schedule, *gradients.compiled_for)
    score, pulled = programs.core_program, programs.core_pulled_program
    if _filled(spec, programs):
        score, pulled = programs.masked_program, programs.masked_pulled_program
    memories = tuple(map(memory_of, captures))
    # what the copy engine cannot load has no stride that it could load by
    strides = [x.strides if x.aligned else (0,) for x in memories]
    reads = reads_of(spec, score, strides, [x.dtype for x in memories])
    write = partial(function_text, captures=spec.captures, fast=programs.fast, wide=programs.wide)
    steps = capture_strides(spec, memories)
    source = BackwardSource(
        _with_facts(chosen, spec, programs, reads),
        TYPES[gradients.query.dtype],
        write(given(score, spec.captures, symbols)),
        write(given(pulled, spec.captures, symbols)),
        tuple(TYPES[x.dtype] for x in memories),
        tuple("constexpr" if step == 1 else "i64" if step >= 2**31 else "i32" for step in steps),
        symbols,
        reads,
        tuple(write(Capture(slot)) for slot in range(len(captures))),
    )
    return source, programs


def _filled(spec: AttentionSpec, programs: Programs) -> bool:
    """Whether a key outside of the band may weigh something, so that its fill must be computed."""
    fill = masking_fill(spec)
    return programs.uncertain and fill is not None and fill > float("-inf")


def _with_facts(meta: BackwardMeta, spec: AttentionSpec, programs: Programs, reads: tuple[str, ...]) -> BackwardMeta:
    axes = spec.captures[reads.index("panel")].axes if "panel" in reads else ()
    wide = any(x == "panel" and spec.captures[slot].dtype == "float32" for slot, x in enumerate(reads))
    return replace(
        meta,
        stages=2 if wide else meta.stages,
        longest_first=programs.right and not programs.left,
        left=programs.left,
        right=programs.right,
        ragged=not programs.even,
        ragged_rows=not programs.even_rows,
        huge=programs.huge,
        uncertain=programs.uncertain,
        filled=_filled(spec, programs),
        panel="panel" in reads,
        panel_batch="b0" in axes,
        panel_head="h" in axes,
    )


def _made(gradients: Gradients, read: Sequence[Tensor]) -> BackwardPlan:
    source, programs = backward_sourced(gradients)
    query, key, value, _ = read
    batch, heads, rows, width = query.shape
    kv_heads, keys, value_width = key.shape[1], key.shape[2], value.shape[3]
    pairs, group, key_tiles = batch * kv_heads, heads // kv_heads, -(-keys // source.meta.block_n)
    # queries, gradients and the float32 sums that dQ is added to
    together = max(1, min(pairs, CACHED // (rows * group * (2 * width + 2 * value_width + 4 * width))))
    sizes = (heads, group, rows, padded(rows), keys, *gradients.band, key_tiles, pairs, together)
    tile = source.meta.block_m, source.meta.head_block
    added = (batch * heads * -(-rows // tile[0]) * tile[0] * tile[1] // 256, 256)
    steps = capture_strides(gradients.spec, gradients.memories[3:])
    slot = source.reads.index("panel") if source.meta.panel else None
    return BackwardPlan(
        run=build_backward(source)[(pairs * key_tiles, 1, 1)],
        device=query.device.index,
        layouts=(*map(_layout, read), (added, (256, 1)), *map(_dense, read[1:3])),
        panel=None if slot is None else (slot, _layout(gradients.captures[slot])),
        captures=len(gradients.spec.captures),
        # programs and meta are compiled in
        numbers=(steps, tuple(gradients.symbols), *sizes, programs.exponent, programs.factor, None, None),
        added=added,
        tile=tile,
        factor=programs.factor,
    )


def padded(rows: int) -> int:
    """Rows in steps of 16 bytes of float32: TMA's tiles start at multiples of them."""
    return -(-rows // 4) * 4


def _layout(tensor: Tensor) -> Layout:
    """Shape and strides of a descriptor, four dimensions."""
    shape, strides, _ = memory_of(tensor).described("d", 0, 0)
    return tuple(shape), tuple(strides)


def _dense(like: Tensor) -> Layout:
    """Of room for a gradient, laid out as ``[B, M, H, D]``."""
    batch, heads, rows, width = like.shape
    return (batch, heads, rows, width), (rows * heads * width, width, heads * width, 1)
