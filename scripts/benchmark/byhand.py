"""The same variants written by somebody who knows the fast operations: SDPA and flex_attention.

Each entry prepares what a person would build once (masks, compiled kernels) and returns the function of
query, key and value that is timed. A variant that an operation cannot express has no entry.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.nn.functional import scaled_dot_product_attention

from benchmark.programs import CAP

__all__ = ["FLEX", "SDPA", "Attention", "Tensors"]

Tensors = dict[str, Tensor]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def _sdpa(**options: Any) -> Attention:
    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        grouped = query.shape[1] != key.shape[1]
        return scaled_dot_product_attention(query, key, value, enable_gqa=grouped, **options)

    return run


def _sdpa_alibi(given: Tensors) -> Attention:
    slopes, lower = given["slopes"], _lower(given)
    positions = torch.arange(len(lower), device=lower.device)

    def table() -> Tensor:
        full = slopes[:, None, None] * (positions[None, :] - positions[:, None])
        return full.masked_fill(~lower, float("-inf"))[None]

    def learned(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return _sdpa(attn_mask=table())(query, key, value)

    return learned if slopes.requires_grad else _sdpa(attn_mask=table())


def _sdpa_bias(given: Tensors) -> Attention:
    # viewed in each call: a view that was made before belongs to another stream, where a graph is captured
    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return _sdpa(attn_mask=given["table"][None])(query, key, value)

    return run


def _sdpa_window(given: Tensors) -> Attention:
    lower = _lower(given)
    return _sdpa(attn_mask=lower & ~lower.tril(-(len(lower) // 4)))


def _dequantised(given: Tensors, attend: Attention) -> Attention:
    """Neither operation takes float8: operands are widened first, in one pass each."""
    scales = [given[f"{name}_scale"][:, None, None] for name in ("query", "key", "value")]
    widen = torch.compile(lambda x, scale: x.to(scale.dtype) * scale, fullgraph=True, dynamic=False)

    def run(*operands: Tensor) -> Tensor:
        return attend(*(widen(x, scale) for x, scale in zip(operands, scales, strict=True)))

    return run


def _lower(given: Tensors) -> Tensor:
    length = given["key"].shape[2]
    return torch.ones(length, length, dtype=torch.bool, device=given["key"].device).tril()


SDPA: dict[str, Callable[[Tensors], Attention]] = {
    "plain": lambda _: _sdpa(),
    "llama": lambda _: _sdpa(is_causal=True),
    "alibi": _sdpa_alibi,
    "bias": _sdpa_bias,
    "window": _sdpa_window,
    "decode": lambda _: _sdpa(),
    "float8": lambda given: _dequantised(given, _sdpa()),
}

Score = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]
Mask = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def _flex(given: Tensors, score: Score | None = None, mask: Mask | None = None) -> Attention:
    rows, keys = given["query"].shape[2], given["key"].shape[2]
    blocks = (
        None if mask is None else create_block_mask(mask, None, None, rows, keys, device=given["query"].device.type)
    )
    kernel = torch.compile(flex_attention, fullgraph=True, dynamic=False)

    def run(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        grouped = query.shape[1] != key.shape[1]
        out = kernel(query, key, value, score_mod=score, block_mask=blocks, enable_gqa=grouped)
        assert isinstance(out, Tensor)  # a pair only when the LSE is asked for
        return out

    return run


def _causal(_b: Tensor, _h: Tensor, m: Tensor, n: Tensor) -> Tensor:
    return n <= m


def _capped(score: Tensor, _b: Tensor, _h: Tensor, _m: Tensor, _n: Tensor) -> Tensor:
    return CAP * torch.tanh(score / CAP)


def _flex_alibi(given: Tensors) -> Attention:
    slopes = given["slopes"]
    return _flex(given, lambda score, _b, h, m, n: score + slopes[h] * (n - m), _causal)


def _flex_bias(given: Tensors) -> Attention:
    table = given["table"]
    return _flex(given, lambda score, _b, h, m, n: score + table[h, m, n])


def _flex_window(given: Tensors) -> Attention:
    reach = given["key"].shape[2] // 4
    return _flex(given, None, lambda _b, _h, m, n: (n <= m) & (n > m - reach))


FLEX: dict[str, Callable[[Tensors], Attention]] = {
    "plain": _flex,
    "llama": lambda given: _flex(given, None, _causal),
    "softcap": lambda given: _flex(given, _capped, _causal),
    "alibi": _flex_alibi,
    "bias": _flex_bias,
    "window": _flex_window,
    "decode": _flex,
    "float8": lambda given: _dequantised(given, _flex(given)),
}
