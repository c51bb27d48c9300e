"""The solver is exact, never worse than a fixed rule, and fast."""

from __future__ import annotations

import random
import time
from timeit import timeit

import pytest
from hypothesis import given

from attnfuse.passes.place import IMPOSSIBLE, Labels, Price, Problem, Value, solve
from tests.place.problems import best_by_trial, problems


@given(problems())
def test_no_assignment_is_cheaper(problem: Problem) -> None:
    least, nearest = best_by_trial(problem)
    found = solve(problem)
    assert problem.cost(found) == pytest.approx(least, abs=1e-12)
    assert sum(map(str.__ne__, found, problem.today)) <= sum(map(str.__ne__, nearest, problem.today))


@given(problems())
def test_never_above_a_fixed_rule(problem: Problem) -> None:
    found = problem.cost(solve(problem))
    everywhere = [tuple("n" if v.price.n < IMPOSSIBLE else "d" for v in problem.values)]
    everywhere += [tuple("d" if v.price.d < IMPOSSIBLE else "n" for v in problem.values)]
    assert all(found <= problem.cost(labels) + 1e-12 for labels in (problem.today, *everywhere))


def test_a_copy_that_many_read_is_paid_once() -> None:
    source = Value("input", Price.only("d"), Price(n=3.0))
    kernels = [Value(f"kernel{i}", Price(d=2.0), reads=(0,)) for i in range(2)]
    assert solve(Problem((source, kernels[0]))) == ("d", "d")
    assert solve(Problem((source, *kernels))) == ("d", "n", "n")
    assert Problem((source, *kernels)).cost(("d", "n", "n")) == 3.0


def test_of_equal_prices_the_source_wins() -> None:
    problem = Problem((Value("linear", today="n"), Value("kernel", Price(1.0, 1.0), reads=(0,), today="n")))
    assert solve(problem) == ("n", "n")


def test_tied_values_share_a_layout() -> None:
    whole = Value("split", Price(), Price(1.0, 1.0))
    parts = [Value("key", Price(n=5.0), tied=(0,)), Value("value", Price(d=2.0), tied=(0,))]
    assert solve(Problem((whole, *parts))) == ("d", "d", "d")


@pytest.mark.parametrize("branching", [0.0, 0.2])
def test_thousands_of_values_take_well_under_a_second(branching: float) -> None:
    problem, found = _long(4000, branching), list[Labels]()
    # the garbage of other tests is not collected meanwhile, and other processes do not count
    assert timeit(lambda: found.append(solve(problem)), number=1, timer=time.process_time) < 1.0
    _assert_best(problem, found[0])


def _assert_best(problem: Problem, found: Labels) -> None:
    assert problem.cost(found) <= problem.cost(problem.today)
    # one value changed alone would be found if it paid
    for i in random.Random(0).sample(range(4000), 50):
        flipped = (*found[:i], "n" if found[i] == "d" else "d", *found[i + 1 :])
        assert problem.cost(flipped) >= problem.cost(found) - 1e-12


def _long(length: int, branching: float) -> Problem:
    """A chain whose values now and then read another of the twenty before them too."""
    draw = random.Random(0)
    values = []
    for i in range(length):
        reads = {max(i - 1, 0)} | ({draw.randrange(max(0, i - 20), i)} if i and draw.random() < branching else set())
        price = Price(*(draw.random() if draw.random() < 0.3 else 0.0 for _ in "dn"))
        copy = Price(draw.random(), draw.random())
        values.append(Value(f"v{i}", price, copy, tuple(sorted(reads)) if i else ()))
    return Problem(tuple(values))
