"""Scales: wherever they stand and whatever they are."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from tests.support.never_wrong import never_wrong, qkv


def attend(scores: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(scores, dim=-1) @ v


@pytest.mark.parametrize("scale", [0.0, -0.0, -0.5, 1.0, 1e-30, 100.0])
def test_any_number(door: str, scale: float) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q @ k.mT * scale, v)

    assert never_wrong(door, attention, *qkv()).fused


@pytest.mark.parametrize("shape", [(), (1,), (4, 1, 1), (2, 1, 1, 1), (6, 1), (9,), (2, 4, 6, 9)])
def test_a_tensor_along_any_axes(door: str, shape: tuple[int, ...]) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
        return attend(q @ k.mT * scale, v)

    never_wrong(door, attention, *qkv(), torch.randn(shape))


@pytest.mark.parametrize("shape", [(8,), (6, 1), (4, 1, 1), (6, 8)])
def test_a_tensor_on_the_query(door: str, shape: tuple[int, ...]) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, scale: Tensor) -> Tensor:
        return attend((q * scale) @ k.mT, v)

    never_wrong(door, attention, *qkv(), torch.randn(shape))


def test_split_over_query_and_key(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        root = math.sqrt(math.sqrt(q.size(-1)))
        return attend((q / root) @ (k / root).mT, v)

    assert never_wrong(door, attention, *qkv()).fused


def test_after_the_mask(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return attend((q @ k.mT).masked_fill(~keep, -10.0) * 0.5, v)

    never_wrong(door, attention, *qkv(), torch.rand(6, 9) < 0.5)


def test_negative_after_an_infinite_mask(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return attend((q @ k.mT).masked_fill(~keep, float("inf")) * -0.5, v)

    never_wrong(door, attention, *qkv(), torch.rand(6, 9) < 0.7)


def test_zero_after_an_infinite_mask_is_nan(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return attend((q @ k.mT).masked_fill(~keep, float("-inf")) * 0.0, v)

    never_wrong(door, attention, *qkv(), torch.rand(6, 9) < 0.7)


def test_of_the_bias_too(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return attend((q @ k.mT + bias) / 4, v)

    assert never_wrong(door, attention, *qkv(), torch.randn(6, 9)).fused


def test_after_an_overflow_of_half_precision(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q @ k.mT / 256, v)

    q, k, v = (x.half() for x in qkv())
    never_wrong(door, attention, q * 200, k * 200, v)


def test_of_the_weights(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (torch.softmax(q @ k.mT, dim=-1) * 0.5) @ v

    never_wrong(door, attention, *qkv())


def test_of_the_weights_by_a_gate(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        return (torch.softmax(q @ k.mT, dim=-1) * gate) @ v

    never_wrong(door, attention, *qkv(), torch.randn(4, 1, 9))


def test_squared_weights(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.mT, dim=-1).square() @ v

    never_wrong(door, attention, *qkv())
