"""Barriers and copies of :mod:`tests.kernels.gluon.plain`: what a partition sees of the others.

A copy into shared memory lands when its barrier is waited for, at the last moment; until then there is no number. One
out of shared memory reads it when the partition waits for that, at the last moment too.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.kernels.gluon.plain_memory import Descriptor, Room, nobody_wrote, unfenced
from tests.kernels.gluon.plain_turns import HERE, others_first, until

__all__ = ["Barrier", "add", "allocate", "arrive", "expect", "init", "read", "store_wait", "wait", "write"]


@dataclass(eq=False)
class Barrier:
    """Complete when so many have arrived and all bytes have landed; then the next phase begins."""

    count: int = 0
    missing: int = 0
    landing: int = 0
    phase: int = 0
    copies: list[Callable[[], None]] = field(default_factory=list)

    def moved(self, arrivals: int, landing: int) -> None:
        self.missing -= arrivals
        self.landing += landing
        assert self.missing >= 0, "more arrivals than a phase has"
        if self.missing == 0 and self.landing == 0:
            self.phase, self.missing = self.phase + 1, self.count

    def passed(self, parity: int) -> bool:
        """Whether the phase of a parity is complete, or is so now that its copies land."""
        while self.phase % 2 == parity and self.copies:
            self.copies.pop(0)()
        return self.phase % 2 != parity


def allocate(dtype: torch.dtype, shape: Sequence[int], layout: object) -> Room:
    if layout == "barriers":
        made = [[Barrier()] for _ in range(shape[0])]
        HERE.barriers += [bar for (bar,) in made]
        return Room(made)
    room = torch.zeros(list(shape), dtype=dtype)
    nobody_wrote(room)
    return Room(room)


def init(bar: Barrier, count: int) -> None:
    bar.count = bar.missing = count


def wait(bar: Barrier, parity: Any) -> None:
    wanted = int(parity)
    until(lambda: bar.passed(wanted))


def arrive(bar: Barrier, count: int) -> None:
    bar.moved(count, 0)
    others_first()


def expect(bar: Barrier, size: int) -> None:
    bar.moved(1, size)
    others_first()


def read(desc: Descriptor, at: Sequence[Any], bar: Barrier, room: Room) -> None:
    part, where = desc.window(at)

    def land() -> None:
        room.view.view(torch.uint8).zero_()
        room.view[where].copy_(part)
        bar.moved(0, -desc.block_type.nbytes)

    nobody_wrote(room.view)
    bar.copies.append(land)
    others_first()


def write(desc: Descriptor, at: Sequence[Any], room: Room) -> None:
    _leave(desc, at, room, lambda part, found: part.copy_(found))


def add(desc: Descriptor, at: Sequence[Any], room: Room) -> None:
    """As :func:`write`, added to what is there."""
    _leave(desc, at, room, lambda part, found: part.add_(found))


def _leave(desc: Descriptor, at: Sequence[Any], room: Room, put: Callable[[Tensor, Tensor], object]) -> None:
    assert not unfenced(room), "a copy of what no fence has shown it"
    part, where = desc.window(at)
    HERE.leaving.append(lambda: put(part, room.view[where]))


def store_wait(pending: int) -> None:
    others_first()
    while len(HERE.leaving) > pending:
        HERE.leaving.pop(0)()
