"""The launches of a backward on Hopper: sums of rows; dQ, dK and dV in one body; captures as in Triton's backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import triton
from torch import Tensor

from attnfuse.kernels.gluon.backward import WARPS
from attnfuse.kernels.gluon.backward_plan import BackwardPlan, backward_planned, padded
from attnfuse.kernels.gluon.finish import finish
from attnfuse.kernels.gluon.launch import Descriptor
from attnfuse.kernels.triton.differentiating import Launches, launches_of
from attnfuse.kernels.triton.gradients import Gradients, Sums
from attnfuse.kernels.triton.launch import on_device
from attnfuse.kernels.triton.memory import memory_of

__all__ = ["HopperGradients"]


@dataclass(frozen=True)
class HopperGradients(Gradients):
    """As :class:`Gradients`, with the products of query, key and value in :mod:`attnfuse.kernels.gluon.backward`."""

    def run(self) -> tuple[Tensor | None, ...]:
        """The gradients, each in its operand's shape and dtype; None where it is not asked for."""
        with on_device(self.query.device):
            sums = self._sums()
            found: list[Tensor | None] = [None, None, None]
            if any(self.needs[:3]):
                found = list(self._of_operands(sums))
            found += [self._of_capture(slot, sums, None) for slot in range(len(self.needs) - 3)]
        return tuple(grad if need else None for grad, need in zip(found, self.needs, strict=True))

    @cached_property
    def launches(self) -> Launches:
        """Those of sums and of captures: query's gradient has a body of its own, with which none of them rides."""
        return launches_of(*self.geometry, (False, *self.needs[1:]), *self.compiled_for)

    def _of_operands(self, sums: Sums) -> tuple[Tensor, ...]:
        originals = self.query, self.key, self.value
        read = [_loadable(_four(x)) for x in (*originals, self.grad_out)]
        plan = backward_planned(self, read)
        query, key, value = map(_room, read[:3])
        # blocks add to it
        added = query.new_zeros(plan.added, dtype=torch.float32)
        _launch(plan, read, added, (key, value), sums, self.captures)
        _finish(plan, added, query)
        found = (x if like.dim() == 4 else x[0] for x, like in zip((query, key, value), originals, strict=True))
        return tuple(found)


def _launch(
    plan: BackwardPlan,
    read: Sequence[Tensor],
    added: Tensor,
    written: Sequence[Tensor],
    sums: Sums,
    captures: Sequence[Tensor],
) -> None:
    tensors = [Descriptor(x, *layout) for x, layout in zip((*read, added, *written), plan.layouts, strict=True)]
    vectors = [Descriptor(x, (x.numel(),), (1,)) for x in map(_padded, (sums.top, sums.norm, sums.delta))]
    panel = None if plan.panel is None else Descriptor(captures[plan.panel[0]], *plan.panel[1])
    stream = triton.runtime.driver.active.get_current_stream(plan.device)
    strange = (sums.strange, tuple(captures[: plan.captures]))
    plan.run(*tensors[:4], *vectors, panel, *tensors[4:], *strange, *plan.numbers, stream=stream)


def _finish(plan: BackwardPlan, added: Tensor, target: Tensor) -> None:
    _, heads, rows, width = target.shape
    tile, block = plan.tile
    programs = added.numel() // (tile * block)
    finish[(programs,)](
        added, target, heads, rows, *target.stride()[:3], plan.factor, tile, block, width, WARPS.value, num_warps=8
    )


def _four(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() == 4 else tensor[None]


def _loadable(tensor: Tensor) -> Tensor:
    """The tensor as TMA can load it; a copy only where it cannot."""
    if memory_of(tensor).describable("d", tensor.shape[:-3]):
        return tensor
    return tensor.contiguous() if not tensor.is_contiguous() else tensor.clone()


def _padded(sums: Tensor) -> Tensor:
    more = padded(sums.shape[-1]) - sums.shape[-1]
    return torch.nn.functional.pad(sums, (0, more)) if more else sums


def _room(like: Tensor) -> Tensor:
    """Room for a gradient, laid out as ``[B, M, H, D]``."""
    batch, heads, rows, width = like.shape
    return like.new_empty((batch, rows, heads, width)).transpose(1, 2)
