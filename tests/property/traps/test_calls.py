"""Calls that are attention already mean what their documentation says, and are replaced only by something faster."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnfuse import rewrite
from attnfuse.report import Report
from tests.support.doors import as_module
from tests.support.never_wrong import never_wrong, qkv

INF = float("inf")


def keep_with_an_empty_row() -> Tensor:
    keep = torch.rand(2, 1, 6, 9) < 0.6
    keep[:, :, 2] = False
    return keep


@pytest.mark.parametrize(("rows", "keys"), [(6, 9), (9, 6), (2, 9), (7, 7)])
def test_is_causal_is_aligned_top_left(door: str, rows: int, keys: int) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    report = never_wrong(door, attention, *qkv(rows=rows, keys=keys))
    assert "causal" in report.fused[0].what


def test_an_empty_row_is_zero_behind_a_bool_mask(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)

    assert "empty rows zero" in never_wrong(door, attention, *qkv(), keep_with_an_empty_row()).fused[0].what


def test_an_empty_row_is_zero_behind_a_mask_of_minus_infinity(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    mask = torch.zeros(2, 1, 6, 9).masked_fill(~keep_with_an_empty_row(), -INF)
    assert "empty rows zero" in never_wrong(door, attention, *qkv(), mask).fused[0].what


def test_an_empty_row_behind_a_finite_fill_weighs_every_key(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        mask = torch.where(keep, 0.0, torch.finfo(torch.float32).min).to(q.dtype)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    assert never_wrong(door, attention, *qkv(), keep_with_an_empty_row()).fused


def test_masks_are_recovered_as_predicates(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        row, key = torch.arange(6)[:, None], torch.arange(9)[None, :]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=(key <= row + 3) & (key > row))

    assert "causal 3, window 1" in never_wrong(door, attention, *qkv()).fused[0].what


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_grouped_heads_share_runs_of_query_heads(door: str, kv_heads: int) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, scale=0.3, enable_gqa=True)

    report = never_wrong(door, attention, *qkv(kv_heads=kv_heads))
    assert f"k[2, {kv_heads}, 9, 8]" in report.fused[0].shape


@pytest.mark.parametrize("scale", [0.0, 1.0, -0.5])
def test_any_scale(door: str, scale: float) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(2 * q, k, v, scale=scale)

    never_wrong(door, attention, *qkv())


@pytest.mark.parametrize("shape", [(6, 8), (3, 6, 8), (2, 3, 4, 6, 8)])
def test_any_rank(door: str, shape: tuple[int, ...]) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v[..., :5])

    never_wrong(door, attention, *(torch.randn(shape) for _ in range(3)))


def test_the_call_that_gives_the_sums_besides() -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out: Tensor = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default(q, k, v, 0.0, True)[0]
        return out

    assert "causal" in never_wrong("training IR", attention, *qkv()).fused[0].what


def test_a_single_key(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v)

    never_wrong(door, attention, *qkv(keys=1), sites=None)


def test_an_operand_is_changed_after_the_call(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = F.scaled_dot_product_attention(q, k, v)
        k.zero_()
        return out

    never_wrong(door, attention, *qkv())


def test_bfloat16_scores_stay_exact(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)

    q, k, v = (x.bfloat16() for x in qkv(rows=64, keys=64))
    report = never_wrong(door, attention, q * 6, k, v, torch.ones(64, 64, dtype=torch.bool).tril())
    assert report.fused or door == "core ATen"


def test_a_softmax_that_is_safe(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        scores = (q @ k.mT).masked_fill(~keep, -INF)
        weights: Tensor = torch.ops.aten._safe_softmax.default(scores, -1)
        return weights @ v

    assert "empty rows zero" in never_wrong(door, attention, *qkv(), keep_with_an_empty_row()).fused[0].what


def test_a_softmax_whose_empty_rows_are_cleared(door: str) -> None:
    def attention(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
        scores = (q @ k.mT).masked_fill(~keep, -INF)
        empty = ~(scores != -INF).any(-1, keepdim=True)
        return torch.where(empty, 0.0, torch.softmax(scores, -1)).to(q.dtype) @ v

    assert "empty rows zero" in never_wrong(door, attention, *qkv(), keep_with_an_empty_row()).fused[0].what


# --- whether it pays --------------------------------------------------------------------------------


def explained(attention: Callable[..., Tensor], rows: int, keys: int, dtype: torch.dtype) -> Report:
    q, k = torch.empty(1, 8, rows, 64, dtype=dtype), torch.empty(1, 8, keys, 64, dtype=dtype)
    return rewrite(torch.export.export(as_module(attention), (q, k, k)), certify="off")[1]


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v)


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def causal_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keep = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).tril()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep)


def window_mask(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keep = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=keep.tril() & keep.triu(-255))


@pytest.mark.parametrize(
    ("attention", "rows", "dtype", "kernel"),
    [
        (plain, 2048, torch.float32, ""),
        (causal, 2048, torch.float32, ""),
        (plain, 1, torch.float32, ""),
        (causal_mask, 2048, torch.float32, "sdpa"),
        (window_mask, 2048, torch.float32, "blocked"),
        (plain, 1, torch.bfloat16, "direct"),
    ],
)
def test_a_call_is_replaced_by_what_is_faster(
    attention: Any, rows: int, dtype: torch.dtype, kernel: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ATTNFUSE_CALIBRATE", "0")
    report = explained(attention, rows, 2048, dtype)
    if kernel:
        assert [site.kernel for site in report.fused] == [kernel]
    else:
        assert "the call of scaled_dot_product_attention that is there" in report.refused[0].reason
