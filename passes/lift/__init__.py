"""Graph to algebra: finds attention by reading the graph at symbolic indices. Mutates nothing."""

from __future__ import annotations

from attnfuse.passes.lift.spine import lift

__all__ = ["lift"]
