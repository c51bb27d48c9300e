"""Fake values of nodes whose operands changed how they lie."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from contextlib import nullcontext
from typing import Any

from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from attnfuse.graph import facts
from attnfuse.graph.capture import fake_mode_of

__all__ = ["refresh"]


def refresh(graph: Graph, changed: Iterable[Node], among: Collection[Node] | None = None) -> None:
    """Computes again the fake values of all that reads ``changed``, as far as strides differ, or of some of it.

    Values that are no tensors, and those of nested graphs and of calls that write, are left as they are.
    """
    stale = {user for node in changed for user in node.users}
    with fake_mode_of(graph) or nullcontext():
        for node in graph.nodes if stale else ():
            if node in stale and (among is None or node in among) and _lies_elsewhere(node):
                stale.update(node.users)


def _lies_elsewhere(node: Node) -> bool:
    """Whether a node's value, computed again, has other strides; it is kept then."""
    before = _strides(facts.value(node))
    if not before or facts.is_mutating(node) or isinstance(node.target, HigherOrderOperator):
        return False
    args, kwargs = map_arg((node.args, node.kwargs), facts.value)
    if node.op == "call_function":
        found = node.target(*args, **kwargs)  # type: ignore[operator]  # a function
    elif node.op == "call_method":
        found = getattr(args[0], str(node.target))(*args[1:], **kwargs)
    else:
        return False
    node.meta["val" if "val" in node.meta else "example_value"] = found
    return _strides(found) != before


def _strides(value: Any) -> list[tuple[int, ...]]:
    many = value if isinstance(value, (tuple, list)) else (value,)
    return [part.stride() for part in many if isinstance(part, Tensor)]
