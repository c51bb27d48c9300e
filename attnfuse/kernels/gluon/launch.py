"""One launch of the forward: descriptors of the operands, and what the plan says."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, lru_cache
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from attnfuse.kernels.gluon.meta import Meta
from attnfuse.kernels.gluon.plan import Facts, Plan, planned
from attnfuse.operands import Operands
from attnfuse.reference import is_float8, out_dtype
from attnfuse.spec import AttentionSpec

__all__ = ["Descriptor", "forward", "loadable"]


def forward(
    spec: AttentionSpec, operands: Operands, *, with_lse: bool = False, meta: Meta | None = None
) -> tuple[Tensor, Tensor | None]:
    """``out [B, H, M, Dv]``, laid out as ``[B, M, H, Dv]``, and ``lse [B, H, M]``; operands have four dimensions.

    ``meta`` overrides the tuned choices, for measurements.
    """
    query, key, value = loadable(operands.query), *loadable_keys(operands.key, operands.value)
    captures = [x if x.data_ptr() % 16 == 0 else x.clone() for x in operands.captures]
    batch, heads, rows, _ = query.shape
    dtype = out_dtype(spec, value.dtype)
    out = query.new_empty((batch, rows, heads, value.shape[-1]), dtype=dtype).transpose(1, 2)
    lse = query.new_empty((batch, heads, rows), dtype=torch.float32) if with_lse else None
    facts: Facts = tuple((x.shape, x.stride(), x.dtype) for x in (query, key, value, *captures))
    plan = planned(spec, facts, operands.symbols, query.device.index, with_lse, meta)
    _launch(plan, (query, key, value, out), lse, captures)
    return out, lse


class Descriptor(NamedTuple):
    """What Triton's launcher reads of a tensor descriptor. One is made for each operand of each call."""

    base: Tensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    padding: str = "zero"


def _launch(plan: Plan, operands: Sequence[Tensor], lse: Tensor | None, captures: Sequence[Tensor]) -> None:
    described = [Descriptor(x, *layout) for x, layout in zip(operands, plan.layouts, strict=True)]
    panel = None if plan.panel is None else Descriptor(captures[plan.panel[0]], *plan.panel[1])
    stream = triton.runtime.driver.active.get_current_stream(plan.device)
    counter = _counter(plan.device, stream)
    lists = plan.fixed if plan.lister is None else plan.lister(captures)
    addresses = (counter if lse is None else lse, counter, lists, tuple(captures))
    plan.run(*described, panel, *addresses, *plan.numbers, stream=stream)


def _counter(device: int, stream: int) -> Tensor:
    """The next work item. Zero between launches: whoever takes the last item resets it."""
    # a graph brings its own, zeroed by one of its nodes
    return _zero(device) if torch.cuda.is_current_stream_capturing() else _kept_counter(device, stream)


@cache
def _kept_counter(device: int, stream: int) -> Tensor:
    """One for each stream, made by another thread: this one's memory may be a pool's that belongs to a graph."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(_zero, device, wait=True).result()


def _zero(device: int, *, wait: bool = False) -> Tensor:
    made = torch.zeros(1, dtype=torch.int32, device=torch.device("cuda", device))
    if wait:
        torch.cuda.synchronize(device)
    return made


def loadable_keys(key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Key and value as TMA can load them: of float8 keys in whole fours, and value with its columns contiguous."""
    if not is_float8(key.dtype):
        return loadable(key), loadable(value)
    *batch, keys, width = key.shape
    if keys % 4:
        # what is beyond the last key is masked, whatever it is
        key = key.new_empty((*batch, -(-keys // 4) * 4, width)).narrow(-2, 0, keys).copy_(key)
    if not _is_loadable(value.mT):
        room = value.new_empty((*batch, value.shape[-1], -(-keys // 16) * 16))
        value = room.narrow(-1, 0, keys).copy_(value.mT).mT
    return loadable(key), value


def loadable(tensor: Tensor) -> Tensor:
    """The tensor as TMA can load it: aligned to 16 bytes along every dimension; a copy only where it is not."""
    if _is_loadable(tensor):
        return tensor
    return tensor.contiguous() if not tensor.is_contiguous() else tensor.clone()


def _is_loadable(tensor: Tensor) -> bool:
    return tensor.data_ptr() % 16 == 0 and _aligned(tensor.shape, tensor.stride(), 16 // tensor.dtype.itemsize)


@lru_cache(maxsize=4096)
def _aligned(shape: tuple[int, ...], strides: tuple[int, ...], step: int) -> bool:
    outer = zip(shape[:-1], strides[:-1], strict=True)
    return strides[-1] == 1 and all(size == 1 or (stride > 0 and stride % step == 0) for size, stride in outer)
