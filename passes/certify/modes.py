"""Autocast that a program switches on and off itself: a part of it that is run alone must be run in the same modes."""

from __future__ import annotations

from collections.abc import Iterable

from torch.amp.autocast_mode import _enter_autocast, _exit_autocast  # what Dynamo calls where a program does so
from torch.fx import Graph, GraphModule, Node

__all__ = ["entered", "leave", "switches", "within"]


def switches(node: Node) -> bool:
    """Whether a node enters or leaves autocast."""
    return node.target is _enter_autocast or node.target is _exit_autocast


def entered(node: Node) -> tuple[Node, ...]:
    """What the graph has entered, and not left, where ``node`` is computed; outermost first."""
    calls = node.graph.find_nodes(op="call_function", target=_enter_autocast)
    return tuple(call for call in calls if call < node and not any(user < node for user in call.users))


def leave(graph: Graph, calls: Iterable[Node]) -> None:
    """Leaves what ``calls`` of ``graph`` entered, innermost first."""
    for call in reversed(tuple(calls)):
        graph.call_function(_exit_autocast, (call,))


def within(calls: tuple[Node, ...], module: GraphModule) -> GraphModule:
    """``module`` run in what ``calls`` enter."""
    if not calls:
        return module
    graph = Graph()
    inside = {node: graph.node_copy(node) for node in module.graph.nodes if node.op == "placeholder"}
    opened = [graph.node_copy(call) for call in calls]
    result = graph.graph_copy(module.graph, inside)
    leave(graph, opened)
    graph.output(result)
    return GraphModule(module, graph)
