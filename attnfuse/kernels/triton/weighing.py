"""From tensors to a launch that writes weights."""

from __future__ import annotations

import math
from dataclasses import replace
from functools import lru_cache

from torch import Tensor

from attnfuse.kernels.rows import masking_band
from attnfuse.kernels.schedule import Schedule
from attnfuse.kernels.triton.launch import Geometry, Launch, on_device, options_of, sources, target_of
from attnfuse.kernels.triton.memory import Memory, capture_strides, memory_of
from attnfuse.kernels.triton.planning import plan_of, precision_of
from attnfuse.operands import Operands
from attnfuse.reference import weights_dtype
from attnfuse.spec import AttentionSpec
from attnfuse.target import Target

__all__ = ["prepare_weights", "weights"]


def weights(spec: AttentionSpec, operands: Operands, schedule: Schedule | None = None) -> Tensor:
    """The weights ``[*B, H, M, N]``, contiguous. No size of query and key is zero; the value is not read."""
    query, key = operands.query, operands.key
    out = query.new_empty((*query.shape[:-1], key.shape[-2]), dtype=weights_dtype(spec, query.dtype))
    launch = prepare_weights(spec, operands, out, schedule)
    with on_device(query.device):
        launch.body[(launch.programs,)](*launch.arguments, **launch.options)
    return out


def prepare_weights(
    spec: AttentionSpec, operands: Operands, out: Tensor, schedule: Schedule | None = None, target: Target | None = None
) -> Launch:
    """The launch that writes ``out``."""
    from attnfuse.kernels.triton.weights import weigh  # noqa: PLC0415 - Triton is imported when it is launched

    query, key, captures, symbols = operands.query, operands.key, operands.captures, operands.symbols
    at = memory_of(query), memory_of(key), tuple(map(memory_of, captures))
    known = _geometry(spec, *at, symbols, target or target_of(query.device), precision_of(query.dtype), schedule)
    arguments = (
        query, *sources(known, key), out, (captures, known.captures, symbols), *known.strides,
        known.sizes, known.band, known.plan,
    )  # fmt: skip
    return Launch(weigh, known.programs, arguments, options_of(known.plan.schedule))


@lru_cache(maxsize=4096)
def _geometry(
    spec: AttentionSpec,
    query: Memory,
    key: Memory,
    captures: tuple[Memory, ...],
    symbols: tuple[int, ...],
    target: Target,
    precision: str,
    schedule: Schedule | None,
) -> Geometry:
    *batch, heads, rows, _ = query.shape
    # planned as if keys were values: a tile has room for as much
    plan = plan_of(spec, query, key, key, captures, symbols, target, precision, schedule)
    simple = replace(plan.schedule, splits=1, algorithm="rows outside", pipelining="none", order="plain")
    if not key.describable("d", batch):
        simple = replace(simple, loading="pointer")
    plan, band = replace(plan, schedule=simple, packed=False), masking_band(spec, symbols)
    return Geometry(
        plan=plan,
        programs=-(-rows // plan.rows) * math.prod(batch) * heads,
        strides=(query.five(), key.five()),
        captures=capture_strides(spec, captures),
        sizes=((*batch, 1, 1)[1], heads, rows, key.shape[-2]),
        band=(band.left or 0, band.right or 0),
        descriptors=(key.described("d", plan.keys, plan.padded),) if plan.descriptors else (),
    )
