"""What a launch needs that depends on shapes, strides and the spec alone: made once, a call fills in addresses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

from attnfuse.kernels.float8 import HEADROOM
from attnfuse.kernels.gluon.build import Source, build
from attnfuse.kernels.gluon.forward import ROWS
from attnfuse.kernels.gluon.meta import Meta
from attnfuse.kernels.gluon.programs import Programs, programs_of
from attnfuse.kernels.gluon.reads import given, only_of, reads_along_keys, reads_of
from attnfuse.kernels.gluon.tuned import measured, tuned
from attnfuse.kernels.triton import Listing, Mask, function_text
from attnfuse.reference import is_float8, out_dtype
from attnfuse.score import Capture, S
from attnfuse.spec import AttentionSpec, axes_of

__all__ = ["LISTED", "TYPES", "Facts", "Plan", "places", "planned"]

#: Bytes of keys and values that stay in the L2 cache while all their row tiles run (H200 has 60 MB, in two halves).
CACHED = 24 << 20
#: Work items of a multiprocessor in the last group of a longest-first order: they end with short ones.
LAST_ITEMS = 2
#: Keys from which on the tiles of a mask are listed: it takes a launch of its own.
LISTED = 1024
#: What Triton calls the types of tensors.
TYPES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64", torch.bool: "i1",
    torch.int8: "i8", torch.uint8: "u8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
    torch.float8_e4m3fn: "fp8e4nv", torch.float8_e5m2: "fp8e5",
}  # fmt: skip

Layout = tuple[tuple[int, ...], tuple[int, ...]]
#: Shape, strides and dtype of query, key, value and each capture.
Facts = tuple[tuple[tuple[int, ...], tuple[int, ...], torch.dtype], ...]


@dataclass(frozen=True)
class Plan:
    """One compiled forward, the shapes and strides of its descriptors, and the numbers it is launched with."""

    run: Callable[..., None]
    device: int
    layouts: tuple[Layout, ...]
    #: The capture that is read in panels, and its layout.
    panel: tuple[int, Layout] | None
    numbers: tuple[Any, ...]
    #: What lists the tiles of the mask; and the lists, where they depend on sizes alone.
    lister: Callable[[Sequence[Tensor]], Tensor] | None = None
    fixed: Tensor | None = None


_PLANS: dict[Any, tuple[AttentionSpec, Plan]] = {}


def planned(
    spec: AttentionSpec, facts: Facts, symbols: tuple[int, ...], device: int, with_lse: bool, meta: Meta | None = None
) -> Plan:
    """The plan of these operands, 4-D, on a device; kept for the next call."""
    # hashing a spec walks its programs; the table keeps the spec alive, so its id stays its own
    key = (id(spec), facts, symbols, device, with_lse, meta)
    found = _PLANS.get(key)
    if found is None:
        source, programs = sourced(spec, facts, symbols, with_lse, meta)
        found = _PLANS[key] = (spec, _made(spec, facts, symbols, device, source, programs))
    return found[1]


def sourced(
    spec: AttentionSpec, facts: Facts, symbols: tuple[int, ...], with_lse: bool, meta: Meta | None = None
) -> tuple[Source, Programs]:
    """What is to be compiled, and the programs it was made of."""
    (q_shape, _, dtype), (k_shape, _, _), (v_shape, _, value), *captured = facts
    rows, keys = q_shape[2], k_shape[2]
    programs = programs_of(spec, rows, keys, symbols)
    left, right = programs.band.left is not None, programs.band.right is not None
    listed = programs.mask is not None and keys >= LISTED
    simple = programs.cut == S
    bare = programs.bare if listed else programs.cut
    strides, dtypes = tuple(each for _, each, _ in captured), [dtype for _, _, dtype in captured]
    narrow = is_float8(dtype)
    reads = reads_of(spec, programs.cut, strides, dtypes, panels=not narrow)
    facts_of = {
        "left": left, "right": right, "program": not simple, "panel": "panel" in reads, "narrow": narrow,
        "columns": reads_along_keys(programs.cut, spec.captures),
    }  # fmt: skip
    chosen = meta or measured(spec, dtype, q_shape, k_shape, v_shape)
    chosen = chosen or tuned(q_shape[3], v_shape[3], keys, **facts_of)
    known = {"left": left, "right": right, "ragged": keys % chosen.block_n > 0, "lse": with_lse, "listed": listed}
    # lists differ in length
    known["dynamic"] = chosen.dynamic or (listed and chosen.persistent)
    write = partial(function_text, captures=spec.captures, fast=True, wide=_is_wide(captured))
    source = Source(
        chosen.having(**known, **_panel(spec, reads), huge=programs.huge, headroom=HEADROOM.get(value, 0.0)),
        TYPES[dtype],
        None if simple else write(given(programs.cut, spec.captures, len(symbols))),
        None if bare == S else write(given(bare, spec.captures, len(symbols))),
        None if programs.sink is None else write(programs.sink),
        tuple(TYPES[each] for each in dtypes),
        tuple(
            "constexpr" if stride == 1 else "i64" if stride >= 2**31 else "i32" for stride in _strides(spec, captured)
        ),
        len(symbols),
        reads,
        only_of(bare, reads),
        tuple(write(Capture(slot)) for slot in range(len(reads))),
        None if programs.factor is None else write(programs.factor),
        TYPES[value],
        TYPES[out_dtype(spec, value)],
    )
    return source, programs


def _made(
    spec: AttentionSpec,
    facts: Facts,
    symbols: tuple[int, ...],
    device: int,
    source: Source,
    programs: Programs,
) -> Plan:
    (q_shape, q_strides, dtype), (k_shape, *_), (v_shape, *_), *captured = facts
    batch, heads, rows, width = q_shape
    kv_batch, kv_heads, keys, _ = k_shape
    value_width, pairs, group = v_shape[3], batch * heads, heads // kv_heads
    row_tiles = -(-rows // (source.meta.consumers * ROWS.value))
    pair_bytes = keys * (width + value_width) * dtype.itemsize / group
    items = pairs * row_tiles
    together = _together(pairs, pair_bytes, row_tiles, _processors(device))
    grid = min(items, _processors(device)) if source.meta.persistent else items
    out = (batch, heads, rows, value_width), (rows * heads * value_width, value_width, heads * value_width, 1)
    shapes = ((q_shape, q_strides), *_of_keys(facts, source.meta), out)
    listing = listing_of(spec, facts, symbols, source.meta, programs)
    band = programs.band.left or 0, programs.band.right or 0
    sizes = (heads, group, kv_batch, rows, keys, *band, row_tiles, pairs, together, *places(listing))
    # programs and meta are compiled in
    numbers = (_strides(spec, captured), symbols, *sizes, programs.exponent, None, None)
    slot = source.reads.index("panel") if source.meta.panel else None
    panel = None if slot is None else (slot, _layout(*captured[slot][:2]))
    run, layouts = build(source)[(grid, 1, 1)], tuple(_layout(*each) for each in shapes)
    if listing is None:
        return Plan(run, device, layouts, panel, numbers)
    lister = listing.launcher(torch.device("cuda", device))
    if listing.fixed:
        return Plan(run, device, layouts, panel, numbers, fixed=lister(()))
    return Plan(run, device, layouts, panel, numbers, lister)


def _of_keys(facts: Facts, meta: Meta) -> tuple[Layout, Layout]:
    """Key and value as descriptors have them: of float8 keys in fours, and value transposed."""
    _, (k_shape, k_strides, _), (v_shape, v_strides, _), *_ = facts
    if not meta.narrow:
        return (k_shape, k_strides), (v_shape, v_strides)
    (batch, heads, keys, width), (*outer, step, _) = k_shape, k_strides
    fours = (batch, heads, -(-keys // 4), 4, width), (*outer, 4 * step, step, 1)
    return fours, (_turned(v_shape), _turned(v_strides))


def _turned(sizes: tuple[int, ...]) -> tuple[int, ...]:
    return (*sizes[:-2], *sizes[:-3:-1])


def _together(pairs: int, pair_bytes: float, row_tiles: int, processors: int) -> int:
    """Pairs of batch and head whose row tiles are walked together: their keys and values fit into the L2 cache.

    Enough for the last group to keep every multiprocessor busy to its end; not so many that all of memory is asked for
    at the start.
    """
    busy = -(-LAST_ITEMS * processors // row_tiles)
    return max(1, min(pairs, processors // 4, max(busy, int(CACHED // pair_bytes))))


def listing_of(
    spec: AttentionSpec, facts: Facts, symbols: tuple[int, ...], meta: Meta, programs: Programs
) -> Listing | None:
    """What lists the tiles of the mask, in the body's tiles."""
    if not meta.listed or programs.mask is None:
        return None
    ((batch, heads, rows, _), _, _), (k_shape, _, _), _, *captured = facts
    varies = axes_of(programs.mask, spec.captures)
    mask = Mask(
        programs.mask, spec.captures, len(symbols), _is_wide(captured), meta.consumers * ROWS.value, meta.block_n,
        -(-k_shape[2] // meta.block_n), meta.left, meta.right, programs.everywhere,
    )  # fmt: skip
    sizes = batch if "b0" in varies else 1, heads if "h" in varies else 1, rows, k_shape[2]
    band = programs.band.left or 0, programs.band.right or 0
    return Listing(mask, *sizes, band, _strides(spec, captured), symbols)


def places(listing: Listing | None) -> tuple[int, int, int]:
    """Lists from one batch to the next, from one head to the next, and the length of one."""
    if listing is None:
        return 0, 0, 0
    tiles = listing.row_tiles
    return (
        tiles * listing.heads if listing.batch > 1 else 0, tiles if listing.heads > 1 else 0, listing.length,
    )  # fmt: skip


@cache
def _processors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _layout(shape: Sequence[int], strides: Sequence[int]) -> Layout:
    """Shape and strides of a descriptor, of four dimensions at least; of size 1 any aligned stride will do."""
    missing = max(4 - len(shape), 0)
    aligned = (16 if size == 1 else stride for size, stride in zip(shape[:-1], strides[:-1], strict=True))
    return (*[1] * missing, *shape), (*[16] * missing, *aligned, 1)


def _panel(spec: AttentionSpec, reads: tuple[str, ...]) -> dict[str, bool]:
    if "panel" not in reads:
        return {}
    axes = spec.captures[reads.index("panel")].axes
    return {"panel": True, "panel_batch": "b0" in axes, "panel_head": "h" in axes}


def _is_wide(captured: Sequence[Any]) -> bool:
    """Whether an offset within a tile may need 64 bits."""
    return any(stride * size >= 2**31 for shape, each, _ in captured for size, stride in zip(shape, each, strict=True))


def _strides(spec: AttentionSpec, captured: Sequence[Any]) -> tuple[int, ...]:
    """The strides that programs read: of each capture along each axis it varies along."""
    return tuple(
        strides[place]
        for (_, strides, _), each in zip(captured, spec.captures, strict=True)
        for place, axis in enumerate(spec.axes)
        if axis in each.axes
    )
