"""The matched part of the source graph as a module of its own, with the fused node's inputs as its inputs."""

from __future__ import annotations

from collections.abc import Sequence

from torch.fx import Graph, GraphModule, Node

__all__ = ["source_of"]


def source_of(result: Node, inputs: Sequence[Node]) -> tuple[GraphModule, tuple[Node, ...]]:
    """What computes ``result`` from ``inputs``, and all the nodes its placeholders stand for, ``inputs`` first.

    Where the walk reaches another placeholder or attribute before an input, that becomes an input too.
    """
    needed = _needed(result, set(inputs))
    leaves = (node for node in needed if node.op in ("placeholder", "get_attr") and node not in inputs)
    standing = (*inputs, *leaves)
    graph = Graph()
    copies = {node: graph.placeholder(node.name) for node in standing}
    for node in needed:
        if node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[result])
    return GraphModule({}, graph), standing


def _needed(result: Node, stop: set[Node]) -> list[Node]:
    """Everything above ``result`` up to ``stop``, in graph order."""
    seen, stack = {result}, [result]
    while stack:
        node = stack.pop()
        if node in stop:
            continue
        for arg in node.all_input_nodes:
            if arg not in seen:
                seen.add(arg)
                stack.append(arg)
    return [node for node in _upto(result) if node in seen]


def _upto(last: Node) -> list[Node]:
    nodes: list[Node] = []
    node = last
    while node.op != "root":
        nodes.append(node)
        node = node.prev
    return nodes[::-1]
