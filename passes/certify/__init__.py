"""Replays each matched subgraph beside what will replace it, on inputs made to find a difference."""

from __future__ import annotations

from attnfuse.passes.certify.check import Effort, Replay, certify

__all__ = ["Effort", "Replay", "certify"]
