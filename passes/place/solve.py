"""The cheapest layouts, exactly: two labels and pairwise prices are a minimum cut.

A copy that several read is a variable of its own, in its layout as soon as one reader is: so it is paid once. (Greig,
Porteous and Seheult 1989, https://doi.org/10.1111/j.2517-6161.1989.tb01764.x; the shared copies as in Kolmogorov and
Zabih 2004, https://doi.org/10.1109/TPAMI.2004.1262177.)
"""

from __future__ import annotations

from collections import defaultdict

from attnfuse.passes.place.energy import Energy
from attnfuse.passes.place.problem import IMPOSSIBLE, Labels, Problem, Value

__all__ = ["solve"]

#: Prices become whole attoseconds, so that sums are exact.
_ATTOSECONDS = 10**18


def solve(problem: Problem) -> Labels:
    """The layouts with the least :meth:`Problem.cost`; of several, those that change the fewest values."""
    energy = _Writer(problem).energy()
    labels = energy.minimum()
    return tuple(labels[i] for i in range(len(problem.values)))


class _Writer:
    """A problem as an energy in whole numbers."""

    def __init__(self, problem: Problem) -> None:
        self._values = problem.values
        finite = [s for v in problem.values for p in (v.price, v.copy) for s in (p.d, p.n) if s != IMPOSSIBLE]
        # a change costs one unit, less than any real difference
        self._unit = len(problem.values) + 1
        self._never = (round(sum(finite) * _ATTOSECONDS) + len(finite) + 1) * self._unit + self._unit
        self._energy = Energy()

    def energy(self) -> Energy:
        """The sum of all prices."""
        readers = defaultdict(list)
        for i, value in enumerate(self._values):
            for read in dict.fromkeys(value.reads):
                readers[read].append(i)
        for i, value in enumerate(self._values):
            self._held(i, value)
            self._copied(i, value, readers[i])
        return self._energy

    def _price(self, seconds: float) -> int:
        return self._never if seconds == IMPOSSIBLE else round(seconds * _ATTOSECONDS) * self._unit

    def _held(self, i: int, value: Value) -> None:
        changed = (int(value.today == "n"), int(value.today == "d"))
        self._energy.add(i, self._price(value.price.d) + changed[0], self._price(value.price.n) + changed[1])
        for to in value.tied:
            self._energy.add_pair(i, to, self._never)
            self._energy.add_pair(to, i, self._never)

    def _copied(self, i: int, value: Value, readers: list[int]) -> None:
        """An n-minor copy is paid when the value is d-minor and a reader is not; and the other way round."""
        d, n = self._price(value.copy.d), self._price(value.copy.n)
        if len(readers) == 1:
            self._energy.add_pair(i, readers[0], n)
            self._energy.add_pair(readers[0], i, d)
            return
        for reader in readers:
            self._energy.add_pair((i, "n"), reader, self._never)
            self._energy.add_pair(reader, (i, "d"), self._never)
        if readers:
            self._energy.add_pair(i, (i, "n"), n)
            self._energy.add_pair((i, "d"), i, d)
            self._energy.add((i, "n"), 0, 0)
            self._energy.add((i, "d"), 0, 0)
