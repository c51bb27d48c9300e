"""Constant tensors as index arithmetic: what is found holds for every value."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attnfuse.passes.lift.constant import COLUMN, ROW, formula_of
from attnfuse.reference import Scope, evaluate
from attnfuse.score import Index, rewrite, text

INF = float("inf")
ONES = torch.ones(12, 12, dtype=torch.bool)


def value_of(tensor: Tensor, starts: tuple[int, ...] | None = None) -> tuple[str, Tensor] | None:
    """The formula in words, and its value all over the tensor."""
    starts = starts or (0,) * tensor.dim()
    found = formula_of(tensor, starts)
    if found is None:
        return None
    spans = [(start, start + size) for start, size in zip(starts, tensor.shape, strict=True)]
    rows, columns = [(0, 1), (0, 1), *(spans[dim] for dim in found.dims)][-2:]
    named = {ROW: Index("m"), COLUMN: Index("n")}
    expr = rewrite(found.expr, lambda part: named.get(part, part) if isinstance(part, Index) else part)
    scope = Scope(((0, 1), rows, columns), (), (), torch.float64, torch.device("cpu"))
    full = evaluate(expr, scope).expand(1, rows[1] - rows[0], columns[1] - columns[0])
    return text(expr), full.reshape(tensor.shape)


@pytest.mark.parametrize(
    ("tensor", "words"),
    [
        (ONES.tril(), "n <= m + 0"),
        (~ONES.tril(), "~(n <= m + 0)"),
        (ONES.tril(3) & ONES.triu(-2), "(n >= m + -2) & (n <= m + 3)"),
        (ONES.tril() ^ ONES.tril(-4), "(n >= m + -3) & (n <= m + 0)"),
        (torch.zeros(12, 12).masked_fill(~ONES.tril(), -INF), "where(n <= m + 0, 0.0, -inf)"),
        (torch.ones(1, 1, 12, 12).tril(), "where(n <= m + 0, 1.0, 0.0)"),
        (ONES.tril() | (torch.arange(12) < 5), "(n <= m + 0) | (n < 5)"),
        (torch.arange(12) < 5, "n <= 4"),
        ((torch.arange(12) < 5).expand(12, 12), "n < 5"),
        (torch.block_diag(*[torch.ones(4, 4)] * 3) > 0, "m // 4 == n // 4"),
        ((torch.block_diag(*[torch.ones(4, 4)] * 3) > 0).tril(), "(m // 4 == n // 4) & (n <= m + 0)"),
        (torch.arange(3, 27, 2), "2 * n + 3"),
        (torch.full((5, 7), 2.5), "2.5"),
        (torch.full((1, 7), 3), "3"),
        (torch.tensor(False), "False"),
        (torch.tensor([[True, False], [False, True]]), "(n >= m + 0) & (n <= m + 0)"),
        (torch.randn(4, 4), None),
        (torch.tensor([0.0, float("nan")]), None),
        (torch.ones(3, 4, 5), None),
    ],
)
def test_what_is_found(tensor: Tensor, words: str | None) -> None:
    found = value_of(tensor)
    assert (found and found[0]) == words
    assert found is None or torch.equal(found[1].to(tensor.dtype), tensor)


def test_a_part_is_told_in_positions_of_the_whole() -> None:
    found = value_of(ONES.tril()[4:9, 2:12], (4, 2))
    assert found is not None
    assert found[0] == "n <= m + 0"


MASKS: tuple[Callable[[int], Tensor], ...] = (
    ONES.tril,
    ONES.triu,
    lambda offset: ONES.tril(offset) & ONES.triu(offset - 4),
    lambda offset: ONES.tril() | (torch.arange(12) < offset),
)


@given(
    st.sampled_from(MASKS),
    st.integers(-12, 12),
    st.lists(st.tuples(st.integers(0, 11), st.integers(0, 11)), max_size=2),
)
def test_one_wrong_value_is_seen(mask: Callable[[int], Tensor], offset: int, flips: list[tuple[int, int]]) -> None:
    tensor = mask(offset).clone()
    for row, column in flips:
        tensor[row, column] = ~tensor[row, column]
    found = value_of(tensor)
    assert found is None or torch.equal(found[1].bool(), tensor)
    assert found is not None or flips
