"""Every form as ATen operations alone, written to a file and read back."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.export import Dim

from attnfuse import rewrite
from tests.support.compare import assert_as_good
from tests.support.doors import as_module
from tests.support.never_wrong import qkv


def call(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    row, key = torch.arange(q.shape[-2])[:, None], torch.arange(k.shape[-2])[None, :]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=(key <= row) & (key > row - 3), enable_gqa=True)


def safe(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = (q @ k.repeat_interleave(2, 1).mT).tril(-2)
    weights: Tensor = torch.ops.aten._safe_softmax.default(torch.where(scores == 0, -float("inf"), scores), -1)
    return weights @ v.repeat_interleave(2, 1)


def sigmoid(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return torch.sigmoid(q @ k.repeat_interleave(2, 1).mT * 0.3 - 1.0) @ v.repeat_interleave(2, 1)


def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.repeat_interleave(2, 1).mT).tril() @ v.repeat_interleave(2, 1)


@pytest.mark.parametrize(("attention", "dynamic"), [(call, True), (safe, False), (sigmoid, True), (linear, False)])
def test_a_file_holds_it(attention: Callable[..., Tensor], dynamic: bool) -> None:
    args = qkv(kv_heads=2)
    sizes = ({0: Dim.AUTO, 2: Dim.AUTO},) * 3 if dynamic else None
    program, report = rewrite(torch.export.export(as_module(attention), args, dynamic_shapes=sizes), profit=False)
    assert len(report.fused) == 1, report
    assert not any("attnfuse" in str(node.target) for node in program.graph.nodes)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for batch, rows, keys in ((2, 6, 9), (3, 11, 7)) if dynamic else ((2, 6, 9),):
        given = qkv(batch, rows=rows, keys=keys, kv_heads=2)
        assert_as_good(loaded(*given), attention(*given), attention(*(x.double() for x in given)))
