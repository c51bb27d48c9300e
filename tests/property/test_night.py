"""Random programs and near misses, a few always, and as many as a night holds under ``--hypothesis-profile=night``."""

from __future__ import annotations

import ast
from collections.abc import Callable

import pytest
from hypothesis import settings

from tests.property import search
from tests.property.misses import changed, ways

#: How many one test tries: a failing test names its seed, and repeats in minutes.
CHUNK = 200
#: How many are tried by day.
FEW = 20


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "first_seed" not in metafunc.fixturenames:
        return
    config, kind = metafunc.config, "misses" if "near" in metafunc.function.__name__ else "programs"
    number = config.getoption(f"--night-{kind}") if _by_night() else FEW
    start = config.getoption("--night-seed") if _by_night() else 0
    chunk = min(CHUNK, number)
    metafunc.parametrize(("number", "first_seed"), [(chunk, start + at) for at in range(-(-number // chunk))])


def _by_night() -> bool:
    return settings().max_examples > 100


def test_random_programs(number: int, first_seed: int, record_property: Callable[[str, object], None]) -> None:
    record_property("tally", ("programs", *_numbers(search.programs(number, 1000 * first_seed))))


def test_near_misses(number: int, first_seed: int, record_property: Callable[[str, object], None]) -> None:
    record_property("tally", ("near misses", *_numbers(search.near_misses(number, 1000 * first_seed))))


def _numbers(tally: search.Tally) -> tuple[int, int, int]:
    assert not tally.stopped, "a rewrite was stopped by its own certificate alone: lift or simplify is wrong"
    return tally.tried, tally.fused, tally.stopped


SOURCE = """def attention(q, k, v):
    keep = torch.ones(M, N, dtype=torch.bool).tril(0)
    return torch.softmax((q @ k.mT * 0.5).masked_fill(~keep, float('-inf')), dim=-1) @ v
"""


def test_a_near_miss_differs_in_one_thing() -> None:
    made = {changed(SOURCE, way) for way in range(ways(SOURCE))}
    assert ast.unparse(ast.parse(SOURCE)) not in made
    assert len(made) == ways(SOURCE)
    for expected in (
        "triu(0)",
        "tril(1)",
        "k.mT * -0.5",
        "float('inf')",
        "dim=-2)",
        "(k @ k.mT",
        "sigmoid",
        "dtype=torch.bool",
    ):
        assert any(expected in source for source in made), expected
