"""Roundings that fall otherwise: which numbers they move, and how far."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from attnfuse.graph.double import run_in_double
from tests.support.record import recorded

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def _runs(program: Callable[..., Any], *args: Tensor, times: int = 20) -> Tensor:
    """What the program gives, rounded by chance so many times, one below the other."""
    graph = recorded(program, [x.clone() for x in args])
    random = torch.Generator().manual_seed(0)
    return torch.stack([run_in_double(graph, [x.double() for x in args], random) for _ in range(times)])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_result_becomes_one_of_its_two_neighbours(dtype: torch.dtype) -> None:
    x, y = torch.tensor([1.0, 3.0, -7.0]).to(dtype), torch.tensor([3.0, 7.0, 3.0]).to(dtype)
    exact, found = x.double() / y.double(), _runs(torch.div, x, y)
    assert torch.equal(found, found.to(dtype).double())
    last_place = torch.finfo(dtype).eps * torch.tensor([0.25, 0.25, 2.0])
    assert ((found - exact).abs() < last_place).all()
    assert all(len(each.unique()) == 2 for each in found.T)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_the_dtype_has_is_not_moved(dtype: torch.dtype) -> None:
    x = torch.tensor([0.0, 1.0, -0.375, float("-inf"), torch.finfo(dtype).min]).to(dtype)
    assert torch.equal(_runs(lambda x: x * 1.0, x), x.double().expand(20, -1))


def test_what_overflows_is_left_to_the_source() -> None:
    x = torch.tensor([60000.0], dtype=torch.float16)
    assert torch.equal(_runs(lambda x: x * 2, x), torch.full((20, 1), 120000.0, dtype=torch.float64))


def test_a_lowest_number_that_swallows_what_it_is_added_to_still_does() -> None:
    x = torch.randn(5)
    lowest = torch.finfo(torch.float32).min
    assert (_runs(lambda x: x + lowest, x) == lowest).all()


def test_whoever_shares_a_tensor_sees_how_it_was_rounded() -> None:
    def program(x: Tensor) -> Tensor:
        y = x * 1.0
        y.view(-1).add_(1e4)
        return y

    found = _runs(program, torch.rand(2, 3))
    assert torch.equal(found, found.float().double())
    assert all(len(each.unique()) == 2 for each in found.flatten(1).T)


def test_a_cast_rounds_its_result_and_not_its_argument() -> None:
    x = torch.tensor([1.0 + 2.0**-20])
    found = _runs(lambda x: x.to(torch.bfloat16).float() - x, x, times=2000)
    # down to 1 nearly always, up by an eps of bfloat16 once in 2^13 times
    assert set(found.unique().tolist()) <= {-(2.0**-20), 2.0**-7 - 2.0**-20}
