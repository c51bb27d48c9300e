"""Memory, barriers and copies of :mod:`tests.kernels.gluon.plain`: what a partition sees of the others."""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "CHANGED", "FAILURES", "Barrier", "Block", "Descriptor", "Pointer", "Room", "allocate", "block", "init", "read",
    "wait", "write",
]  # fmt: skip

#: Seconds after which a thread waits for a phase that never comes.
PATIENCE = 60.0
CHANGED = threading.Condition()
#: Of the partitions that run: when one fails, the others stop waiting for it.
FAILURES: list[BaseException] = []


class Block(Tensor):
    """A tensor that can be asked for a layout, which it does not have."""

    @property
    def type(self) -> Any:  # type: ignore[override]
        """What the body derives layouts from."""
        return SimpleNamespace(layout=None)

    def to(self, dtype: torch.dtype, bitcast: bool = False) -> Any:  # type: ignore[override]
        """Converted; bits that :class:`Carried` kept are of the type already."""
        return self if bitcast else Tensor.to(self, dtype)


def block(tensor: Tensor | float) -> Any:
    """As a :class:`Block`."""
    return torch.as_tensor(tensor).as_subclass(Block)


# --- memory -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pointer:
    """Elements of a tensor in memory, by their offsets."""

    memory: Tensor
    offset: Any = 0

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.offset + offset)


@dataclass(frozen=True)
class Descriptor:
    """A tensor in memory, and the tile that a copy of it has."""

    memory: Tensor
    tile: tuple[int, ...]

    @property
    def dtype(self) -> torch.dtype:
        """Of the elements."""
        return self.memory.dtype

    @property
    def layout(self) -> Any:
        """What the body derives another layout from."""
        return SimpleNamespace(swizzle_byte_width=128)

    @property
    def block_type(self) -> Any:
        """The tile as the body asks for it."""
        return SimpleNamespace(shape=list(self.tile), nbytes=math.prod(self.tile) * self.memory.dtype.itemsize)

    def window(self, at: Sequence[Any]) -> tuple[Tensor, tuple[slice, ...]]:
        """The part of the tile at ``at`` that is in memory, and where in the tile that is."""
        spans = [
            (max(int(a), 0), min(int(a) + n, size)) for a, n, size in zip(at, self.tile, self.memory.shape, strict=True)
        ]
        part = self.memory[tuple(slice(start, max(stop, start)) for start, stop in spans)]
        return part, tuple(slice(0, size) for size in part.shape)


@dataclass(frozen=True)
class Room:
    """Shared memory: a view of what was allocated."""

    view: Any

    @property
    def shape(self) -> list[int]:
        return list(self.view.shape)

    def index(self, place: Any) -> Any:
        found = self.view[int(place)]
        return found[0] if isinstance(found, list) else Room(found)

    def reshape(self, shape: Sequence[int]) -> Room:
        return Room(self.view.view(shape))

    def permute(self, order: Sequence[int]) -> Room:
        return Room(self.view.permute(order))

    def _reinterpret(self, dtype: torch.dtype, shape: Sequence[int], layout: object) -> Room:
        return Room(self.view.view(-1).view(dtype).view(shape))

    def load(self, layout: object) -> Any:
        return block(self.view.clone())

    def store(self, value: Tensor) -> None:
        self.view.copy_(value)


def allocate(dtype: torch.dtype, shape: Sequence[int], layout: object) -> Room:
    if layout == "barriers":
        return Room([[Barrier()] for _ in range(shape[0])])
    # what nobody wrote is no number
    made = torch.zeros(list(shape), dtype=dtype)
    return Room(made.view(torch.uint8).fill_(0xFF).view(dtype))


# --- barriers and copies ----------------------------------------------------------------------------


@dataclass(eq=False)
class Barrier:
    """Complete when so many have arrived and all bytes have landed; then the next phase begins."""

    count: int = 0
    missing: int = 0
    landing: int = 0
    phase: int = 0

    def moved(self, arrivals: int, landing: int) -> None:
        with CHANGED:
            self.missing -= arrivals
            self.landing += landing
            assert self.missing >= 0, "more arrivals than a phase has"
            if self.missing == 0 and self.landing == 0:
                self.phase, self.missing = self.phase + 1, self.count
            CHANGED.notify_all()


def init(bar: Barrier, count: int) -> None:
    bar.count = bar.missing = count


def wait(bar: Barrier, parity: Any) -> None:
    with CHANGED:
        assert CHANGED.wait_for(lambda: FAILURES or bar.phase % 2 != int(parity), PATIENCE), "a phase never comes"
        assert not FAILURES, "another partition failed"


def read(desc: Descriptor, at: Sequence[Any], bar: Barrier, room: Room) -> None:
    part, where = desc.window(at)
    room.view.view(torch.uint8).zero_()
    room.view[where].copy_(part)
    bar.moved(0, -desc.block_type.nbytes)


def write(desc: Descriptor, at: Sequence[Any], room: Room) -> None:
    part, where = desc.window(at)
    part.copy_(room.view[where])
