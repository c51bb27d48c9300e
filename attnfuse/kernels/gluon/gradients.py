"""The launches of a backward on Hopper: sums of rows; dQ, dK and dV in one body; captures as in Triton's backward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import triton
from torch import Tensor

from attnfuse.kernels.gluon.backward import WARPS
from attnfuse.kernels.gluon.backward_plan import BackwardPlan, backward_planned, layout_of, padded
from attnfuse.kernels.gluon.finish import finish
from attnfuse.kernels.gluon.launch import Descriptor, loadable
from attnfuse.kernels.triton.differentiating import Launches, launches_of
from attnfuse.kernels.triton.gradients import Gradients, Sums
from attnfuse.kernels.triton.launch import on_device

__all__ = ["HopperGradients"]


@dataclass(frozen=True)
class HopperGradients(Gradients):
    """As :class:`Gradients`, with the products of query, key and value in :mod:`attnfuse.kernels.gluon.backward`."""

    def run(self) -> tuple[Tensor | None, ...]:
        """The gradients, each in its operand's shape and dtype; None where it is not asked for."""
        with on_device(self.operands.query.device):
            sums = self._sums()
            found: list[Tensor | None] = [None, None, None]
            panel: tuple[int, Tensor] | None = None
            if any(self.needs[:3]):
                found, panel = self._of_operands(sums)
            found += [self._of(slot, sums, panel) for slot in range(len(self.needs) - 3)]
        return tuple(grad if need else None for grad, need in zip(found, self.needs, strict=True))

    @cached_property
    def launches(self) -> Launches:
        """Those of sums and of captures: query's gradient has a body of its own, with which none of them rides."""
        return launches_of(*self.geometry, (False, *self.needs[1:]), *self.compiled_for)

    def _of_operands(self, sums: Sums) -> tuple[list[Tensor | None], tuple[int, Tensor] | None]:
        """The gradients of query, key and value; and of the panel, where it is that of the scores."""
        originals = self.operands.qkv
        read = [loadable(_four(x)) for x in (*originals, self.grad_out)]
        plan = backward_planned(self, read)
        query, key, value = map(_room, read[:3])
        # blocks add to it
        added = query.new_zeros(plan.added, dtype=torch.float32)
        panel = _panel_room(plan, self.operands.captures)
        _launch(plan, read, added, panel, (key, value), sums, self.operands.captures)
        _finish(plan, added, query)
        found = [x if like.dim() == 4 else x[0] for x, like in zip((query, key, value), originals, strict=True)]
        return list(found), panel

    def _of(self, slot: int, sums: Sums, panel: tuple[int, Tensor] | None) -> Tensor | None:
        """The gradient of a capture: the panel's through scores is there already."""
        if panel is None or panel[0] != slot:
            return self._of_capture(slot, sums, None)
        sunk = self._through_sink(slot, sums)
        return panel[1] if sunk is None else (panel[1] + sunk).to(panel[1].dtype)


def _panel_room(plan: BackwardPlan, captures: Sequence[Tensor]) -> tuple[int, Tensor] | None:
    """Which capture is the panel whose gradient the body makes, and room for it; zeros where it leaves tiles out."""
    if plan.panel is None or not plan.gradient:
        return None
    like = captures[plan.panel[0]]
    make = like.new_empty if plan.visited else like.new_zeros
    return plan.panel[0], make(like.shape)


def _launch(
    plan: BackwardPlan,
    read: Sequence[Tensor],
    added: Tensor,
    gradient: tuple[int, Tensor] | None,
    written: Sequence[Tensor],
    sums: Sums,
    captures: Sequence[Tensor],
) -> None:
    tensors = [Descriptor(x, *layout) for x, layout in zip((*read, added, *written), plan.layouts, strict=True)]
    vectors = [Descriptor(x, (x.numel(),), (1,)) for x in map(_padded, (sums.top, sums.norm, sums.delta))]
    panel = None if plan.panel is None else Descriptor(captures[plan.panel[0]], *plan.panel[1])
    dpanel = None if gradient is None else Descriptor(gradient[1], *layout_of(gradient[1]))
    stream = triton.runtime.driver.active.get_current_stream(plan.device)
    given = tuple(captures[: plan.captures])
    others = (dpanel, sums.strange, _lists(plan, given), given)
    plan.run(*tensors[:4], *vectors, panel, *tensors[4:], *others, *plan.numbers, stream=stream)


def _lists(plan: BackwardPlan, captures: Sequence[Tensor]) -> Tensor | None:
    """The lists of tiles: ids may have changed in place since the forward made its own."""
    if plan.lister is None or plan.fixed is not None:
        return plan.fixed
    return plan.lister([x if x.data_ptr() % 16 == 0 else x.clone() for x in captures])


def _finish(plan: BackwardPlan, added: Tensor, target: Tensor) -> None:
    _, heads, rows, width = target.shape
    tile, block = plan.tile
    programs = added.numel() // (tile * block)
    finish[(programs,)](
        added, target, heads, rows, *target.stride()[:3], plan.factor, tile, block, width, WARPS.value, num_warps=8
    )


def _four(tensor: Tensor) -> Tensor:
    return tensor if tensor.dim() == 4 else tensor[None]


def _padded(sums: Tensor) -> Tensor:
    more = padded(sums.shape[-1]) - sums.shape[-1]
    return torch.nn.functional.pad(sums, (0, more)) if more else sums


def _room(like: Tensor) -> Tensor:
    """Room for a gradient, laid out as ``[B, M, H, D]``."""
    batch, heads, rows, width = like.shape
    return like.new_empty((batch, rows, heads, width)).transpose(1, 2)
