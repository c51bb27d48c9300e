"""Inputs that make a wrong rewrite visible: masked rows, finite fills, large logits, ties, odd ids."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.fx import Node

from attnfuse.graph import facts
from attnfuse.reference import is_float8

__all__ = ["GRADIENT_FREE", "TRIALS", "Mask", "Trial", "draw"]

#: What may be an additive mask, and then whether its rows may be -inf throughout: rows that keep no key.
Mask = Literal["none", "finite", "any"]

#: Makes a tensor of a shape and dtype; the generator is the certificate's.
Trial = Callable[[tuple[int, ...], torch.dtype, torch.Generator], Tensor]


def draw(
    node: Node, shape: tuple[int, ...] | None, mask: Mask, trial: Trial, generator: torch.Generator
) -> Tensor | int:
    """A value for one input, of ``shape`` or else of the shape it was traced with.

    ``mask`` says which additive mask it may be; query, key and value are none.
    """
    if not facts.is_tensor(node):
        return facts.hint_of(node)
    shape = facts.hint(node) if shape is None else shape
    made = _AS_MASK[mask].get(trial, trial)
    dtype = facts.dtype(node)
    # torch computes no float8, and draws on the CPU are the same values on every device
    drawn = made(shape, torch.float32 if is_float8(dtype) else dtype, generator)
    return drawn.to(device=facts.tensor(node).device, dtype=dtype)


def _plain(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Standard normal floats, fair coins, small ids. A lone float is positive: a root may be taken of a scale."""
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.7
    if not dtype.is_floating_point:
        return torch.randint(0, 3, shape, generator=generator).to(dtype)
    found = torch.randn(shape, generator=generator).to(dtype)
    return found if shape else found.abs()


def _loud(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Logits far apart: a softmax that is nearly a choice."""
    found = _plain(shape, dtype, generator)
    return found * 6 if dtype.is_floating_point else found


def _rows_of(value: int) -> Trial:
    """Whole rows masked, ids all equal: what padding does. A mask may say with 0 or with 1 what is to be dropped."""

    def trial(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
        found = _plain(shape, dtype, generator)
        if found.dim() and not dtype.is_floating_point:
            found[..., : (shape[-1] + 1) // 2] = value
            found[:1] = value
        return found

    return trial


def _filled(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """As plain, but what may be an additive mask holds the lowest finite value, or zero."""
    return _plain(shape, dtype, generator)


def _with_fills(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Some numbers of each row are filled, and some rows throughout: those weigh all keys equally."""
    if not dtype.is_floating_point:
        return _plain(shape, dtype, generator)
    drop = (torch.rand(shape, generator=generator) < 0.5) | _whole_rows(shape)
    return torch.zeros(shape, dtype=dtype).masked_fill(drop, torch.finfo(dtype).min)


def _with_empty_rows(shape: tuple[int, ...], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """As loud, but some rows keep no key."""
    found = _loud(shape, dtype, generator)
    return found.masked_fill(_whole_rows(shape), float("-inf")) if dtype.is_floating_point else found


def _whole_rows(shape: tuple[int, ...]) -> Tensor:
    """Every fourth row ``[..., M, 1]``; none where there is but one, which would leave nothing else to see."""
    leading = shape[:-1]
    every = torch.arange(math.prod(leading)) % 4 == 1
    return every.reshape([*leading, *[1] * len(shape[-1:])])


#: What is drawn instead of a trial for what may be a mask. Rows without keys are in a trial that asks for no gradient.
_AS_MASK: dict[Mask, dict[Trial, Trial]] = {
    "none": {},
    "finite": {_filled: _with_fills},
    "any": {_filled: _with_fills, _loud: _with_empty_rows},
}

#: What every site is tried with, by name.
TRIALS: tuple[tuple[str, Trial], ...] = (
    ("plain", _plain),
    ("loud", _loud),
    ("masked", _rows_of(0)),
    ("masked by ones", _rows_of(1)),
    ("filled", _filled),
)

#: Trials that say nothing of gradients.
GRADIENT_FREE: tuple[Trial, ...] = (_loud,)
