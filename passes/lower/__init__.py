"""Spec to kernel: chooses one, drafts the replacement, puts it into the graph."""

from __future__ import annotations

from attnfuse.passes.lower.apply import apply
from attnfuse.passes.lower.choose import Plan, Wishes, at_sizes, plan, relaid
from attnfuse.passes.lower.layouts import Prices, demands

__all__ = ["Plan", "Prices", "Wishes", "apply", "at_sizes", "demands", "plan", "relaid"]
