"""Dropout's mask: its chance, its independence, and that blocks agree with the whole."""

from __future__ import annotations

import pytest
import torch

from attnfuse.dropout import kept


def mask(seed: int, probability: float, *spans: tuple[int, int]) -> torch.Tensor:
    rank = len(spans)
    indices = [
        torch.arange(*span).view(*(-1 if i == axis else 1 for i in range(rank))) for axis, span in enumerate(spans)
    ]
    return kept(torch.tensor([seed]), probability, indices)


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("seed", [0, 1, 2**62 - 1])
def test_the_chance_of_a_weight(seed: int, probability: float) -> None:
    drawn = mask(seed, probability, (0, 2), (0, 4), (0, 128), (0, 512)).double()
    deviation = (probability * (1 - probability) / drawn.numel()) ** 0.5
    assert abs(drawn.mean().item() - (1 - probability)) <= 5 * deviation


def test_a_block_draws_what_the_whole_draws() -> None:
    whole = mask(7, 0.3, (0, 3), (0, 4), (0, 20), (0, 30))
    assert torch.equal(mask(7, 0.3, (1, 2), (2, 4), (5, 17), (11, 30)), whole[1:2, 2:4, 5:17, 11:])


@pytest.mark.parametrize("axis", [0, 1, 2, 3])
def test_neighbours_along_every_axis_are_independent(axis: int) -> None:
    drawn = mask(11, 0.5, (0, 8), (0, 8), (0, 64), (0, 64)).double() * 2 - 1
    shifted = drawn.roll(1, dims=axis)
    # a mean of products of independent signs: five standard errors
    assert abs((drawn * shifted).mean().item()) < 5 / drawn.numel() ** 0.5


def test_neighbouring_seeds_are_independent() -> None:
    one, two = (mask(seed, 0.5, (0, 64), (0, 1024)).double() * 2 - 1 for seed in (5, 6))
    assert abs((one * two).mean().item()) < 5 / one.numel() ** 0.5


def test_rows_do_not_repeat() -> None:
    rows = mask(3, 0.5, (0, 2), (0, 8), (0, 256), (0, 64)).flatten(0, 2)
    assert len(torch.unique(rows, dim=0)) == len(rows)
