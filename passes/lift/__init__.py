"""Graph to algebra: finds attention by reading the graph at symbolic indices. Mutates nothing."""

from __future__ import annotations

from attnfuse.passes.lift.constant import Constants
from attnfuse.passes.lift.spine import Given, lift

__all__ = ["Constants", "Given", "lift"]
