"""What a launch needs that depends on shapes, strides and the spec alone: made once, a call fills in addresses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Any

import torch

from attnfuse.form import ABSORBING, form_of
from attnfuse.kernels.gluon.build import Source, build
from attnfuse.kernels.gluon.forward import ROWS
from attnfuse.kernels.gluon.meta import Meta
from attnfuse.kernels.gluon.reads import given, reads_of
from attnfuse.kernels.gluon.tuned import measured, tuned
from attnfuse.kernels.rows import Band, band_of, rows_kept
from attnfuse.kernels.triton import function_text, logit_of
from attnfuse.score import Capture, Const, Expr, S, walk
from attnfuse.spec import AttentionSpec

__all__ = ["Facts", "Plan", "planned"]

#: Bytes of keys and values that stay in the L2 cache while all their row tiles run (H200 has 60 MB, in two halves).
CACHED = 24 << 20
#: Logits beyond this lose more than 0.01 where ``s * scale - top * scale`` rounds one product and not the other.
LARGE = 1e5
_NAMES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.float64: "fp64", torch.bool: "i1",
    torch.int8: "i8", torch.uint8: "u8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
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


_PLANS: dict[Any, tuple[AttentionSpec, Plan]] = {}


def planned(
    spec: AttentionSpec, facts: Facts, symbols: tuple[int, ...], device: int, with_lse: bool, meta: Meta | None = None
) -> Plan:
    """The plan of these operands, 4-D, on a device; kept for the next call."""
    # hashing a spec walks its programs; the table keeps the spec alive, so its id stays its own
    key = (id(spec), facts, symbols, device, with_lse, meta)
    found = _PLANS.get(key)
    if found is None:
        found = _PLANS[key] = (
            spec,
            _made(spec, facts, symbols, device, *sourced(spec, facts, symbols, with_lse, meta)),
        )
    return found[1]


def sourced(
    spec: AttentionSpec, facts: Facts, symbols: tuple[int, ...], with_lse: bool, meta: Meta | None = None
) -> tuple[Source, Band, float]:
    """What is to be compiled, the band outside of which keys are not read, and what makes a logit a power of two."""
    (q_shape, _, dtype), (k_shape, _, _), (v_shape, _, _), *captured = facts
    keys, logit, band = k_shape[2], logit_of(spec), Band(exact=False)
    program = logit.masked
    if _skips(spec, q_shape[2], keys, symbols):
        logit, band = logit_of(_unfilled(spec)), band_of(spec, symbols)
        program = logit.core
    sink = None if spec.sink is None else logit.shrunk(spec.sink, spec.captures)
    left, right = band.left is not None, band.right is not None
    simple = program == S
    chosen = meta or measured(spec, dtype, q_shape, k_shape, v_shape)
    chosen = chosen or tuned(q_shape[3], v_shape[3], keys, left=left, right=right, program=not simple)
    strides, dtypes = tuple(each for _, each, _ in captured), [dtype for _, _, dtype in captured]
    reads = reads_of(spec, program, strides, dtypes)
    facts_of = {"left": left, "right": right, "ragged": keys % chosen.block_n > 0, "lse": with_lse}
    wide = any(stride * size >= 2**31 for shape, each, _ in captured for size, stride in zip(shape, each, strict=True))
    write = partial(function_text, captures=spec.captures, fast=True, wide=wide)
    source = Source(
        chosen.having(**facts_of, **_panel(spec, reads), huge=logit.huge or _is_large(program)),
        _NAMES[dtype],
        None if simple else write(given(program, spec.captures, len(symbols))),
        None if sink is None else write(sink),
        tuple(_NAMES[each] for each in dtypes),
        tuple(
            "constexpr" if stride == 1 else "i64" if stride >= 2**31 else "i32" for stride in _strides(spec, captured)
        ),
        len(symbols),
        reads,
        tuple(write(Capture(slot)) for slot in range(len(reads))),
    )
    return source, band, logit.exponent


def _made(
    spec: AttentionSpec,
    facts: Facts,
    symbols: tuple[int, ...],
    device: int,
    source: Source,
    band: Band,
    exponent: float,
) -> Plan:
    (q_shape, q_strides, dtype), (k_shape, k_strides, _), (v_shape, v_strides, _), *captured = facts
    batch, heads, rows, width = q_shape
    kv_batch, kv_heads, keys, _ = k_shape
    value_width, pairs, group = v_shape[3], batch * heads, heads // kv_heads
    row_tiles = -(-rows // (source.meta.consumers * ROWS.value))
    pair_bytes = keys * (width + value_width) * dtype.itemsize / group
    together = max(1, min(pairs, int(CACHED // pair_bytes)))
    items = pairs * row_tiles
    grid = min(items, _processors(device)) if source.meta.persistent else items
    out = (batch, heads, rows, value_width), (rows * heads * value_width, value_width, heads * value_width, 1)
    shapes = ((q_shape, q_strides), (k_shape, k_strides), (v_shape, v_strides), out)
    sizes = (heads, group, kv_batch, rows, keys, band.left or 0, band.right or 0, row_tiles, pairs, together)
    # programs and meta are compiled in
    numbers = (_strides(spec, captured), symbols, *sizes, exponent, None, None)
    slot = source.reads.index("panel") if source.meta.panel else None
    panel = None if slot is None else (slot, _layout(*captured[slot][:2]))
    return Plan(build(source)[(grid, 1, 1)], device, tuple(_layout(*each) for each in shapes), panel, numbers)


@cache
def _processors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _layout(shape: Sequence[int], strides: Sequence[int]) -> Layout:
    """Shape and strides of a descriptor; the stride of a dimension of size 1 is any that is aligned."""
    aligned = (8 if size == 1 else stride for size, stride in zip(shape[:-1], strides[:-1], strict=True))
    return tuple(shape), (*aligned, 1)


def _panel(spec: AttentionSpec, reads: tuple[str, ...]) -> dict[str, bool]:
    if "panel" not in reads:
        return {}
    axes = spec.captures[reads.index("panel")].axes
    return {"panel": True, "panel_batch": "b0" in axes, "panel_head": "h" in axes}


def _skips(spec: AttentionSpec, rows: int, keys: int, symbols: tuple[int, ...]) -> bool:
    """Whether keys outside of the mask's band have no weight, so that they need not be read.

    A finite fill gives them weight in a row that keeps no key at all.
    """
    form = form_of(spec.score)
    if form is None or form.fill > ABSORBING:
        return False
    return form.fill == float("-inf") or rows_kept(spec, rows, keys, symbols)


def _unfilled(spec: AttentionSpec) -> AttentionSpec:
    """With -inf for a finite fill that nobody sees: the logit is then not as large as the fill."""
    form = form_of(spec.score)
    if form is None or not form.keep:
        return spec
    return replace(spec, score=replace(form, fill=float("-inf"), added=False).expr())


def _is_large(program: Expr) -> bool:
    """Whether it fills masked keys with a finite number so large that its product with a factor must not be rounded."""
    return any(isinstance(part, Const) and LARGE < abs(part.value) < float("inf") for part in walk(program))


def _strides(spec: AttentionSpec, captured: Sequence[Any]) -> tuple[int, ...]:
    """The strides that programs read: of each capture along each axis it varies along."""
    return tuple(
        strides[place]
        for (_, strides, _), each in zip(captured, spec.captures, strict=True)
        for place, axis in enumerate(spec.axes)
        if axis in each.axes
    )
