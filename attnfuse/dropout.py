"""Dropout as a pure function of a seed and a position, so that every kernel and its backward draw the same mask.

The bits of one weight are ``finish(row(seed, *b, h, m) ^ column(n))``: the two keys pass through
SplitMix64's mixer (Steele, Lea, Flood 2014), their exclusive or through one multiply and two shifts of
the same. Nothing depends on how the scores are cut into blocks. The stream is not torch's.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

__all__ = ["kept"]

# SplitMix64's increment and multipliers, as signed 64-bit integers
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64
_BITS = 31


def kept(seed: Tensor, probability: float, indices: Sequence[Tensor]) -> Tensor:
    """The weights that dropout keeps, each with chance ``1 - probability``.

    ``seed`` is an int64 tensor of one element; ``indices`` are the int64 indices of the scores, one for
    each axis, broadcasting against each other, keys last. Returns bool in their broadcast shape.
    """
    row = seed.reshape(())
    for index in indices[:-1]:
        row = _mixed(row + _GOLDEN * (index + 1))
    bits = (row ^ _mixed(_GOLDEN * (indices[-1] + 1))) * _FIRST
    bits = (bits ^ (bits >> 29)) >> (63 - _BITS)
    keep: Tensor = (bits & (2**_BITS - 1)) >= round(probability * 2**_BITS)
    return keep


def _mixed(x: Tensor) -> Tensor:
    """SplitMix64's mixer; the sign that ``>>`` extends is masked off as the shifts are logical."""
    x = (x ^ ((x >> 30) & (2**34 - 1))) * _FIRST
    x = (x ^ ((x >> 27) & (2**37 - 1))) * _SECOND
    return x ^ ((x >> 31) & (2**33 - 1))
