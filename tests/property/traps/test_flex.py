"""Calls of flex_attention: their programs are read, and a block mask is believed where it is shown to be right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from attnfuse import fuse_graph
from attnfuse.report import Report
from tests.support.compare import assert_as_good
from tests.support.doors import as_module, rewritten

ROWS, KEYS = 384, 400
SLOPES, BIAS = torch.rand(4), torch.randn(ROWS, KEYS)


def qkv() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 4, ROWS, 16), torch.randn(2, 2, KEYS, 16), torch.randn(2, 2, KEYS, 16)


def checked(call: Callable[..., Tensor], *more: Any) -> Report:
    args = (*qkv(), *more)
    program = rewritten("dynamo", as_module(call), args)
    exact = call(*(x.double() if isinstance(x, Tensor) else x for x in args))
    assert_as_good(program.run(*args), call(*args), exact)
    return program.report


def causal(b: Tensor, h: Tensor, m: Tensor, n: Tensor) -> Tensor:
    return m >= n


def window(b: Tensor, h: Tensor, m: Tensor, n: Tensor) -> Tensor:
    return (m >= n) & (m - n < 50)


def window_of_head(b: Tensor, h: Tensor, m: Tensor, n: Tensor) -> Tensor:
    return (m >= n) & ((m - n < 50) | (h > 1))


def masks(mask_mod: Any) -> BlockMask:
    return create_block_mask(mask_mod, None, None, ROWS, KEYS, device="cpu")


# --- read -------------------------------------------------------------------------------------------


def test_a_program_on_scores_is_read() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def score_mod(s: Tensor, b: Tensor, h: Tensor, m: Tensor, n: Tensor) -> Tensor:
            return torch.where(m >= n, torch.tanh(s / 20) * 20 + SLOPES[h].to(s.dtype) * (n - m), -float("inf"))

        return flex_attention(q, k, v, score_mod=score_mod, scale=0.5, enable_gqa=True)

    (site,) = checked(call).fused
    assert site.what == "scale 0.5, softcap 20, alibi, causal, empty rows zero"
    assert "k[2, 2, 400, 16]" in site.shape


def test_a_captured_bias_and_a_block_mask_of_the_graph_are_read() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def score_mod(s: Tensor, b: Tensor, h: Tensor, m: Tensor, n: Tensor) -> Tensor:
            return s + BIAS[m, n]

        return flex_attention(q, k, v, score_mod=score_mod, block_mask=masks(window), enable_gqa=True)

    assert checked(call).fused[0].what == "scale 0.25, bias, causal, window -49, empty rows zero"


def test_rows_that_keep_no_key_are_zero() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        def score_mod(s: Tensor, b: Tensor, h: Tensor, m: Tensor, n: Tensor) -> Tensor:
            return torch.where(m >= n + 7, s, -float("inf"))

        return flex_attention(q, k, v, score_mod=score_mod, enable_gqa=True)

    assert checked(call).fused


def test_one_tensor_may_be_query_key_and_value() -> None:
    def call(q: Tensor) -> Tensor:
        return flex_attention(q, q, q, score_mod=lambda s, b, h, m, n: torch.tanh(s))

    program = rewritten("dynamo", as_module(call), (x := torch.randn(2, 4, 40, 16),))
    assert_as_good(program.run(x), call(x), call(x.double()))
    assert program.report.fused


# --- refused ----------------------------------------------------------------------------------------


def test_a_block_mask_that_is_an_argument_is_not_believed() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask) -> Tensor:
        return flex_attention(q, k, v, block_mask=block_mask, enable_gqa=True)

    assert "may not be those of mask_mod" in checked(call, masks(causal)).refused[0].reason


def test_a_block_mask_of_another_mask_is_seen() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        made = masks(causal)
        lists = (made.kv_num_blocks, made.kv_indices, made.full_kv_num_blocks, made.full_kv_indices)
        other = BlockMask.from_kv_blocks(*lists, BLOCK_SIZE=made.BLOCK_SIZE, mask_mod=window, seq_lengths=(ROWS, KEYS))
        return flex_attention(q, k, v, block_mask=other, enable_gqa=True)

    assert "leaves out or adds pairs" in checked(call).refused[0].reason


def test_a_mask_that_is_other_for_each_head_than_its_blocks_is_seen() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return flex_attention(q, k, v, block_mask=masks(window_of_head), enable_gqa=True)

    # made for head 0, whose window leaves out blocks that the last heads keep
    assert "leaves out or adds pairs" in checked(call).refused[0].reason


def test_the_logarithm_of_sums_is_still_wanted() -> None:
    def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, lse = flex_attention(q, k, v, enable_gqa=True, return_lse=True)  # type: ignore[misc]
        return out * lse[..., None]

    assert checked(call).refused


# --- whether it pays --------------------------------------------------------------------------------


@pytest.mark.parametrize("compiled", [True, False])
def test_a_compiled_call_is_left_to_flex(compiled: bool) -> None:
    found: list[Report] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        found.append(fuse_graph(graph, inputs, compiled=compiled).meta["attnfuse_report"])
        return graph.forward

    def score_mod(s: Tensor, b: Tensor, h: Tensor, m: Tensor, n: Tensor) -> Tensor:
        return torch.where(m >= n, torch.tanh(s), -float("inf"))

    torch.compiler.reset()
    q, k = torch.randn(1, 4, 1024, 64), torch.randn(1, 4, 1024, 64)
    torch.compile(lambda *x: flex_attention(*x, score_mod=score_mod), backend=backend, fullgraph=True)(q, k, k)
    assert bool(found[0].fused) != compiled
    assert compiled == any("call of flex_attention that is there" in site.reason for site in found[0].refused)
