"""Where transposes go: extracts the question from a graph, answers it exactly, and edits the graph accordingly."""

from __future__ import annotations

from attnfuse.passes.place.apply import Arranged, arrange, orders
from attnfuse.passes.place.decide import Decision, decide, fixed_rules
from attnfuse.passes.place.describe import described
from attnfuse.passes.place.extract import Region, extract
from attnfuse.passes.place.problem import IMPOSSIBLE, Labels, Price, Problem, Value
from attnfuse.passes.place.solve import solve

__all__ = [
    "IMPOSSIBLE",
    "Arranged",
    "Decision",
    "Labels",
    "Price",
    "Problem",
    "Region",
    "Value",
    "arrange",
    "decide",
    "described",
    "extract",
    "fixed_rules",
    "orders",
    "solve",
]
