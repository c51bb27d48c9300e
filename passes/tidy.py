"""Erases what a fusion left without users, and nothing else.

A Dynamo graph must not be swept for dead code (a ``copy_`` without users is a side effect), so the walk starts
at the replaced node and goes up through calls that are known to be pure.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable

from torch.fx import Node

from attnfuse.graph import facts
from attnfuse.graph.capture import Captured

__all__ = ["tidy"]

#: Calls without a result that only assert; they go with what they look at.
_ASSERTIONS = ("_assert_tensor_metadata",)


def tidy(captured: Captured, replaced: Iterable[Node], local_writes: frozenset[Node]) -> int:
    """Erases the ``replaced`` nodes of ``captured.aten`` and all that only they needed; returns how many nodes.

    ``local_writes`` are in-place calls whose effect nobody else sees.
    """
    writes = {node for node in captured.aten.nodes if facts.is_mutating(node) and captured.is_given(node)}
    kept = frozenset(captured.at_home(node) for node in writes - local_writes)
    local = frozenset(captured.at_home(node) for node in writes & local_writes)
    stack = [captured.at_home(node) for node in replaced]
    erased = 0
    while stack:
        node = stack.pop()
        if node._erased or not _is_erasable(node, kept, local):
            continue
        arguments = node.all_input_nodes
        for user in list(node.users):
            node.graph.erase_node(user)
        node.graph.erase_node(node)
        erased += 1
        stack += arguments
    return erased


def _is_erasable(node: Node, kept: frozenset[Node], local: frozenset[Node]) -> bool:
    is_call = node.op in ("call_function", "call_method", "get_attr")
    return is_call and node not in kept and all(_goes_with(user, local) for user in node.users)


def _goes_with(user: Node, local: frozenset[Node]) -> bool:
    """Whether nobody uses what a user returns, and it is pure, only asserts something, or writes locally."""
    if user.users:
        return False
    is_pure = user.target is operator.getitem or (facts.is_aten(user) and not facts.is_mutating(user))
    return is_pure or user in local or facts.op_name(user) in _ASSERTIONS
