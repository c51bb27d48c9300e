"""The part of a kernel language that program texts use, in torch: pointers into flat memory, loads, arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Pointer:
    """An address in a tensor's storage, or a tensor of them."""

    memory: Tensor
    offset: Tensor | int = 0

    def __add__(self, more: Tensor | int) -> Pointer:
        return Pointer(self.memory, self.offset + more)


class TorchLanguage:
    """``tl``, as far as :mod:`attnfuse.kernels.triton.text` writes it."""

    float32, int64 = torch.float32, torch.int64
    exp, exp2, log, sqrt, rsqrt = torch.exp, torch.exp2, torch.log, torch.sqrt, torch.rsqrt
    abs, floor, ceil, erf, sin, cos = torch.abs, torch.floor, torch.ceil, torch.erf, torch.sin, torch.cos

    @staticmethod
    def where(condition: Tensor | bool, kept: object, other: object) -> Tensor:
        return torch.where(torch.as_tensor(condition), *map(_tensor, (kept, other)))

    @staticmethod
    def load(pointer: Pointer) -> Tensor:
        return pointer.memory[torch.as_tensor(pointer.offset)]


def _tensor(value: object) -> Tensor:
    return value if isinstance(value, Tensor) else torch.tensor(value)


def pointer(tensor: Tensor) -> Pointer:
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    return Pointer(tensor.as_strided((size,), (1,), 0))
