"""What a backward launch needs that depends on shapes, strides and the spec alone: made once, a call adds addresses."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from attnfuse.kernels.gluon.backward_build import BackwardSource, build_backward
from attnfuse.kernels.gluon.backward_lists import row_tiles_of
from attnfuse.kernels.gluon.backward_meta import BackwardMeta, backward_meta
from attnfuse.kernels.gluon.backward_programs import BodyPrograms, body_programs
from attnfuse.kernels.gluon.plan import LISTED, TYPES, places
from attnfuse.kernels.gluon.reads import given, only_of, reads_of
from attnfuse.kernels.rows import masking_band
from attnfuse.kernels.schedule import Schedule
from attnfuse.kernels.triton import Listing
from attnfuse.kernels.triton.differentiating import MOST_TURNS, backward_plan
from attnfuse.kernels.triton.gradients import Gradients
from attnfuse.kernels.triton.memory import capture_strides, memory_of
from attnfuse.kernels.triton.plan import BackwardPlan as Programs
from attnfuse.kernels.triton.text import function_text
from attnfuse.score import Capture, Expr, S
from attnfuse.spec import AttentionSpec, Captured

__all__ = ["BackwardPlan", "backward_planned", "backward_sourced", "layout_of", "padded"]

#: Bytes that stay in the L2 cache while all blocks that share them run (H200 has 60 MB, in two halves).
CACHED = 24 << 20

#: Captures, a panel among them, whose addresses and strides have room in shared memory beside three tiles of queries.
MOST_BESIDE = 2

Layout = tuple[tuple[int, ...], tuple[int, ...]]


@dataclass(frozen=True)
class BackwardPlan:
    """One compiled backward, the shapes and strides of its descriptors, and the numbers it is launched with."""

    run: Callable[..., None]
    device: int
    #: Of query, key, value, their output's gradient, what dQ is added to, and the gradients of key and value.
    layouts: tuple[Layout, ...]
    #: The capture that is read in panels, and its layout; whether its gradient is written, every tile of it.
    panel: tuple[int, Layout] | None
    gradient: bool
    visited: bool
    captures: int
    numbers: tuple[Any, ...]
    #: Rows of 256 numbers that dQ is added to, its tile, and what it is then multiplied by.
    added: tuple[int, int]
    tile: tuple[int, int]
    factor: float
    #: What lists the tiles of the mask; and the lists, where they depend on sizes alone.
    lister: Callable[[Sequence[Tensor]], Tensor] | None = None
    fixed: Tensor | None = None


_PLANS: dict[Any, tuple[AttentionSpec, BackwardPlan]] = {}


def backward_planned(gradients: Gradients, read: Sequence[Tensor]) -> BackwardPlan:
    """The plan of one backward, whose query, key, value and output's gradient are loaded from ``read``, 4-D."""
    spec, captures = gradients.spec, gradients.operands.captures[: len(gradients.spec.captures)]
    facts = tuple((x.shape, x.stride(), x.dtype, x.data_ptr() % 16) for x in (*read, *captures))
    # hashing a spec walks its programs; the table keeps the spec alive, so its id stays its own
    key = (id(spec), facts, gradients.operands.symbols, tuple(gradients.needs), read[0].device.index)
    found = _PLANS.get(key)
    if found is None:
        found = _PLANS[key] = (spec, _made(gradients, read))
    return found[1]


def backward_sourced(gradients: Gradients) -> tuple[BackwardSource, BodyPrograms]:
    """What is to be compiled, and the programs it is made of."""
    spec, symbols = gradients.spec, len(gradients.operands.symbols)
    captures = gradients.operands.captures[: len(spec.captures)]
    banded = not masking_band(spec, gradients.operands.symbols).open
    widths = gradients.operands.query.shape[-1], gradients.operands.value.shape[-1]
    chosen = backward_meta(*widths, banded=banded)
    schedule = Schedule(rows=chosen.block_m, keys=chosen.block_n)
    facts = backward_plan(*gradients.geometry, schedule, *gradients.compiled_for)
    rows, keys = gradients.operands.query.shape[-2], gradients.operands.key.shape[-2]
    programs = body_programs(spec, facts, rows, keys, gradients.operands.symbols, listed=rows >= LISTED)
    memories = tuple(map(memory_of, captures))
    # what the copy engine cannot load has no stride that it could load by
    strides = [x.strides if x.aligned else (0,) for x in memories]
    reads = _reads(spec, programs, strides, [x.dtype for x in memories])
    write = partial(function_text, captures=spec.captures, fast=facts.fast, wide=facts.wide)
    steps = capture_strides(spec, memories)

    def written(program: Expr) -> str:
        return write(given(program, spec.captures, symbols))

    source = BackwardSource(
        _with_facts(chosen, gradients, facts, programs, reads),
        TYPES[gradients.operands.query.dtype],
        written(programs.bare),
        written(programs.pulled),
        None if programs.mask is None else written(programs.score),
        None if programs.kept is None else written(programs.kept),
        captures=tuple(TYPES[x.dtype] for x in memories),
        strides=tuple("constexpr" if step == 1 else "i64" if step >= 2**31 else "i32" for step in steps),
        symbols=symbols,
        reads=reads,
        bare_reads=only_of(programs.bare, reads),
        loaders=tuple(write(Capture(slot)) for slot in range(len(captures))),
    )
    return source, programs


def _reads(
    spec: AttentionSpec, programs: BodyPrograms, strides: Sequence[tuple[int, ...]], dtypes: Sequence[torch.dtype]
) -> tuple[str, ...]:
    """As the forward's; ``"one"`` varies along neither rows nor keys, and ``"key"`` is the same of all heads."""
    found = reads_of(spec, programs.score, strides, dtypes)
    return tuple(_within(read, captured) for read, captured in zip(found, spec.captures, strict=True))


def _within(read: str, captured: Captured) -> str:
    match read:
        case "row" if "m" not in captured.axes:
            return "one"
        case "key" if "h" in captured.axes:
            return "score"
    return read


def _with_facts(
    meta: BackwardMeta, gradients: Gradients, facts: Programs, programs: BodyPrograms, reads: tuple[str, ...]
) -> BackwardMeta:
    spec, slot = gradients.spec, reads.index("panel") if "panel" in reads else None
    axes = () if slot is None else spec.captures[slot].axes
    added = 0 if slot is None else _added(gradients, programs, slot)
    return replace(
        meta,
        stages=2 if slot is not None and _crowded(meta, gradients, slot, programs) else meta.stages,
        early=meta.early or (programs.bare == S and not (facts.left or facts.right or programs.mask is not None)),
        longest_first=facts.right and not facts.left,
        left=facts.left,
        right=facts.right,
        ragged=not facts.even,
        ragged_rows=not facts.even_rows,
        huge=facts.huge,
        uncertain=facts.uncertain,
        filled=programs.filled,
        listed=programs.mask is not None,
        panel=slot is not None,
        panel_batch="b0" in axes,
        panel_head="h" in axes,
        panel_gradient=added > 0,
        panel_added=added > 1,
    )


def _crowded(meta: BackwardMeta, gradients: Gradients, slot: int, programs: BodyPrograms) -> bool:
    """Whether a panel, or what is handed to the warps beside one, leaves no room for three tiles of queries.

    Of heads of 64 there is room for five.
    """
    if max(meta.head_block, meta.value_block) <= 64:
        return False
    wide = gradients.operands.captures[slot].dtype == torch.float32
    return wide or programs.mask is not None or len(gradients.spec.captures) > MOST_BESIDE


def _added(gradients: Gradients, programs: BodyPrograms, slot: int) -> int:
    """Tiles that are added to make one of a panel's gradient, of the panel's own type; 0 where the body makes none."""
    panel, query = gradients.operands.captures[slot], gradients.operands.query
    keys = gradients.operands.key.shape[-2]
    # the copy engine stores in steps of 16 bytes
    fits = panel.dtype == query.dtype and keys * panel.dtype.itemsize % 16 == 0
    if not (gradients.needs[3 + slot] and any(gradients.needs[:3]) and fits and programs.summand(slot)):
        return 0
    added = math.prod(query.shape[:-2]) // math.prod(panel.shape[:-2])
    return added if added <= MOST_TURNS else 0


def _made(gradients: Gradients, read: Sequence[Tensor]) -> BackwardPlan:
    source, programs = backward_sourced(gradients)
    query, key, value, _ = read
    batch, heads, rows, width = query.shape
    kv_heads, keys, value_width = key.shape[1], key.shape[2], value.shape[3]
    pairs, group, key_tiles = batch * kv_heads, heads // kv_heads, -(-keys // source.meta.block_n)
    # queries, gradients and the float32 sums that dQ is added to
    together = max(1, min(pairs, CACHED // (rows * group * (2 * width + 2 * value_width + 4 * width))))
    listing = _listing(gradients, source.meta, programs, query.shape)
    sizes = (heads, group, rows, padded(rows), keys, *gradients.band, key_tiles, pairs, together, *places(listing))
    tile = source.meta.block_m, source.meta.head_block
    added = (batch * heads * -(-rows // tile[0]) * tile[0] * tile[1] // 256, 256)
    steps = capture_strides(gradients.spec, gradients.memories[3:])
    slot = source.reads.index("panel") if source.meta.panel else None
    lister = None if listing is None else listing.launcher(query.device)
    return BackwardPlan(
        run=build_backward(source)[(pairs * key_tiles, 1, 1)],
        device=query.device.index,
        layouts=(*map(layout_of, read), (added, (256, 1)), *map(_dense, read[1:3])),
        panel=None if slot is None else (slot, layout_of(gradients.operands.captures[slot])),
        gradient=source.meta.panel_gradient,
        visited=not (source.meta.panel_added or source.meta.left or source.meta.right or source.meta.listed),
        captures=len(gradients.spec.captures),
        # programs and meta are compiled in
        numbers=(steps, gradients.operands.symbols, *sizes, programs.exponent, programs.factor, None, None),
        added=added,
        tile=tile,
        factor=programs.factor,
        lister=lister,
        fixed=lister(()) if lister is not None and listing is not None and listing.fixed else None,
    )


def _listing(gradients: Gradients, meta: BackwardMeta, programs: BodyPrograms, shape: Sequence[int]) -> Listing | None:
    if programs.mask is None:
        return None
    spec, captures = gradients.spec, gradients.memories[3:]
    wide = any(step * size >= 2**31 for x in captures for size, step in zip(x.shape, x.strides, strict=True))
    steps = capture_strides(spec, captures)
    keys, symbols = gradients.operands.key.shape[-2], gradients.operands.symbols
    return row_tiles_of(programs.mask, spec, meta, shape, keys, gradients.band, steps, symbols, wide=wide)


def padded(rows: int) -> int:
    """Rows in steps of 16 bytes of float32: TMA's tiles start at multiples of them."""
    return -(-rows // 4) * 4


def layout_of(tensor: Tensor) -> Layout:
    """Shape and strides of a descriptor, four dimensions."""
    shape, strides, _ = memory_of(tensor).described("d", 0, 0)
    return tuple(shape), tuple(strides)


def _dense(like: Tensor) -> Layout:
    """Of room for a gradient, laid out as ``[B, M, H, D]``."""
    batch, heads, rows, width = like.shape
    return (batch, heads, rows, width), (rows * heads * width, width, heads * width, 1)
