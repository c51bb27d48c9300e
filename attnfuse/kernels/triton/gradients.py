"""The launches of a backward: sums of rows, then dQ, dK and dV, then captures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from attnfuse.derivative import pullback
from attnfuse.kernels.kernel import Residual
from attnfuse.kernels.rows import masking_band, skips_surely
from attnfuse.kernels.schedule import Schedule
from attnfuse.kernels.triton.launch import on_device, options_of
from attnfuse.kernels.triton.logit import logit_of
from attnfuse.kernels.triton.memory import Memory, capture_strides, memory_of
from attnfuse.kernels.triton.plan import BackwardPlan
from attnfuse.kernels.triton.planning import plan_of, precision_of
from attnfuse.kernels.triton.tables import Shape, backward_schedules
from attnfuse.reference import Scope, evaluate, seed_of
from attnfuse.score import Capture, Const, Expr, S, apply
from attnfuse.spec import AttentionSpec
from attnfuse.target import Target

__all__ = ["Gradients", "differentiable"]

ZERO = Const(0.0)


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
    """One backward; operands as in :mod:`attnfuse.spec`, ``residual`` with the forward's lse.

    ``needs`` says for query, key, value and each capture whether its gradient is asked for. ``schedules`` are those
    of dQ and of dK and dV.
    """

    spec: AttentionSpec
    grad_out: Tensor
    query: Tensor
    key: Tensor
    value: Tensor
    captures: Sequence[Tensor]
    symbols: Sequence[int]
    needs: Sequence[bool]
    residual: Residual
    schedules: tuple[Schedule, Schedule] | None = None

    def run(self) -> tuple[Tensor | None, ...]:
        """The gradients, each in its operand's shape and dtype; None where it is not asked for."""
        with on_device(self.query.device):
            sums = self._sums()
            query = self._of_rows(sums) if self.needs[0] else None
            key, value = self._of_keys(sums) if self.needs[1] or self.needs[2] else (None, None)
            found = [self._of_capture(slot, sums) for slot in range(len(self.needs) - 3)]
        return (query, key if self.needs[1] else None, value if self.needs[2] else None, *found)

    # --- what all launches share --------------------------------------------------------------------

    @cached_property
    def batch(self) -> tuple[int, ...]:
        """The batch sizes."""
        return tuple(self.query.shape[:-3])

    @cached_property
    def sizes(self) -> tuple[int, int, int, int, int]:
        """What bodies take as ``sizes``."""
        *_, b1 = (*self.batch, 1, 1)[:2]
        return b1, self.query.shape[-3], self.query.shape[-2], self.key.shape[-2], 1

    @cached_property
    def heads(self) -> int:
        """Batches times query heads."""
        return math.prod(self.query.shape[:-2])

    @cached_property
    def seed(self) -> Tensor | None:
        """Dropout's."""
        return seed_of(self.spec, self.captures) if self.spec.dropout else None

    @cached_property
    def memories(self) -> tuple[Memory, ...]:
        """Of query, key, value and the captures that programs read."""
        return tuple(map(memory_of, (self.query, self.key, self.value, *self.captures[: len(self.spec.captures)])))

    @cached_property
    def scope(self) -> tuple[Any, ...]:
        """What programs read: captures, their strides, symbols."""
        named = tuple(x.detach() for x in self.captures[: len(self.spec.captures)])
        return named, capture_strides(self.spec, self.memories[3:]), tuple(self.symbols)

    @cached_property
    def band(self) -> tuple[int, int]:
        """The offsets of the mask's band."""
        band = masking_band(self.spec, tuple(self.symbols))
        return band.left or 0, band.right or 0

    @cached_property
    def both(self) -> tuple[Schedule, Schedule]:
        """The schedules of dQ and of dK and dV."""
        if self.schedules is not None:
            return self.schedules
        width, value_width = (1 << (x.shape[-1] - 1).bit_length() for x in (self.query, self.value))
        banded = not masking_band(self.spec, tuple(self.symbols)).open
        shape = Shape(width, value_width, self.query.element_size(), banded, self.query.shape[-2])
        return backward_schedules(shape, crowded=any({"m", "n"} <= set(each.axes) for each in self.spec.captures))

    @property
    def small(self) -> Schedule:
        """That of sums over rows, which have little to do."""
        rows, _ = self.both
        return replace(rows, rows=min(rows.rows, 64), keys=min(rows.keys, 64), warps=4)

    @property
    def tiles(self) -> Schedule:
        """That of a sum over heads, of whole tiles of scores: nothing is pipelined, so they may be large."""
        rows, _ = self.both
        return replace(rows, rows=128, keys=64, warps=8, stages=2) if rows.rows >= 64 else rows

    def strides(self, tensor: Tensor) -> tuple[int, ...]:
        """Those a body takes for a tensor."""
        return memory_of(tensor).five()

    def plan(self, schedule: Schedule, captured: Expr | None = None, reduce: str = "") -> BackwardPlan:
        """The plan of one launch."""
        query, key, value, *captures = self.memories
        target, precision = Target.of(self.query.device), precision_of(self.query.dtype)
        symbols = tuple(self.symbols)
        base = plan_of(self.spec, query, key, value, tuple(captures), symbols, target, precision, schedule)
        rows, keys = self.query.shape[-2], self.key.shape[-2]
        surely = skips_surely(self.spec, rows, keys, self.symbols, training=True)
        return BackwardPlan(
            **{each.name: getattr(base, each.name) for each in fields(base)},
            masked_pulled_program=pullback(base.masked_program).get(S, ZERO),
            core_pulled_program=pullback(base.core_program).get(S, ZERO),
            captured_program=captured,
            even_rows=rows % schedule.rows == 0,
            uncertain=base.huge or not surely,
            reduce=reduce,
        )

    # --- launches -----------------------------------------------------------------------------------

    def _sums(self) -> Sums:
        from attnfuse.kernels.triton.backward import row_sums  # noqa: PLC0415 - Triton is imported when it is launched

        shape = self.query.shape[:-1]
        top, norm, delta = (self.query.new_empty(shape, dtype=torch.float32) for _ in range(3))
        sink = torch.empty_like(top) if self.spec.sink is not None else None
        plan = self.plan(self.small)
        programs = -(-shape[-1] // plan.rows) * self.heads
        strange = self.query.new_empty(programs if plan.uncertain else 0, dtype=torch.int32)
        assert self.residual.lse is not None
        grad_lse = self.residual.grad_lse
        row_sums[(programs,)](
            self.query, self.key, self.residual.out, self.grad_out, self.residual.lse.contiguous(),
            None if grad_lse is None else grad_lse.to(torch.float32).contiguous(), top, norm, delta, sink, strange,
            self.scope,
            *map(self.strides, (self.query, self.key, self.residual.out, self.grad_out)), self.sizes, plan,
            **options_of(plan.schedule),
        )  # fmt: skip
        return Sums(top, norm, delta, strange.any().to(torch.int32), sink)

    def _of_rows(self, sums: Sums) -> Tensor:
        from attnfuse.kernels.triton.backward import rows_gradient  # noqa: PLC0415 - see _sums

        plan, found = self.plan(self.both[0]), _like(self.query, self.batch, self.query.dtype)
        rows_gradient[(-(-self.query.shape[-2] // plan.rows) * self.heads,)](
            self.query, self.key, self.value, self.grad_out, found, *sums.read, self.scope, self.seed,
            *map(self.strides, (self.query, self.key, self.value, self.grad_out, found)), self.sizes, self.band, plan,
            **options_of(plan.schedule),
        )  # fmt: skip
        return found

    def _of_keys(self, sums: Sums) -> tuple[Tensor, Tensor]:
        from attnfuse.kernels.triton.backward import keys_gradient  # noqa: PLC0415 - see _sums

        plan = self.plan(self.both[1])
        found = [_like(x, self.batch, _sum_dtype(x, self.batch)) for x in (self.key, self.value)]
        heads = self.heads // plan.groups
        keys_gradient[(-(-self.key.shape[-2] // plan.keys) * heads,)](
            self.query, self.key, self.value, self.grad_out, *found, *sums.read, self.scope, self.seed,
            *map(self.strides, (self.query, self.key, self.value, self.grad_out, *found)), self.sizes, self.band, plan,
            **options_of(plan.schedule),
        )  # fmt: skip
        pairs = zip(found, (self.key, self.value), strict=True)
        key, value = (grad.sum_to_size(operand.shape).to(operand.dtype) for grad, operand in pairs)
        return key, value

    def _of_capture(self, slot: int, sums: Sums) -> Tensor | None:
        if not self.needs[3 + slot]:
            return None
        parts = [
            part for part in (self._through_scores(slot, sums), self._through_sink(slot, sums)) if part is not None
        ]
        found = parts[0] if parts else torch.zeros_like(self.captures[slot])
        for part in parts[1:]:
            found = found + part
        return found.to(self.captures[slot].dtype)

    def _through_sink(self, slot: int, sums: Sums) -> Tensor | None:
        pulled = {} if self.spec.sink is None else pullback(self.spec.sink)
        if sums.sink is None or Capture(slot) not in pulled:
            return None
        scope = Scope.whole(self.query, self.key[..., :1, :], self.captures, self.symbols)
        part = evaluate(pulled[Capture(slot)], replace(scope, weight=sums.sink.unsqueeze(-1)))
        return _reduced(part, self.captures[slot].shape)

    def _through_scores(self, slot: int, sums: Sums) -> Tensor | None:
        """Summed over whole axes within a program, then over those that are left."""
        from attnfuse.kernels.triton.backward import captured_gradient  # noqa: PLC0415 - see _sums

        base = self.plan(self.small)
        pulled = pullback(base.masked_program)
        if Capture(slot) not in pulled:
            return None
        capture, axes = self.captures[slot], set(self.spec.captures[slot].axes)
        rows, keys = self.query.shape[-2], self.key.shape[-2]
        reduce = "heads" if {"m", "n"} <= axes else "rows" if "n" in axes else "keys"
        stays, reduced, apart, lead = (
            self._split(axes) if reduce == "heads" else (self.heads, 1, 1, self.query.shape[:-2])
        )
        program = apply("mul", Const(base.factor), pulled[Capture(slot)])
        plan = self.plan(self.tiles if reduce == "heads" else self.small, program, reduce)
        row_tiles, key_tiles = -(-rows // plan.rows), -(-keys // plan.keys)
        grids = {"heads": row_tiles * key_tiles * stays, "keys": row_tiles * stays, "rows": key_tiles * stays}
        shape = (*lead, *{"heads": (rows, keys), "keys": (rows, 1), "rows": (1, keys)}[reduce])
        target = capture.new_empty(shape, dtype=capture.dtype if shape == capture.shape else torch.float32)
        captured_gradient[(grids[reduce],)](
            self.query, self.key, self.value, self.grad_out, target, *sums.read, self.scope, self.seed,
            *map(self.strides, (self.query, self.key, self.value, self.grad_out)), (*self.sizes[:4], apart), self.band,
            reduced, plan, **options_of(plan.schedule),
        )  # fmt: skip
        return _reduced(target, capture.shape)

    def _split(self, axes: set[str]) -> tuple[int, int, int, tuple[int, ...]]:
        """How many heads stay and are summed, of ``[outer, summed, apart]``; ``apart``; the shape that stays."""
        names, extents = self.spec.axes[:-2], tuple(self.query.shape[:-2])
        absent = [place for place, name in enumerate(names) if name not in axes]
        # only neighbours are summed within a program
        if absent and absent == list(range(absent[0], absent[-1] + 1)):
            apart = math.prod(extents[absent[-1] + 1 :])
            reduced = math.prod(extents[place] for place in absent)
            lead = tuple(1 if place in absent else extent for place, extent in enumerate(extents))
            return self.heads // reduced, reduced, apart, lead
        return self.heads, 1, 1, extents


def _like(operand: Tensor, batch: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Room for a gradient, laid out as ``[*B, M, H, D]``, with every batch of the query's."""
    heads, length, width = operand.shape[-3:]
    return operand.new_empty((*batch, length, heads, width), dtype=dtype).transpose(-3, -2)


def _sum_dtype(operand: Tensor, batch: Sequence[int]) -> torch.dtype:
    """Float32 where batches are still to be summed."""
    return operand.dtype if tuple(operand.shape[:-3]) == tuple(batch) else torch.float32


def _reduced(part: Tensor, shape: Sequence[int]) -> Tensor:
    """Summed to a shape; a sum over very many scores, whose terms cancel, in float64."""
    axes = [axis for axis, (have, want) in enumerate(zip(part.shape, shape, strict=True)) if have != want]
    return part.sum(axes, keepdim=True, dtype=torch.float64).to(torch.float32).expand(shape) if axes else part


def differentiable(spec: AttentionSpec) -> tuple[Expr, ...]:
    """The programs that a backward runs, for asking whether they have a text."""
    logits = (logit_of(spec), logit_of(spec, rows_kept=True))
    pulled = (pullback(program) for logit in logits for program in (logit.masked, logit.core))
    return tuple(dict.fromkeys(program for each in pulled for program in each.values()))
