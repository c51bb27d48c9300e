"""Algebra to :class:`~attnfuse.spec.AttentionSpec`: roles, names, the canonical program."""

from __future__ import annotations

from attnfuse.passes.simplify.canonical import simplify

__all__ = ["simplify"]
