"""Random layout problems, and their answer by trying everything."""

from __future__ import annotations

from itertools import product

from hypothesis import strategies as st

from attnfuse.passes.place import IMPOSSIBLE, Labels, Price, Problem, Value

_SECONDS = st.sampled_from((0.0, 0.0, 1e-6, 2e-6, 3e-6, 0.1, 0.2, 0.3)) | st.floats(0.0, 1.0)


@st.composite
def problems(draw: st.DrawFn, most: int = 10) -> Problem:
    """Any graph of up to ``most`` values; what the source does is always possible."""
    values: list[Value] = []
    for i in range(draw(st.integers(1, most))):
        today = draw(st.sampled_from("dn"))
        prices = {minor: draw(_SECONDS) for minor in "dn"}
        earlier = st.lists(st.integers(0, i - 1), max_size=3, unique=True) if i else st.just([])
        reads = draw(earlier)
        tied = [j for j in draw(earlier) if values[j].today == today and j not in reads][:1]
        if draw(st.integers(0, 3)) == 0:
            prices["n" if today == "d" else "d"] = IMPOSSIBLE
        copy = Price(draw(_SECONDS), draw(_SECONDS))
        values.append(Value(f"v{i}", Price(**prices), copy, tuple(reads), tuple(tied), today))
    return Problem(tuple(values))


def best_by_trial(problem: Problem) -> tuple[float, Labels]:
    """The least cost, and of the labels that have it (to within rounding) those with the fewest changes."""
    tried = [(problem.cost(labels), labels) for labels in product("dn", repeat=len(problem.values))]
    least = min(cost for cost, _ in tried)
    cheapest = (labels for cost, labels in tried if cost <= least + 1e-12)
    return least, min(cheapest, key=lambda labels: sum(map(str.__ne__, labels, problem.today)))
