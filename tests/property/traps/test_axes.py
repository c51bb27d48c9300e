"""Axes: what is normalised, sliced, turned or repeated, and what is summed over."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.never_wrong import never_wrong, qkv


def attend(scores: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(scores, dim=-1) @ v


# --- the softmax ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [-2, -3, 0, 1, 2])
def test_a_softmax_over_another_axis_is_no_attention(door: str, dim: int) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.mT, dim=dim) @ v

    report = never_wrong(door, attention, *qkv())
    assert not report.fused


def test_a_softmax_over_rows_of_turned_scores_is_attention(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(k @ q.mT, dim=-2).mT @ v

    assert never_wrong(door, attention, *qkv()).fused


def test_weights_turned_after_the_softmax_are_no_attention(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.mT, dim=-1).mT @ v

    assert not never_wrong(door, attention, *qkv(rows=6, keys=6)).fused


def test_weights_normalised_again_over_rows(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.softmax(q @ k.mT, dim=-1)
        return (weights / weights.sum(-2, keepdim=True)) @ v

    never_wrong(door, attention, *qkv())


def test_a_maximum_over_rows_is_no_shift(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT
        return attend(scores - scores.amax(-2, keepdim=True), v)

    never_wrong(door, attention, *qkv())


def test_a_shift_by_the_whole_maximum(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = q @ k.mT
        return attend(scores - scores.max(), v)

    never_wrong(door, attention, *qkv())


def test_softmax_twice(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(torch.softmax(q @ k.mT, dim=-1), v)

    never_wrong(door, attention, *qkv(), sites=None)


# --- views and slices -------------------------------------------------------------------------------


@pytest.mark.parametrize("cut", [slice(1, None), slice(None, -1), slice(None, None, 2), slice(2, 5)])
def test_weights_of_some_keys_do_not_sum_to_one(door: str, cut: slice) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.mT, dim=-1)[..., cut] @ v[:, :, cut]

    never_wrong(door, attention, *qkv())


@pytest.mark.parametrize("cut", [slice(1, None), slice(None, -1), slice(None, None, 2), slice(2, 5)])
def test_scores_of_some_keys(door: str, cut: slice) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend((q @ k.mT)[..., cut], v[:, :, cut])

    never_wrong(door, attention, *qkv())


def test_values_shifted_against_their_weights(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.mT, dim=-1)[..., :-1] @ v[:, :, 1:]

    never_wrong(door, attention, *qkv())


def test_values_flipped(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q @ k.mT, v.flip(-2))

    never_wrong(door, attention, *qkv())


def test_rolled_scores(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend((q @ k.mT).roll(1, -1), v)

    never_wrong(door, attention, *qkv(), sites=None)


def test_a_key_that_is_not_turned(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q @ k, v)

    never_wrong(door, attention, *qkv(rows=8, keys=8, depth=8))


def test_heads_and_rows_mixed_up(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.softmax(q @ k.mT, dim=-1)
        return weights.transpose(1, 2).reshape(weights.shape) @ v

    never_wrong(door, attention, *qkv(heads=4, rows=6, keys=9), sites=None)


def test_heads_swapped_between_scores_and_values(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.softmax(q @ k.mT, dim=-1) @ v.transpose(0, 1)

    never_wrong(door, attention, *qkv(batch=4, heads=4))


# --- sums -------------------------------------------------------------------------------------------


def test_scores_summed_over_the_batch(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(torch.einsum("bhmd,bhnd->hmn", q, k), v)

    never_wrong(door, attention, *qkv())


def test_scores_summed_over_heads(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend((q @ k.mT).sum(1, keepdim=True), v)

    never_wrong(door, attention, *qkv(), sites=None)


def test_values_summed_over_heads(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.softmax(q @ k.mT, dim=-1)
        return torch.einsum("bhmn,bhne->bme", weights, v)

    never_wrong(door, attention, *qkv())


def test_a_diagonal_product(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(torch.einsum("bhmd,bhmd->bhm", q, q).unsqueeze(-1) * (q @ k.mT), v)

    never_wrong(door, attention, *qkv())


def test_a_relative_position_depends_on_the_query(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, positions: Tensor) -> Tensor:
        return attend(q @ k.mT + torch.einsum("bhmd,mnd->bhmn", q, positions), v)

    never_wrong(door, attention, *qkv(), torch.randn(6, 9, 8))


# --- heads and shapes -------------------------------------------------------------------------------


def test_repeat_interleave_shares_a_key_among_neighbours(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
        return attend(q @ k.mT, v)

    assert never_wrong(door, attention, *qkv(kv_heads=2)).fused


def test_repeat_shares_a_key_among_every_other_head(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        k, v = k.repeat(1, 2, 1, 1), v.repeat(1, 2, 1, 1)
        return attend(q @ k.mT, v)

    never_wrong(door, attention, *qkv(kv_heads=2))


def test_keys_in_one_head_order_and_values_in_another(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q @ k.repeat_interleave(2, dim=1).mT, v.repeat(1, 2, 1, 1))

    never_wrong(door, attention, *qkv(kv_heads=2))


def test_keys_of_fewer_heads_than_values(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q @ k[:, :1].mT, v)

    never_wrong(door, attention, *qkv())


@pytest.mark.parametrize("shape", [(1, 4, 9, 8), (2, 1, 9, 8), (1, 1, 9, 8), (9, 8), (4, 9, 8)])
def test_broadcast_keys_and_values(door: str, shape: tuple[int, ...]) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q @ k.mT, v)

    never_wrong(door, attention, qkv()[0], torch.randn(shape), torch.randn(shape))


def test_values_of_a_larger_batch(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q @ k.mT, v)

    q, k, _ = qkv(batch=1)
    never_wrong(door, attention, q, k, torch.randn(3, 4, 9, 8))


@pytest.mark.parametrize(
    ("rows", "keys", "depth", "depth_v"),
    [(1, 9, 8, 8), (6, 9, 8, 3), (6, 9, 3, 8), (7, 13, 5, 11), (1, 2, 1, 1)],
)
def test_odd_sizes(door: str, rows: int, keys: int, depth: int, depth_v: int) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q @ k.mT * 0.5, v)

    assert never_wrong(door, attention, *qkv(rows=rows, keys=keys, depth=depth, depth_v=depth_v)).fused


@pytest.mark.parametrize("rows", [1, 6])
def test_a_single_key(door: str, rows: int) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q @ k.mT * 0.5, v)

    report = never_wrong(door, attention, *qkv(rows=rows, keys=1))
    assert "there is a single key" in str(report)


@pytest.mark.parametrize("empty", ["batch", "heads", "rows", "keys", "depth", "depth_v"])
def test_empty_sizes(door: str, empty: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q @ k.mT, v)

    sizes = {"batch": 2, "heads": 4, "rows": 6, "keys": 9, "depth": 8, "depth_v": 5, empty: 0}
    shapes = (("rows", "depth"), ("keys", "depth"), ("keys", "depth_v"))
    q, k, v = (torch.randn(sizes["batch"], sizes["heads"], *(sizes[name] for name in shape)) for shape in shapes)
    never_wrong(door, attention, q, k, v)
