"""Puts a plan's replacement where its site is. One transaction: what was there stays until the new nodes stand."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from torch.fx import Node

from attnfuse.graph.build import Builder
from attnfuse.graph.capture import Captured
from attnfuse.passes.lower.choose import Plan

__all__ = ["apply"]


def apply(plan: Plan, captured: Captured, given: Mapping[Node, Node] = MappingProxyType({})) -> Node:
    """Inserts the replacement and gives it the site's users; the site's second contraction is left without any.

    ``given`` are nodes of the edited graph to be read for some of the inputs.
    """
    old = captured.at_home(plan.attention.site.node)
    builder = Builder(captured.module.graph, before=old)
    new = builder.inline(plan.replacement, [given.get(node) or captured.at_home(node) for node in plan.inputs])
    old.replace_all_uses_with(new)
    return new
