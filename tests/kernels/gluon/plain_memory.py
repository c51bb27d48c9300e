"""Memory of :mod:`tests.kernels.gluon.plain`: tensors, pointers, descriptors and rooms of shared memory."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.kernels.gluon.plain_turns import HERE

__all__ = ["Block", "Descriptor", "Pointer", "Room", "block", "fence", "nobody_wrote", "unfenced"]


class Block(Tensor):
    """A tensor that can be asked for a layout, which it does not have."""

    @property
    def type(self) -> Any:  # type: ignore[override]
        """What the body derives layouts from."""
        return SimpleNamespace(layout=None)

    def to(self, dtype: Any, bitcast: bool = False) -> Any:  # type: ignore[override]
        """Converted; bits that :class:`Carried` kept are of the type already."""
        return self if bitcast else Tensor.to(self, dtype.of if isinstance(dtype, Element) else dtype)


def block(tensor: Tensor | float) -> Any:
    """As a :class:`Block`."""
    return torch.as_tensor(tensor).as_subclass(Block)


# --- global memory ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Element:
    """The type of what a pointer points to."""

    of: torch.dtype

    def is_floating(self) -> bool:
        return self.of.is_floating_point

    def __eq__(self, other: object) -> bool:
        return self.of == (other.of if isinstance(other, Element) else other)

    def __hash__(self) -> int:
        return hash(self.of)


@dataclass(frozen=True)
class Pointer:
    """Elements of a tensor in memory, by their offsets."""

    memory: Tensor
    offset: Any = 0

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.memory, self.offset + offset)

    @property
    def dtype(self) -> Any:
        return SimpleNamespace(element_ty=Element(self.memory.dtype))


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


# --- shared memory ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Room:
    """Shared memory: a view of what was allocated."""

    view: Any

    @property
    def shape(self) -> list[int]:
        return list(self.view.shape)

    @property
    def dtype(self) -> Any:
        return self.view.dtype

    def index(self, place: Any) -> Any:
        found = self.view[int(place)]
        return found[0] if isinstance(found, list) else Room(found)

    def reshape(self, shape: Sequence[int]) -> Room:
        return Room(self.view.view(shape))

    def permute(self, order: Sequence[int]) -> Room:
        return Room(self.view.permute(order))

    def slice(self, start: int, length: int, dim: int) -> Room:
        return Room(self.view.narrow(dim, start, length))

    def read_as(self, dtype: torch.dtype, shape: Sequence[int], layout: object) -> Room:
        return Room(self.view.view(-1).view(dtype).view(shape))

    def load(self, layout: object) -> Any:
        return block(self.view.clone())

    def store(self, value: Tensor) -> None:
        assert list(value.shape) == self.shape, "a tile of another shape than its room"
        self.view.copy_(value)
        HERE.stored.add(_place(self))


def nobody_wrote(view: Tensor) -> None:
    """Makes shared memory what nobody wrote: no number."""
    view.view(torch.uint8).fill_(0xFF)


def _place(room: Room) -> int:
    return int(room.view.untyped_storage().data_ptr())


def fence() -> None:
    """Shows the copy engine and tensor cores what this partition stored."""
    HERE.stored.clear()


def unfenced(room: Room) -> bool:
    """Whether this partition stored something there that copies and products need not see yet."""
    return _place(room) in HERE.stored
