"""One launch of the forward: descriptors of the operands, and what the plan says."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
import triton
from torch import Tensor

from attnfuse.kernels.gluon.meta import Meta
from attnfuse.kernels.gluon.plan import Facts, Plan, planned
from attnfuse.spec import AttentionSpec

__all__ = ["forward"]


def forward(
    spec: AttentionSpec,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    captures: Sequence[Tensor],
    symbols: Sequence[int],
    *,
    with_lse: bool = False,
    meta: Meta | None = None,
) -> tuple[Tensor, Tensor | None]:
    """``out [B, H, M, Dv]``, laid out as ``[B, M, H, Dv]``, and ``lse [B, H, M]``; operands have four dimensions.

    ``meta`` overrides the tuned choices, for measurements.
    """
    query, key, value = map(_loadable, (query, key, value))
    batch, heads, rows, _ = query.shape
    out = query.new_empty((batch, rows, heads, value.shape[-1])).transpose(1, 2)
    lse = query.new_empty((batch, heads, rows), dtype=torch.float32) if with_lse else None
    facts: Facts = tuple((x.shape, x.stride(), x.dtype) for x in (query, key, value, *captures))
    plan = planned(spec, facts, tuple(symbols), query.device.index, with_lse, meta)
    _launch(plan, (query, key, value, out), lse, captures)
    return out, lse


@dataclass(frozen=True)
class Descriptor:
    """What Triton's launcher reads of a tensor descriptor."""

    base: Tensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    padding: str = "zero"


def _launch(plan: Plan, operands: Sequence[Tensor], lse: Tensor | None, captures: Sequence[Tensor]) -> None:
    described = [Descriptor(x, *layout) for x, layout in zip(operands, plan.layouts, strict=True)]
    stream = triton.runtime.driver.active.get_current_stream(plan.device)
    counter = _counter(plan.device, stream)
    plan.run(*described, counter if lse is None else lse, counter, tuple(captures), *plan.numbers, stream=stream)


@cache
def _counter(device: int, stream: int) -> Tensor:
    """The next work item, one for each stream. Zero between launches: whoever takes the last item resets it."""
    return torch.zeros(1, dtype=torch.int32, device=torch.device("cuda", device))


def _loadable(tensor: Tensor) -> Tensor:
    """The tensor as TMA can load it: aligned to 16 bytes along every dimension; a copy only where it is not."""
    *strides, last = tensor.stride()
    aligned = all(size == 1 or (stride > 0 and stride % 8 == 0) for size, stride in zip(tensor.shape, strides))  # noqa: B905
    if last == 1 and aligned and tensor.data_ptr() % 16 == 0:
        return tensor
    return tensor.contiguous() if not tensor.is_contiguous() else tensor.clone()
