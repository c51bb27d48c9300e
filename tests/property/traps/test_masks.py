"""Masks: which keys are kept, what is put in place of the others, and rows of which no key is kept."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.support.never_wrong import never_wrong, qkv

INF = float("inf")
MIN = torch.finfo(torch.float32).min


def attend(scores: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(scores, dim=-1) @ v


def keep_with_an_empty_row(rows: int = 6, keys: int = 9) -> Tensor:
    keep = torch.rand(rows, keys) < 0.5
    keep[2] = False
    return keep


# --- rows of which no key is kept -------------------------------------------------------------------


@pytest.mark.parametrize("fill", [-INF, MIN, -1e9, -1e4])
def test_a_fully_masked_row_keeps_its_meaning(door: str, fill: float) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return attend((q @ k.mT).masked_fill(~keep, fill), v)

    q, k, v = qkv()
    report = never_wrong(door, attention, q, k, v, keep_with_an_empty_row())
    assert report.fused


@pytest.mark.parametrize("fill", [-INF, MIN, -1e9, -1e4])
def test_a_fully_masked_row_of_an_additive_mask_keeps_its_meaning(door: str, fill: float) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return attend(q @ k.mT + mask, v)

    mask = torch.zeros(6, 9).masked_fill(~keep_with_an_empty_row(), fill)
    assert never_wrong(door, attention, *qkv(), mask).fused


def test_left_padding_under_a_causal_mask_empties_rows(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        causal = torch.ones(6, 6, dtype=torch.bool).tril()
        keep = causal & padding[:, None, None, :]
        mask = torch.where(keep, 0.0, torch.finfo(torch.float32).min).to(q.dtype)
        return attend(q @ k.mT * 0.3 + mask, v)

    padding = torch.tensor([[False, False, True, True, True, True], [True] * 6])
    assert never_wrong(door, attention, *qkv(keys=6), padding).fused


def test_two_finite_masks_on_one_key_overflow(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, padding: Tensor) -> Tensor:
        least = torch.finfo(torch.float32).min
        causal = torch.where(torch.ones(6, 6, dtype=torch.bool).tril(), 0.0, least)
        return attend(q @ k.mT + causal + torch.where(padding, 0.0, least)[:, None, None, :], v)

    padding = torch.tensor([[False, False, True, True, True, True], [False] * 6])
    never_wrong(door, attention, *qkv(keys=6), padding)


def test_weights_cleared_after_the_softmax_make_empty_rows_zero(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        weights = torch.softmax((q @ k.mT).masked_fill(~keep, -INF), dim=-1)
        return weights.masked_fill(~keep, 0.0) @ v

    never_wrong(door, attention, *qkv(), keep_with_an_empty_row())


def test_whole_numbers_compared_as_floats(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        distance = (torch.arange(6)[:, None] - torch.arange(9)[None, :]).float()
        return attend((q @ k.mT).masked_fill((distance < 0) | (distance > 2.5), -INF), v)

    assert "causal" in never_wrong(door, attention, *qkv()).fused[0].what


def test_nan_weights_cleared_make_empty_rows_zero(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        weights = torch.softmax((q @ k.mT).masked_fill(~keep, -INF), dim=-1)
        return torch.nan_to_num(weights) @ v

    never_wrong(door, attention, *qkv(), keep_with_an_empty_row())


# --- what is put in place of a dropped score --------------------------------------------------------


@pytest.mark.parametrize("fill", [0.0, -1.0, 2.0, INF])
def test_a_fill_that_masks_nothing_is_a_value(door: str, fill: float) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return attend((q @ k.mT).masked_fill(~keep, fill), v)

    never_wrong(door, attention, *qkv(), keep_with_an_empty_row())


@pytest.mark.parametrize("fill", [0.0, -1.0, 2.0])
def test_a_choice_that_masks_nothing_is_a_value(door: str, fill: float) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return attend(torch.where(keep, q @ k.mT, fill), v)

    never_wrong(door, attention, *qkv(), keep_with_an_empty_row())


def test_where_replaces_and_plus_adds(door: str) -> None:
    def replaced(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return attend(torch.where(keep, q @ k.mT, -3.0), v)

    def added(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return attend(q @ k.mT + torch.where(keep, 0.0, -3.0).to(q.dtype), v)

    args = (*qkv(), keep_with_an_empty_row())
    never_wrong(door, replaced, *args)
    never_wrong(door, added, *args)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_least_float32_is_infinite_in_half_types(door: str, dtype: torch.dtype) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        mask = torch.where(keep, 0.0, torch.finfo(torch.float32).min).to(dtype).to(q.dtype)
        return attend(q @ k.mT + mask, v)

    q, k, v = (x.to(dtype) for x in qkv())
    never_wrong(door, attention, q, k, v, keep_with_an_empty_row())


def test_a_fill_that_is_a_tensor(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor, fill: Tensor) -> Tensor:
        return attend(torch.where(keep, q @ k.mT, fill), v)

    never_wrong(door, attention, *qkv(), keep_with_an_empty_row(), torch.tensor(-2.0))


# --- which keys are kept ----------------------------------------------------------------------------


def test_polarity_is_read_not_guessed(door: str) -> None:
    def kept(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return attend(torch.where(mask, q @ k.mT, -INF), v)

    def dropped(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return attend(torch.where(mask, -INF, q @ k.mT), v)

    args = (*qkv(), torch.rand(6, 9) < 0.5)
    never_wrong(door, kept, *args)
    never_wrong(door, dropped, *args)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.float32])
def test_a_mask_may_hold_more_than_zeros_and_ones(door: str, dtype: torch.dtype) -> None:
    def is_zero(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return attend((q @ k.mT).masked_fill(mask == 0, -INF), v)

    def is_one(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return attend((q @ k.mT).masked_fill(mask != 1, -INF), v)

    def as_bool(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return attend((q @ k.mT).masked_fill(~mask.bool(), -INF), v)

    mask = torch.randint(0, 3, (6, 9)).to(dtype)
    mask[:, 0] = 1
    for attention in (is_zero, is_one, as_bool):
        never_wrong(door, attention, *qkv(), mask)


@pytest.mark.parametrize("values", [(0.0, 1.0), (0.0, 0.5, 1.0, 2.0)])
def test_one_minus_a_mask_of_floats_is_arithmetic(door: str, values: tuple[float, ...]) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return attend(q @ k.mT + (1.0 - mask[:, None, None, :]) * -10000.0, v)

    mask = torch.tensor(values)[torch.randint(0, len(values), (2, 9))]
    never_wrong(door, attention, *qkv(), mask)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_bool_added_to_scores_adds_one(door: str, dtype: torch.dtype) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return attend(q @ k.mT + mask, v)

    never_wrong(door, attention, *(x.to(dtype) for x in qkv()), torch.rand(6, 9) < 0.5)


def test_alpha_multiplies_what_is_added(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return attend(torch.add(q @ k.mT, bias, alpha=2), v)

    never_wrong(door, attention, *qkv(), torch.randn(6, 9))


def test_alpha_of_sub_multiplies_what_is_subtracted(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return attend(torch.sub(q @ k.mT, bias, alpha=3), v)

    never_wrong(door, attention, *qkv(), torch.randn(6, 9))


@pytest.mark.parametrize("shape", [(9,), (6, 1), (1, 1), (4, 1, 9), (2, 1, 1, 9), (2, 4, 6, 9), (1, 1, 6, 1)])
def test_masks_broadcast_from_any_rank(door: str, shape: tuple[int, ...]) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return attend((q @ k.mT).masked_fill(~keep, -INF), v)

    never_wrong(door, attention, *qkv(), torch.rand(shape) < 0.7)


def test_a_mask_may_enlarge_the_batch(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return attend(q @ k.mT + bias, v)

    never_wrong(door, attention, *qkv(batch=1), torch.randn(3, 1, 6, 9))


def test_a_mask_may_add_a_dimension(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        return attend(q @ k.mT + bias, v)

    never_wrong(door, attention, *qkv(), torch.randn(3, 1, 1, 6, 9))


def test_causality_is_not_proven_by_a_name(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, causal_mask: Tensor) -> Tensor:
        return attend((q @ k.mT).masked_fill(~causal_mask, -INF), v)

    report = never_wrong(door, attention, *qkv(keys=6), torch.rand(6, 6) < 0.7)
    assert all("causal" not in site.what for site in report.fused)


@pytest.mark.parametrize(("rows", "keys"), [(6, 9), (9, 6), (1, 9), (9, 1), (7, 7)])
@pytest.mark.parametrize("corner", ["top left", "bottom right"])
def test_a_causal_mask_is_aligned_as_it_is_written(door: str, rows: int, keys: int, corner: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        offset = k.size(-2) - q.size(-2) if corner == "bottom right" else 0
        keep = torch.ones(q.size(-2), k.size(-2), dtype=torch.bool).tril(offset)
        return attend((q @ k.mT).masked_fill(~keep, -INF), v)

    never_wrong(door, attention, *qkv(rows=rows, keys=keys))


def test_a_mask_of_columns_is_not_one_of_rows(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = torch.arange(7)
        return attend((q @ k.mT).masked_fill(n[:, None] < n[None, :] - 1, -INF), v)

    def turned(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n = torch.arange(7)
        return attend((q @ k.mT).masked_fill(n[None, :] < n[:, None] - 1, -INF), v)

    never_wrong(door, attention, *qkv(rows=7, keys=7))
    never_wrong(door, turned, *qkv(rows=7, keys=7))


def test_a_window_of_distances_has_two_sides(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        distance = (torch.arange(6)[:, None] - torch.arange(9)[None, :]).abs()
        return attend((q @ k.mT).masked_fill(distance > 2, -INF), v)

    never_wrong(door, attention, *qkv())


def test_ids_of_unsigned_bytes_wrap_around(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, rows: Tensor, keys: Tensor) -> Tensor:
        return attend((q @ k.mT).masked_fill((rows[:, None] - keys[None, :]) > 1, -INF), v)

    rows, keys = torch.randint(0, 4, (6,), dtype=torch.uint8), torch.randint(0, 4, (9,), dtype=torch.uint8)
    never_wrong(door, attention, *qkv(), rows, keys)


def test_a_mask_subtracted_is_infinite(door: str) -> None:
    """What it lets pass is +inf where it should be masked, and NaN behind a second mask, which kernels leave out."""

    def attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        masked = q @ k.mT - torch.zeros_like(keep, dtype=q.dtype).masked_fill(~keep.mT, -INF)
        return torch.sigmoid(masked + torch.zeros_like(keep, dtype=q.dtype).masked_fill(~keep, -INF)) @ v

    report = never_wrong(door, attention, *qkv(rows=9), torch.rand(9, 9) < 0.7, sites=None)
    assert "infinite" in report.refused[0].reason


def test_one_number_added_to_every_score(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(q @ k.mT + -10000.0, v)

    q, k, v = qkv(batch=1)
    assert never_wrong(door, attention, q[0], k[0], v[0]).fused


def test_positions_that_a_half_type_does_not_have(door: str) -> None:
    """Bfloat16 counts to 256: beyond, two positions are the same number."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows, keys = (torch.arange(300, dtype=torch.bfloat16) for _ in range(2))
        return attend((q @ k.mT).masked_fill(keys > rows[:, None], -INF), v)

    q, k, v = (torch.randn(1, 1, 300, 4) for _ in range(3))
    never_wrong(door, attention, q, k, v)


def test_bytes_that_change_their_sign(door: str) -> None:
    """-1 as an unsigned byte is 255."""

    def attention(q: Tensor, k: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        return attend((q @ k.mT).masked_fill(ids.to(torch.uint8) > 100, -INF), v)

    q, k, v = qkv()
    never_wrong(door, attention, q, k, v, torch.randint(-3, 3, (k.shape[-2],), dtype=torch.int8))
