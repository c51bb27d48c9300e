"""The launches of a backward: sums of rows, then dQ, dK and dV, then captures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from attnfuse.derivative import pullback
from attnfuse.kernels.kernel import Residual
from attnfuse.kernels.rows import masking_band
from attnfuse.kernels.triton.differentiating import MOST_TURNS, Launches, Reduction, launches_of
from attnfuse.kernels.triton.launch import on_device, options_of, target_of
from attnfuse.kernels.triton.memory import Memory, capture_strides, memory_of
from attnfuse.kernels.triton.plan import BackwardPlan
from attnfuse.kernels.triton.planning import precision_of
from attnfuse.kernels.triton.tables import BackwardSchedules
from attnfuse.operands import Operands
from attnfuse.reference import Scope, evaluate, seed_of
from attnfuse.score import Capture
from attnfuse.spec import AttentionSpec
from attnfuse.target import Target

__all__ = ["Gradients", "Sums"]


@dataclass(frozen=True)
class Sums:
    """What the rows of a backward share, ``[*B, H, M]`` in float32; see :mod:`attnfuse.kernels.triton.backward`."""

    top: Tensor
    norm: Tensor
    delta: Tensor
    strange: Tensor
    sink: Tensor | None

    @property
    def read(self) -> tuple[tuple[Tensor, ...], Tensor]:
        """What the later launches take."""
        return (self.top, self.norm, self.delta), self.strange


@dataclass(frozen=True)
class Gradients:
    """One backward, ``residual`` with the forward's lse.

    ``needs`` says for query, key, value and each capture whether its gradient is asked for. ``schedules`` override
    the table's.
    """

    spec: AttentionSpec
    grad_out: Tensor
    operands: Operands
    needs: Sequence[bool]
    residual: Residual
    schedules: BackwardSchedules | None = None

    def run(self) -> tuple[Tensor | None, ...]:
        """The gradients, each in its operand's shape and dtype; None where it is not asked for."""
        with on_device(self.operands.query.device):
            sums = self._sums()
            query, ridden = self._of_rows(sums) if self.needs[0] else (None, None)
            key, value = self._of_keys(sums) if self.needs[1] or self.needs[2] else (None, None)
            found = [self._of_capture(slot, sums, ridden) for slot in range(len(self.needs) - 3)]
        return (query, key, value, *found)

    # --- what all launches share --------------------------------------------------------------------

    @cached_property
    def batch(self) -> tuple[int, ...]:
        """The batch sizes."""
        return tuple(self.operands.query.shape[:-3])

    @cached_property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """What bodies take as ``sizes``, no head being summed."""
        *_, b1 = (*self.batch, 1, 1)[:2]
        query, key, _ = self.operands.qkv
        return b1, query.shape[-3], query.shape[-2], key.shape[-2], 1

    @cached_property
    def heads(self) -> int:
        """Batches times query heads."""
        return math.prod(self.operands.query.shape[:-2])

    @cached_property
    def grad_lse(self) -> Tensor | None:
        """The gradient of the lse, as bodies read it: ``[*B, H, M]`` in float32, contiguous."""
        given = self.residual.grad_lse
        return None if given is None else given.to(torch.float32).contiguous()

    @cached_property
    def seed(self) -> Tensor | None:
        """Dropout's."""
        return seed_of(self.spec, self.operands.captures) if self.spec.dropout else None

    @cached_property
    def memories(self) -> tuple[Memory, ...]:
        """Of query, key, value and the captures that programs read."""
        return tuple(map(memory_of, (*self.operands.qkv, *self.operands.captures[: len(self.spec.captures)])))

    @cached_property
    def geometry(self) -> tuple[AttentionSpec, tuple[Memory, ...], tuple[int, ...]]:
        """What plans are made of: the spec, where its operands lie, and its sizes."""
        return self.spec, self.memories, self.operands.symbols

    @cached_property
    def compiled_for(self) -> tuple[Target, str]:
        """What plans are made for: the target, and the precision of products of float32."""
        query = self.operands.query
        return target_of(query.device), precision_of(query.dtype)

    @cached_property
    def launches(self) -> Launches:
        """The plans."""
        return launches_of(*self.geometry, tuple(self.needs), *self.compiled_for, self.schedules)

    @cached_property
    def scope(self) -> tuple[Any, ...]:
        """What programs read: captures, their strides, symbols."""
        named = tuple(x.detach() for x in self.operands.captures[: len(self.spec.captures)])
        return named, capture_strides(self.spec, self.memories[3:]), self.operands.symbols

    @cached_property
    def band(self) -> tuple[int, int]:
        """The offsets of the mask's band."""
        band = masking_band(self.spec, self.operands.symbols)
        return band.left or 0, band.right or 0

    def strides(self, tensor: Tensor) -> tuple[int, ...]:
        """Those a body takes for a tensor."""
        return memory_of(tensor).five()

    # --- launches -----------------------------------------------------------------------------------

    def _sums(self) -> Sums:
        from attnfuse.kernels.triton.backward import row_sums  # noqa: PLC0415 - Triton is imported when it is launched

        plan, residual = self.launches.sums, self.residual
        query, key, _ = self.operands.qkv
        shape = query.shape[:-1]
        top, norm, delta = (query.new_empty(shape, dtype=torch.float32) for _ in range(3))
        sink = torch.empty_like(top) if self.spec.sink is not None else None
        programs = -(-shape[-1] // plan.rows) * self.heads
        strange = query.new_empty(programs if plan.uncertain else 0, dtype=torch.int32)
        assert residual.lse is not None
        row_sums[(programs,)](
            query, key, residual.out, self.grad_out, residual.lse.contiguous(),
            self.grad_lse, top, norm, delta, sink, strange, self.scope,
            *map(self.strides, (query, key, residual.out, self.grad_out)), self.sizes, plan,
            **options_of(plan.schedule),
        )  # fmt: skip
        return Sums(top, norm, delta, strange.any().to(torch.int32) if plan.uncertain else strange, sink)

    def _of_rows(self, sums: Sums) -> tuple[Tensor, Tensor | None]:
        """The gradient of query, and of the captured tensor that rides along."""
        from attnfuse.kernels.triton.backward import rows_gradient  # noqa: PLC0415 - see _sums

        plan, rider, query = self.launches.rows, self.launches.rider, self.operands.query
        found = _like(query, self.batch, query.dtype)
        target = None if rider is None else self._room(*rider)
        rows_gradient[(-(-query.shape[-2] // plan.rows) * self.heads,)](
            *self.operands.qkv, self.grad_out, found, target, self._due(plan, sums), *sums.read, self.scope, self.seed,
            *map(self.strides, (*self.operands.qkv, self.grad_out, found)), self.sizes, self.band, plan,
            **options_of(plan.schedule),
        )  # fmt: skip
        return found, target

    def _of_keys(self, sums: Sums) -> tuple[Tensor | None, Tensor | None]:
        """The gradients of key and value, from one launch or from one each."""
        shared, apart = (self.operands.key, self.operands.value), self.launches.values
        key, value = (_like(x, self.batch, _sum_dtype(x, self.batch)) if need else None
                      for x, need in zip(shared, self.needs[1:3], strict=True))  # fmt: skip
        if apart is None:
            self._into_keys(self.launches.keys, key, value, sums)
        if apart is not None and key is not None:
            self._into_keys(self.launches.keys, key, None, sums)
        if apart is not None and value is not None:
            self._into_keys(apart, None, value, sums)
        pairs = zip((key, value), shared, strict=True)
        key, value = (x if x is None else x.sum_to_size(like.shape).to(like.dtype) for x, like in pairs)
        return key, value

    def _into_keys(self, plan: BackwardPlan, key: Tensor | None, value: Tensor | None, sums: Sums) -> None:
        """Launches what writes the gradients that there is room for."""
        from attnfuse.kernels.triton.backward import keys_gradient  # noqa: PLC0415 - see _sums

        heads = self.heads // plan.groups
        keys_gradient[(-(-self.operands.key.shape[-2] // plan.keys) * heads,)](
            *self.operands.qkv, self.grad_out, key, value, *sums.read, self.scope, self.seed,
            *map(self.strides, (*self.operands.qkv, self.grad_out)),
            *(None if x is None else self.strides(x) for x in (key, value)),
            self.sizes, self.band, plan, **options_of(plan.schedule),
        )  # fmt: skip

    # --- captures -----------------------------------------------------------------------------------

    def _of_capture(self, slot: int, sums: Sums, ridden: Tensor | None) -> Tensor | None:
        if not self.needs[3 + slot]:
            return None
        capture, rider = self.operands.captures[slot], self.launches.rider
        if ridden is not None and rider is not None and rider[0] == slot:
            scores: Tensor | None = _reduced(ridden, capture.shape)
        else:
            scores = self._through_scores(slot, sums)
        parts = [part for part in (scores, self._through_sink(slot, sums)) if part is not None]
        found = parts[0] if parts else torch.zeros_like(capture)
        for part in parts[1:]:
            found = found + part
        return found.to(capture.dtype)

    def _due(self, plan: BackwardPlan, sums: Sums) -> Tensor | None:
        """What the gradients of a row's logits sum to, ``[*B, H, M]``; None for zero, or where nobody asks."""
        if plan.reduce != "keys":
            return None
        of_lse, of_sink = self.grad_lse, sums.sink
        if of_sink is None:
            return of_lse
        return -of_sink if of_lse is None else of_lse - of_sink

    def _room(self, slot: int, reduction: Reduction) -> Tensor:
        """What a reduction writes: scores in the tensor's own type, sums in float32 if there is more to sum."""
        capture = self.operands.captures[slot]
        own = reduction.over == "heads" or reduction.shape == tuple(capture.shape)
        # whole tiles behind a mask are not visited
        masked = reduction.over == "heads" and (self.launches.rows.left or self.launches.rows.right)
        make = capture.new_zeros if masked else capture.new_empty
        return make(reduction.shape, dtype=capture.dtype if own else torch.float32)

    def _through_sink(self, slot: int, sums: Sums) -> Tensor | None:
        pulled = {} if self.spec.sink is None else pullback(self.spec.sink)
        if sums.sink is None or Capture(slot) not in pulled:
            return None
        scope = Scope.whole(replace(self.operands, key=self.operands.key[..., :1, :]))
        part = evaluate(pulled[Capture(slot)], replace(scope, weight=sums.sink.unsqueeze(-1)))
        return _reduced(part, self.operands.captures[slot].shape)

    def _through_scores(self, slot: int, sums: Sums) -> Tensor | None:
        """Summed over whole axes within a program, then over those that are left."""
        from attnfuse.kernels.triton.backward import captured_gradient  # noqa: PLC0415 - see _sums

        if slot not in self.launches.captured:
            return None
        plan, reduction = self.launches.captured[slot]
        _, _, rows, keys, _ = self.sizes
        row_tiles, key_tiles = -(-rows // plan.rows), -(-keys // plan.keys)
        tiles = {"heads": row_tiles * key_tiles, "keys": row_tiles, "rows": key_tiles}[reduction.over]
        target = self._room(slot, reduction)
        captured_gradient[(tiles * reduction.stays,)](
            *self.operands.qkv, self.grad_out, target, self._due(plan, sums), *sums.read, self.scope, self.seed,
            *map(self.strides, (*self.operands.qkv, self.grad_out)),
            (*self.sizes[:4], reduction.apart), self.band, reduction.turns, plan, **options_of(plan.schedule),
        )  # fmt: skip
        return _reduced(target, self.operands.captures[slot].shape)


def _like(operand: Tensor, batch: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Room for a gradient, laid out as ``[*B, M, H, D]``, with every batch of the query's."""
    heads, length, width = operand.shape[-3:]
    return operand.new_empty((*batch, length, heads, width), dtype=dtype).transpose(-3, -2)


def _sum_dtype(operand: Tensor, batch: Sequence[int]) -> torch.dtype:
    """Float32 where batches are still to be summed."""
    return operand.dtype if tuple(operand.shape[:-3]) == tuple(batch) else torch.float32


def _reduced(part: Tensor, shape: Sequence[int]) -> Tensor:
    """Summed to a shape: few heads as torch sums them, very many scores, whose terms cancel, in float64."""
    axes = [axis for axis, (have, want) in enumerate(zip(part.shape, shape, strict=True)) if have != want]
    if not axes:
        return part
    if len(axes) == 1 and part.shape[axes[0]] == 2:
        # torch's sum of a half type over an outer axis of two takes twice as long
        return torch.add(*part.split(1, axes[0]))
    if math.prod(part.shape[axis] for axis in axes) <= MOST_TURNS:
        return part.sum(axes, keepdim=True)
    return part.sum(axes, keepdim=True, dtype=torch.float64).to(torch.float32).expand(shape)
