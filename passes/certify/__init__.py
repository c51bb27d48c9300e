"""Replays each matched subgraph beside what will replace it, on inputs made to find a difference."""

from __future__ import annotations

from attnfuse.passes.certify.check import Effort, Replay, certify
from attnfuse.passes.certify.errors import Errors, compare, excused

__all__ = ["Effort", "Errors", "Replay", "certify", "compare", "excused"]
