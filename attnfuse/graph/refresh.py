"""Fake values of nodes whose operands changed how they lie."""

from __future__ import annotations

from collections.abc import Collection
from contextlib import nullcontext
from typing import Any

from torch import Tensor
from torch._ops import HigherOrderOperator
from torch.fx import Graph, Node
from torch.fx.node import map_arg

from attnfuse.graph import facts
from attnfuse.graph.capture import fake_mode_of

__all__ = ["refresh"]


def refresh(graph: Graph, stale: Collection[Node], among: Collection[Node] | None = None) -> None:
    """Computes again the fake values of ``stale`` nodes, and of all that reads them as far as strides differ.

    ``among`` are the nodes to which that is limited. Values that are no tensors, and those of nested graphs and of
    calls that write, are left as they are; so are fused nodes, whose results lie as they always do.
    """
    waiting = set(stale)
    with fake_mode_of(graph) or nullcontext():
        for node in graph.nodes if waiting else ():
            if node in waiting and (among is None or node in among) and _lies_elsewhere(node):
                waiting.update(node.users)


def _lies_elsewhere(node: Node) -> bool:
    """Whether a node's value, computed again, has other strides; it is kept then."""
    before = _strides(facts.value(node))
    fixed = facts.is_mutating(node) or facts.op_name(node) == "attention"
    if not before or fixed or isinstance(node.target, HigherOrderOperator):
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
