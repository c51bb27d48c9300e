"""Sums of prices of two-label variables and of pairs of them, and their exact minimum.

A pair's price is paid when the first is ``d`` and the second ``n``; whatever a minimum cut can express is a sum of
such prices. A variable with at most two neighbours is eliminated: its best label for each of theirs becomes a price
of theirs, which is such a pair's again. Chains and trees vanish so, in linear time; what remains is cut.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Hashable
from dataclasses import dataclass, field

import networkx as nx
from networkx.algorithms.flow import boykov_kolmogorov

from attnfuse.axes import Minor

__all__ = ["Energy"]

Labels = dict[Hashable, Minor]

_D, _N = ("cut", "d"), ("cut", "n")


@dataclass
class Energy:
    """``alone[x]`` are the prices of ``x`` as d and as n, ``pairs[x][y]`` that of ``x`` as d beside ``y`` as n."""

    alone: dict[Hashable, list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0]))
    pairs: dict[Hashable, dict[Hashable, int]] = field(default_factory=lambda: defaultdict(dict))

    def add(self, x: Hashable, d: int, n: int) -> None:
        """Adds to the prices of ``x`` alone."""
        self.alone[x][0] += d
        self.alone[x][1] += n

    def add_pair(self, x: Hashable, y: Hashable, price: int) -> None:
        """Adds to the price of ``x`` as d beside ``y`` as n; not negative."""
        self.pairs[x][y] = self.pairs[x].get(y, 0) + price
        self.pairs[y].setdefault(x, 0)

    def minimum(self) -> Labels:
        """The labels with the least sum. Consumes the energy."""
        eliminated = self._eliminated()
        labels = self._cut()
        for x, alone, neighbours in reversed(eliminated):
            prices = [_beside(alone[at], label, neighbours, labels) for at, label in enumerate(_LABELS)]
            labels[x] = "d" if prices[0] <= prices[1] else "n"
        return labels

    def _eliminated(self) -> list[tuple[Hashable, list[int], dict[Hashable, tuple[int, int]]]]:
        """Removes variables with at most two neighbours; what each was, in the order of removal."""
        gone = []
        stack = list(self.alone)
        while stack:
            x = stack.pop()
            if x not in self.alone or len(self.pairs[x]) > 2:
                continue
            neighbours = {y: (self.pairs[x][y], self.pairs[y][x]) for y in self.pairs[x]}
            gone.append((x, self.alone[x], neighbours))
            self._remove(x, neighbours)
            stack += neighbours
        return gone

    def _remove(self, x: Hashable, neighbours: dict[Hashable, tuple[int, int]]) -> None:
        alone = self.alone.pop(x)
        del self.pairs[x]
        for y in neighbours:
            del self.pairs[y][x]

        def best(labels: Labels) -> int:
            return min(_beside(alone[at], label, neighbours, labels) for at, label in enumerate(_LABELS))

        match list(neighbours):
            case [y]:
                self.add(y, best({y: "d"}), best({y: "n"}))
            case [y, z]:
                dd, dn, nd, nn = (best({y: a, z: b}) for a in _LABELS for b in _LABELS)
                self.add(y, dd, nd)
                self.add(z, 0, nn - nd)
                self.add_pair(y, z, dn + nd - dd - nn)

    def _cut(self) -> Labels:
        """What is left, as a minimum cut: d on the side of the source."""
        graph = nx.DiGraph()
        graph.add_nodes_from((_D, _N))
        for x, (d, n) in self.alone.items():
            least = min(d, n)
            graph.add_edge(x, _N, capacity=d - least)
            graph.add_edge(_D, x, capacity=n - least)
        graph.add_edges_from((x, y, {"capacity": price}) for x, to in self.pairs.items() for y, price in to.items())
        _, (d_side, _) = nx.minimum_cut(graph, _D, _N, flow_func=boykov_kolmogorov)
        return {x: "d" if x in d_side else "n" for x in self.alone}


_LABELS: tuple[Minor, Minor] = ("d", "n")


def _beside(alone: int, label: Minor, neighbours: dict[Hashable, tuple[int, int]], labels: Labels) -> int:
    """The price of a label beside neighbours, whose first price is paid where this is d and they are n."""
    return alone + sum(price[0] if label == "d" else price[1] for y, price in neighbours.items() if labels[y] != label)
