"""What a launch needs that depends on shapes, strides and the spec alone: made once, a call fills in addresses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from attnfuse.form import ABSORBING, form_of
from attnfuse.kernels.gluon.build import Source, build
from attnfuse.kernels.gluon.forward import ROWS
from attnfuse.kernels.gluon.meta import Meta
from attnfuse.kernels.gluon.tuned import tuned
from attnfuse.kernels.rows import Band, band_of, rows_kept
from attnfuse.kernels.triton import function_text, logit_of
from attnfuse.score import Const, Expr, S, walk
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
        source, band = sourced(spec, facts, symbols, with_lse, meta)
        found = _PLANS[key] = (spec, _made(spec, facts, symbols, device, source, band))
    return found[1]


def sourced(
    spec: AttentionSpec, facts: Facts, symbols: tuple[int, ...], with_lse: bool, meta: Meta | None = None
) -> tuple[Source, Band]:
    """What is to be compiled, and the band outside of which keys are not read."""
    (q_shape, _, dtype), (k_shape, _, _), (v_shape, _, _), *captured = facts
    logit, keys = logit_of(spec), k_shape[2]
    skips = _skips(spec, q_shape[2], keys, symbols)
    band, program = (band_of(spec, symbols), logit.core) if skips else (Band(exact=False), logit.masked)
    sink = None if spec.sink is None else logit.shrunk(spec.sink, spec.captures)
    left, right = band.left is not None, band.right is not None
    simple = program == S
    chosen = meta or tuned(q_shape[3], v_shape[3], keys, left=left, right=right, program=not simple)
    facts_of = {"left": left, "right": right, "ragged": keys % chosen.block_n > 0, "lse": with_lse}
    wide = any(stride * size >= 2**31 for shape, each, _ in captured for size, stride in zip(shape, each, strict=True))
    source = Source(
        chosen.having(**facts_of, huge=logit.huge or _is_large(program)),
        _NAMES[dtype],
        None if simple else function_text(program, spec.captures, fast=True, wide=wide),
        None if sink is None else function_text(sink, spec.captures, fast=True, wide=wide),
        tuple(_NAMES[each[2]] for each in captured),
        tuple(
            "constexpr" if stride == 1 else "i64" if stride >= 2**31 else "i32" for stride in _strides(spec, captured)
        ),
        len(symbols),
    )
    return source, band


def _made(spec: AttentionSpec, facts: Facts, symbols: tuple[int, ...], device: int, source: Source, band: Band) -> Plan:
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
    # program, sink and meta are compiled in
    numbers = (_strides(spec, captured), symbols, *sizes, logit_of(spec).exponent, None, None, None)
    return Plan(build(source)[(grid, 1, 1)], device, tuple(_layout(*each) for each in shapes), numbers)


@cache
def _processors(device: int) -> int:
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _layout(shape: Sequence[int], strides: Sequence[int]) -> Layout:
    """Shape and strides of a descriptor; the stride of a dimension of size 1 is any that is aligned."""
    aligned = (8 if size == 1 else stride for size, stride in zip(shape[:-1], strides[:-1], strict=True))
    return tuple(shape), (*aligned, 1)


def _skips(spec: AttentionSpec, rows: int, keys: int, symbols: tuple[int, ...]) -> bool:
    """Whether keys outside of the mask's band have no weight, so that they need not be read.

    A finite fill gives them weight in a row that keeps no key at all.
    """
    form = form_of(spec.score)
    if form is None or form.fill > ABSORBING:
        return False
    return form.fill == float("-inf") or rows_kept(spec, rows, keys, symbols)


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
