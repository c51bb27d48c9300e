"""Documents that a model numbers by itself: seen through where numbers alone decide, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from attnfuse.report import Report
from tests.support.compare import assert_as_good
from tests.support.doors import rewritten
from tests.support.never_wrong import qkv

LEAST = torch.finfo(torch.float32).min


class Numbered(nn.Module):
    """Attention within documents, numbered by the jumps of positions as transformers numbers them."""

    def __init__(self, positions: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.positions = positions

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        positions = self.positions(q)
        jumps = torch.diff(positions, prepend=positions[:, :1] - 1, dim=-1) != 1
        document = jumps.cumsum(-1)
        rows = torch.arange(q.shape[-2], device=q.device)
        keep = (rows[None, :] <= rows[:, None]) & (document[:, None, :, None] == document[:, None, None, :])
        return torch.softmax(torch.where(keep, q @ k.mT * 0.3, LEAST), -1) @ v


def arange(q: Tensor) -> Tensor:
    return torch.arange(q.shape[-2], device=q.device).unsqueeze(0)


def halves(q: Tensor) -> Tensor:
    return arange(q) % (q.shape[-2] // 2)


def written_over(q: Tensor) -> Tensor:
    positions = arange(q).clone()
    positions[:, 5:].add_(7)
    return positions


def of_the_data(q: Tensor) -> Tensor:
    return arange(q) + (q[0, 0, :, 0] > 0).long()


def drawn(q: Tensor) -> Tensor:
    return arange(q) + torch.randint(0, 2, (1, q.shape[-2]), device=q.device) * 0


def checked(door: str, positions: Callable[[Tensor], Tensor], *, dynamic: bool = False) -> Report:
    args = qkv(rows=24, keys=24)
    module = Numbered(positions)
    program = rewritten(door, module, args, dynamic)
    assert_as_good(program.run(*args), module(*args), module(*(x.double() for x in args)))
    return program.report


def test_positions_in_order_are_one_document(door: str) -> None:
    assert checked(door, arange).fused[0].what == "scale 0.3, causal"


@pytest.mark.parametrize("positions", [halves, written_over, of_the_data, drawn])
def test_what_more_than_numbers_decides_stays_a_tensor(door: str, positions: Callable[[Tensor], Tensor]) -> None:
    assert checked(door, positions).fused[0].what != "scale 0.3, causal"


def test_a_length_that_may_change_is_no_number(door: str) -> None:
    assert checked(door, arange, dynamic=True).fused
