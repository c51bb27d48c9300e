"""Small graphs before and after, and what the report says: each stored file is meant to be read by a person."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attnfuse import Report, rewrite
from attnfuse.graph.text import render
from tests.support.doors import as_module

B, H, M, N, D = 2, 4, 6, 9, 8
QUERY, KEY, VALUE = torch.empty(B, H, M, D), torch.empty(B, H, N, D), torch.empty(B, H, N, D)
KEY2, VALUE2 = KEY[:, :2].contiguous(), VALUE[:, :2].contiguous()


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-2, -1), dim=-1) @ v


def scaled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-2, -1) / 8**0.5, dim=-1) @ v


def causal_tril(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keep = torch.ones(M, N, dtype=torch.bool).tril(diagonal=N - M)
    scores = (q @ k.transpose(-2, -1)).masked_fill(~keep, float("-inf"))
    return torch.softmax(scores, dim=-1) @ v


def additive_mask(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1) * 0.125 + mask
    return F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype) @ v


def padding(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1)
    mask = (1.0 - keep[:, None, None, :].to(scores.dtype)) * torch.finfo(torch.float32).min
    return torch.softmax(scores + mask, dim=-1) @ v


def grouped_heads(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    k = k[:, :, None].expand(B, 2, 2, N, D).reshape(B, H, N, D)
    v = v[:, :, None].expand(B, 2, 2, N, D).reshape(B, H, N, D)
    return torch.softmax(q @ k.transpose(-2, -1), dim=-1) @ v


def softcap(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.tanh(q @ k.transpose(-2, -1) / 30.0) * 30.0
    return torch.softmax(scores, dim=-1) @ v


def alibi(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor) -> Tensor:
    distance = torch.arange(N)[None, :] - torch.arange(M)[:, None]
    return torch.softmax(q @ k.transpose(-2, -1) + slopes[:, None, None] * distance, dim=-1) @ v


def sinks(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor) -> Tensor:
    scores = torch.cat([q @ k.transpose(-2, -1), sinks.view(1, H, 1, 1).expand(B, H, M, 1)], dim=-1)
    scores = scores - scores.max(dim=-1, keepdim=True).values
    return torch.softmax(scores, dim=-1)[..., :-1] @ v


def window(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    row, key = torch.arange(M)[:, None], torch.arange(N)[None, :]
    keep = (key <= row) & (key > row - 4)
    return torch.softmax(torch.where(keep, q @ k.transpose(-2, -1), float("-inf")), dim=-1) @ v


def baddbmm(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    q, k, v = q.view(B * H, M, D), k.view(B * H, N, D), v.view(B * H, N, D)
    scores = torch.baddbmm(bias, q, k.transpose(1, 2), beta=1.0, alpha=0.125)
    return torch.bmm(torch.softmax(scores, dim=-1), v).view(B, H, M, D)


def call_with_a_mask(q: Tensor, k: Tensor, v: Tensor, keep: Tensor) -> Tensor:
    causal = torch.ones(M, N, dtype=torch.bool).tril(diagonal=N - M)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=causal & keep[:, None, None, :], enable_gqa=True)


def sigmoid(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    keep = torch.ones(M, N, dtype=torch.bool).tril(diagonal=N - M)
    scores = (q @ k.transpose(-2, -1) * 0.125 - 2.0).masked_fill(~keep, float("-inf"))
    return torch.sigmoid(scores) @ v


def retention(q: Tensor, k: Tensor, v: Tensor, rates: Tensor) -> Tensor:
    distance = torch.arange(M)[:, None] - torch.arange(N)[None, :]
    decay = torch.where(distance >= 0, torch.exp(rates[:, None, None] * distance), 0.0)
    return (q @ k.transpose(-2, -1) * decay) @ v


def refused_another_normaliser(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = torch.relu(q @ k.transpose(-2, -1))
    return weights / weights.sum(-1, keepdim=True).clamp(min=1.0) @ v


def weights_returned(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    scores = q @ k.transpose(-2, -1) * 0.125 + mask
    weights = F.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return F.dropout(weights, 0.1, training=False) @ v, weights


def refused_scores_escape(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    scores = q @ k.transpose(-2, -1)
    return torch.softmax(scores, dim=-1) @ v, scores


def refused_mutation(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = q @ k.transpose(-2, -1)
    k.zero_()
    return torch.softmax(scores, dim=-1) @ v


def refused_another_axis(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.softmax(q @ k.transpose(-2, -1), dim=-2) @ v


CASES: dict[Callable[..., object], tuple[Tensor, ...]] = {
    plain: (QUERY, KEY, VALUE),
    scaled: (QUERY, KEY, VALUE),
    causal_tril: (QUERY, KEY, VALUE),
    additive_mask: (QUERY, KEY, VALUE, torch.empty(B, 1, M, N)),
    padding: (QUERY, KEY, VALUE, torch.empty(B, N, dtype=torch.int64)),
    grouped_heads: (QUERY, KEY2, VALUE2),
    softcap: (QUERY, KEY, VALUE),
    alibi: (QUERY, KEY, VALUE, torch.empty(H)),
    sinks: (QUERY, KEY, VALUE, torch.empty(H)),
    window: (QUERY, KEY, VALUE),
    call_with_a_mask: (QUERY, KEY2, VALUE2, torch.empty(B, N, dtype=torch.bool)),
    sigmoid: (QUERY, KEY, VALUE),
    retention: (QUERY, KEY, VALUE, torch.empty(H)),
    refused_another_normaliser: (QUERY, KEY, VALUE),
    baddbmm: (QUERY, KEY, VALUE, torch.empty(B * H, M, N)),
    weights_returned: (QUERY, KEY, VALUE, torch.empty(B, 1, M, N)),
    refused_scores_escape: (QUERY, KEY, VALUE),
    refused_mutation: (QUERY, KEY, VALUE),
    refused_another_axis: (QUERY, KEY, VALUE),
}


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_golden(case: Callable[..., object], golden: Callable[[str, str], None]) -> None:
    program = torch.export.export(as_module(case), CASES[case])
    before = render(program.graph_module)
    # one kernel and no estimates, so that the text is the same on every machine
    rewritten, report = rewrite(program, custom_op=True, kernel="blocked", profit=False)
    sections = {"before": before, "after": render(rewritten.graph_module), "report": _text(report)}
    golden("\n\n".join(f"# {name}\n{text}" for name, text in sections.items()), case.__name__)


def test_every_file_belongs_to_a_case() -> None:
    stored = {file.stem for file in Path(__file__).parent.glob("*.txt")}
    # tests/kernels/test_flex.py reads flex.txt
    assert stored == {case.__name__ for case in CASES} | {"flex"}


def _text(report: Report) -> str:
    """The report and its specs, without folders and line numbers, which say nothing about attention."""
    lines = [str(report), *(f"spec {site.spec}" for site in report.fused)]
    return re.sub(r"[^ ]*/(\w+\.py):\d+", r"\1", "\n".join(lines))
