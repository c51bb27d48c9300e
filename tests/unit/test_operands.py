"""What operands say of themselves."""

from __future__ import annotations

import pytest
import torch

from attnfuse.operands import Operands


def made(rows: int = 3, keys: int = 5, width: int = 8, value_width: int = 4) -> Operands:
    query, key, value = (
        torch.ones(1, 4, rows, width),
        torch.ones(1, 2, keys, width),
        torch.ones(1, 2, keys, value_width),
    )
    return Operands(query, key, value, (torch.ones(1, 4, 1, 1), torch.ones(1, 1, rows, keys)), (7,))


def test_tensors_are_in_the_order_of_gradients() -> None:
    given = made()
    expected = (given.query, given.key, given.value, *given.captures)
    assert len(given.tensors) == 5
    assert all(found is each for found, each in zip(given.tensors, expected, strict=True))
    assert all(found is each for found, each in zip(given.qkv, expected[:3], strict=True))


@pytest.mark.parametrize(
    ("sizes", "empty", "scoreless"),
    [
        ({}, False, False),
        ({"rows": 0}, True, True),
        ({"keys": 0}, True, True),
        ({"width": 0}, True, True),
        ({"value_width": 0}, True, False),
    ],
)
def test_sizes_of_zero(sizes: dict[str, int], empty: bool, scoreless: bool) -> None:
    assert (made(**sizes).empty, made(**sizes).scoreless) == (empty, scoreless)


def test_those_of_weights_have_a_value_without_columns() -> None:
    given = made()
    found = Operands.of_weights(given.query, given.key, given.captures, given.symbols)
    assert found.value.shape == (1, 2, 5, 0)
    assert not found.scoreless
    assert found.query is given.query
    assert found.key is given.key
    assert found.captures is given.captures
    assert found.symbols == given.symbols
