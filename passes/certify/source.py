"""The matched part of the source graph as a module of its own, with the fused node's inputs as its inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.fx import Graph, GraphModule, Node

from attnfuse.graph import facts
from attnfuse.passes.certify.shrink import shrunk_arguments

__all__ = ["Shapes", "source_of"]

_SCALAR = torch.ops.aten.scalar_tensor.default

#: The shape that a node is to have, where it is not the traced one.
Shapes = Mapping[Node, tuple[int, ...]]


def source_of(result: Node, inputs: Sequence[Node], shapes: Shapes) -> tuple[GraphModule, tuple[Node, ...]]:
    """What computes ``result`` from ``inputs``, and all the nodes its placeholders stand for, ``inputs`` first.

    Where the walk reaches another placeholder or attribute before an input, that becomes an input too, unless it is
    a number that the program made a tensor of.
    Nodes in ``shapes`` are made to have that shape, and carry it in ``meta["shape"]``.
    """
    needed = _needed(result, set(inputs))
    numbers = {node: number for node in needed if (number := facts.literal(node)) is not None and node not in inputs}
    leaves = (n for n in needed if n.op in ("placeholder", "get_attr") and n not in inputs and n not in numbers)
    standing = (*inputs, *leaves)
    graph = Graph()
    copies = {node: graph.placeholder(node.name) for node in standing}
    for node in needed:
        if node in numbers:
            copies[node] = graph.call_function(_SCALAR, (numbers[node],), {"dtype": facts.dtype(node)})
        elif node not in copies:
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
