"""Attention as people write it, one function a variant: the source that every peer starts from.

``query [B, H, M, D]``, ``key`` and ``value [B, Hkv, N, D]``; masks are built inside, as models build them.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["CAP", "alibi", "bias", "causal", "decode", "float8", "grouped", "plain", "sinks", "softcap", "window"]

#: Gemma 2's.
CAP = 50.0


def plain(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """No mask: a vision transformer."""
    scores = torch.matmul(query, key.transpose(-1, -2)) * (1 / math.sqrt(query.shape[-1]))
    return torch.matmul(torch.softmax(scores, dim=-1), value)


def grouped(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Llama: grouped heads, additive causal mask of the least finite number, float32 softmax."""
    return _attend(_scores(query, key) + causal(query), value)


def softcap(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Gemma 2: logits capped before the mask."""
    return _attend(torch.tanh(_scores(query, key) / CAP) * CAP + causal(query), value)


def alibi(query: Tensor, key: Tensor, value: Tensor, slopes: Tensor) -> Tensor:
    """MPT: a slope for each head ``[H]`` times the distance from row to key."""
    rows, keys = _positions(query)
    return _attend(_scores(query, key) + slopes[:, None, None] * (keys - rows) + causal(query), value)


def bias(query: Tensor, key: Tensor, value: Tensor, table: Tensor) -> Tensor:
    """A learned bias ``[H, M, N]``: T5 and Swin once their table is looked up."""
    return _attend(_scores(query, key) + table, value)


def window(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Mistral: causal, and no further back than a quarter of the keys."""
    rows, keys = _positions(query)
    kept = (keys <= rows) & (keys > rows - key.shape[2] // 4)
    return _attend(_scores(query, key) + _additive(kept, query), value)


def sinks(query: Tensor, key: Tensor, value: Tensor, sink: Tensor) -> Tensor:
    """GPT-OSS: a logit for each head ``[H]`` that takes weight and gives nothing."""
    scores = _scores(query, key) + causal(query)
    column = sink.reshape(1, -1, 1, 1).expand(query.shape[0], -1, query.shape[2], -1)
    logits = torch.cat([scores, column], dim=-1)
    logits = logits - logits.max(dim=-1, keepdim=True).values
    weights = torch.softmax(logits, dim=-1, dtype=logits.dtype)[..., :-1]
    return torch.matmul(weights, _repeated(value, query.shape[1]))


def decode(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """One new token against a cache: grouped heads, and nothing to mask."""
    return _attend(_scores(query, key), value)


def float8(
    query: Tensor, key: Tensor, value: Tensor, query_scale: Tensor, key_scale: Tensor, value_scale: Tensor
) -> Tensor:
    """Float8 operands with a scale for each head ``[H]``, dequantised around the products; weights are quantised."""
    wide = query_scale.dtype
    scores = torch.matmul(
        query.to(wide) * query_scale[:, None, None], (key.to(wide) * key_scale[:, None, None]).transpose(2, 3)
    )
    exact = torch.promote_types(wide, torch.float32)
    weights = torch.softmax(scores.to(exact) * (1 / math.sqrt(query.shape[-1])), dim=-1)
    largest = torch.finfo(torch.float8_e4m3fn).max
    # the float64 run of this program is the reference, and rounds nothing
    narrow = weights if wide == torch.float64 else (weights * largest).clamp(max=largest).to(torch.float8_e4m3fn)
    by = value_scale if wide == torch.float64 else value_scale / largest
    return torch.matmul(narrow.to(wide), value.to(wide)) * by[:, None, None]


def causal(query: Tensor) -> Tensor:
    """``[M, M]``: 0 where the key is not later than the row, else the least finite number."""
    rows, keys = _positions(query)
    return _additive(keys <= rows, query)


def _positions(query: Tensor) -> tuple[Tensor, Tensor]:
    positions = torch.arange(query.shape[2], device=query.device)
    return positions[:, None], positions[None, :]


def _additive(kept: Tensor, query: Tensor) -> Tensor:
    masked = torch.full((), torch.finfo(query.dtype).min, dtype=query.dtype, device=query.device)
    return torch.where(kept, 0.0, masked)


def _scores(query: Tensor, key: Tensor) -> Tensor:
    repeated = _repeated(key, query.shape[1])
    return torch.matmul(query, repeated.transpose(2, 3)) * (1 / math.sqrt(query.shape[-1]))


def _repeated(tensor: Tensor, heads: int) -> Tensor:
    batch, fewer, length, width = tensor.shape
    if fewer == heads:
        return tensor
    shape = (batch, fewer, heads // fewer, length, width)
    return tensor[:, :, None].expand(shape).reshape(batch, heads, length, width)


def _attend(scores: Tensor, value: Tensor) -> Tensor:
    # float32 or better: the float64 run of this program is the reference
    exact = torch.promote_types(scores.dtype, torch.float32)
    weights = torch.softmax(scores, dim=-1, dtype=exact).to(value.dtype)
    return torch.matmul(weights, _repeated(value, scores.shape[1]))
