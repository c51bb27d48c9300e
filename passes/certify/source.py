"""The matched part of the source graph as a module of its own, with the fused node's inputs as its inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch.fx import Graph, GraphModule, Node

from attnfuse.graph import facts
from attnfuse.passes.certify.shrink import shrunk_arguments

__all__ = ["Shapes", "source_of"]

#: The shape that a node is to have, where it is not the traced one.
Shapes = Mapping[Node, tuple[int, ...]]


def source_of(result: Node, inputs: Sequence[Node], shapes: Shapes) -> tuple[GraphModule, tuple[Node, ...]]:
    """What computes ``result`` from ``inputs``, and all the nodes its placeholders stand for, ``inputs`` first.

    Where the walk reaches another placeholder or attribute before an input, that becomes an input too.
    Nodes in ``shapes`` are made to have that shape, and carry it in ``meta["shape"]``.
    """
    needed = _needed(result, set(inputs))
    leaves = (node for node in needed if node.op in ("placeholder", "get_attr") and node not in inputs)
    standing = (*inputs, *leaves)
    graph = Graph()
    copies = {node: graph.placeholder(node.name) for node in standing}
    for node in needed:
        if node not in copies:
            copies[node] = graph.node_copy(node, copies.__getitem__)
            if node in shapes and node.op == "call_function":
                _shape(copies[node], shapes[node])
    graph.output(copies[result])
    return GraphModule({}, graph), standing


def _shape(copy: Node, shape: tuple[int, ...]) -> None:
    copy.meta["shape"] = shape
    if changed := shrunk_arguments(copy, shape):
        copy.args, copy.kwargs = (), {**facts.arguments(copy), **changed}


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
