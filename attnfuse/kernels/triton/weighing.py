"""From tensors to a launch that writes weights."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from torch import Tensor

from attnfuse.kernels.rows import masking_band
from attnfuse.kernels.schedule import Schedule
from attnfuse.kernels.triton.launch import Launch, on_device, options_of
from attnfuse.kernels.triton.memory import Memory, capture_strides, memory_of
from attnfuse.kernels.triton.plan import Plan
from attnfuse.kernels.triton.planning import plan_of, precision_of
from attnfuse.reference import weights_dtype
from attnfuse.spec import AttentionSpec
from attnfuse.target import Target

__all__ = ["prepare_weights", "weights"]


def weights(
    spec: AttentionSpec,
    query: Tensor,
    key: Tensor,
    captures: Sequence[Tensor],
    symbols: Sequence[int],
    schedule: Schedule | None = None,
) -> Tensor:
    """The weights ``[*B, H, M, N]``, contiguous. Shapes as in :mod:`attnfuse.spec`, none of them zero."""
    out = query.new_empty((*query.shape[:-1], key.shape[-2]), dtype=weights_dtype(spec, query.dtype))
    launch = prepare_weights(spec, query, key, captures, symbols, out, _target(query.device), schedule)
    with on_device(query.device):
        launch.body[(launch.programs,)](*launch.arguments, **launch.options)
    return out


_target = lru_cache(Target.of)


def prepare_weights(
    spec: AttentionSpec,
    query: Tensor,
    key: Tensor,
    captures: Sequence[Tensor],
    symbols: Sequence[int],
    out: Tensor,
    target: Target,
    schedule: Schedule | None = None,
) -> Launch:
    """The launch that writes ``out``."""
    from attnfuse.kernels.triton.weights import weigh  # noqa: PLC0415 - Triton is imported when it is launched

    at = tuple(map(memory_of, captures))
    operands = memory_of(query), memory_of(key)
    known = _geometry(spec, *operands, at, tuple(symbols), target, precision_of(query.dtype), schedule)
    arguments = (
        query, _source(known, key), out, (tuple(captures), known.captures, tuple(symbols)), *known.strides,
        known.sizes, known.band, known.plan,
    )  # fmt: skip
    return Launch(weigh, known.programs, arguments, options_of(known.plan.schedule))


@dataclass(frozen=True)
class _Geometry:
    """What does not depend on addresses: plan, grid, strides of query and key, ``sizes`` and ``band`` of the body."""

    plan: Plan
    programs: int
    strides: tuple[tuple[int, ...], ...]
    captures: tuple[int, ...]
    sizes: tuple[int, ...]
    band: tuple[int, int]
    described: tuple[list[int], list[int], list[int]]


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
) -> _Geometry:
    *batch, heads, rows, _ = query.shape
    # planned as if keys were values: a tile has room for as much
    plan = plan_of(spec, query, key, key, captures, symbols, target, precision, schedule)
    simple = replace(plan.schedule, splits=1, algorithm="rows outside", pipelining="none", order="plain")
    if not key.describable("d", batch):
        simple = replace(simple, loading="pointer")
    plan, band = replace(plan, schedule=simple, packed=False), masking_band(spec, symbols)
    return _Geometry(
        plan=plan,
        programs=-(-rows // plan.rows) * math.prod(batch) * heads,
        strides=(query.five(), key.five()),
        captures=capture_strides(spec, captures),
        sizes=((*batch, 1, 1)[1], heads, rows, key.shape[-2]),
        band=(band.left or 0, band.right or 0),
        described=key.described("d", plan.keys, plan.padded),
    )


def _source(known: _Geometry, key: Tensor) -> Any:
    """What the body loads tiles of keys from."""
    if not known.plan.descriptors:
        return key
    from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: PLC0415 - see above

    return TensorDescriptor(key, *known.described)
