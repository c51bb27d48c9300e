"""How a tensor lies in memory, as a value: what launches are planned by, and remembered under."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from attnfuse.axes import Minor
from attnfuse.spec import AttentionSpec

__all__ = ["Memory", "capture_strides", "memory_of"]

#: Bytes that addresses and steps of a descriptor's tiles are multiples of.
STEP = 16


class Memory(NamedTuple):
    """Shape, strides in elements, dtype, and whether the address is a multiple of :data:`STEP` bytes."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    dtype: torch.dtype
    aligned: bool

    def five(self) -> tuple[int, ...]:
        """Strides of ``[b0, b1, h, m, d]``; zero where a batch axis is missing or broadcast."""
        outer = [0 if size == 1 else stride for size, stride in zip(self.shape[:-3], self.strides, strict=False)]
        return (*outer, *[0] * (2 - len(outer)), *self.strides[-3:])

    @property
    def minor(self) -> Minor:
        """Which of the last two dimensions is contiguous."""
        return "n" if self.strides[-1] != 1 and self.strides[-2] == 1 else "d"

    def describable(self, minor: str, batch: Sequence[int]) -> bool:
        """Whether a descriptor can load its tiles: the innermost axis dense, the others in steps of 16 bytes."""
        inner = len(self.shape) - (1 if minor == "d" else 2)
        others = [s for place, s in enumerate(self.strides) if place != inner and self.shape[place] > 1]
        steps = all(stride > 0 and stride * self.dtype.itemsize % STEP == 0 for stride in others)
        return self.aligned and steps and self.strides[inner] == 1 and self.shape[:-3] == tuple(batch)

    def described(self, minor: str, keys: int, padded: int) -> tuple[list[int], list[int], list[int]]:
        """Shape, strides and tile of its descriptor, of rank 4 at least."""
        missing, step = max(4 - len(self.shape), 0), STEP // self.dtype.itemsize
        shape = [1] * missing + list(self.shape)
        # steps of axes of one element must be multiples of 16 bytes too
        strides = [step] * missing
        strides += [stride if size > 1 else step for size, stride in zip(self.shape, self.strides, strict=True)]
        block = [keys, padded]
        if minor == "n":
            shape[-2:], strides[-2:], block = shape[:-3:-1], strides[:-3:-1], block[::-1]
        strides[-1] = 1
        return shape, strides, [1] * (len(shape) - 2) + block


def memory_of(tensor: Tensor) -> Memory:
    """Of a tensor."""
    return Memory(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.data_ptr() % STEP == 0)


def capture_strides(spec: AttentionSpec, captures: Sequence[Memory]) -> tuple[int, ...]:
    """What a program's text calls ``strides``; zero along an axis that broadcasts."""
    return tuple(
        0 if memory.shape[place] == 1 else memory.strides[place]
        for memory, captured in zip(captures, spec.captures, strict=False)
        for place, axis in enumerate(spec.axes)
        if axis in captured.axes
    )
