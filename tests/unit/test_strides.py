"""How a fused result lies in memory, where the source's user may rely on it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from attnfuse import rewrite


class Merged(nn.Module):
    """Views its product: of one row as heads are merged, of more as they lie."""

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        weights = torch.softmax(query @ key.transpose(-1, -2) * 0.25, dim=-1)
        batch, heads, rows, width = query.shape
        if rows > 1:
            return (weights @ value).view(batch, heads, rows * width)
        return (weights @ value).transpose(1, 2).view(batch, rows, heads * width)


@pytest.mark.parametrize(("rows", "copies"), [(1, 0), (3, 1)])
def test_a_result_of_one_row_lies_as_the_source_does(rows: int, copies: int) -> None:
    operands = [torch.randn(2, 4, length, 16) for length in (rows, 9, 9)]
    fused, report = rewrite(torch.export.export(Merged(), tuple(operands)), profit=False, custom_op=True)
    assert len(report.fused) == 1
    assert sum(node.target == torch.ops.aten.clone.default for node in fused.graph.nodes) == copies
    torch.testing.assert_close(fused.module()(*operands), Merged()(*operands))
