"""The matched part of the source graph as a module of its own, with the fused node's inputs as its inputs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch.fx import Graph, GraphModule, Node

from attnfuse.graph import facts
from attnfuse.passes.certify.modes import entered, leave, switches
from attnfuse.passes.certify.shrink import shrunk_arguments

__all__ = ["Shapes", "fused_of", "independent", "source_of"]

_SCALAR = torch.ops.aten.scalar_tensor.default

#: An input that is made of others is made of them in fewer steps: views, repeats, scales.
_STEPS = 32

#: The shape that a node is to have, where it is not the traced one.
Shapes = Mapping[Node, tuple[int, ...]]


def independent(inputs: Sequence[Node]) -> tuple[Node, ...]:
    """The inputs that are not made of other inputs: drawn apart from these, they would be what they cannot be."""
    return tuple(node for node in inputs if not _is_made_of(node, {*inputs} - {node}))


def _is_made_of(node: Node, others: set[Node]) -> bool:
    seen, stack = {node}, [node]
    while stack:
        each = stack.pop()
        if each in others:
            continue
        if each.op != "call_function" or len(seen) > _STEPS:
            return False
        stack += (arg for arg in each.all_input_nodes if arg not in seen)
        seen.update(each.all_input_nodes)
    return not others.isdisjoint(seen)


def fused_of(replacement: GraphModule, inputs: Sequence[Node], standing: Sequence[Node], shapes: Shapes) -> GraphModule:
    """``replacement``, a function of ``inputs``, as one of ``standing`` alone, of which it makes the others."""
    if len(inputs) == len(standing):
        return replacement
    graph = Graph()
    copies = {node: graph.placeholder(node.name) for node in standing}
    for node in inputs:
        for part in _needed(node, set(copies)):
            if part not in copies:
                copies[part] = _copied(graph, part, copies, shapes)
    taken = [node for node in replacement.graph.nodes if node.op == "placeholder"]
    inside = dict(zip(taken, (copies[node] for node in inputs), strict=True))
    graph.output(graph.graph_copy(replacement.graph, inside))
    return GraphModule(replacement, graph)


def source_of(result: Node, inputs: Sequence[Node], shapes: Shapes) -> tuple[GraphModule, tuple[Node, ...]]:
    """What computes ``result`` from ``inputs``, and all the nodes its placeholders stand for, ``inputs`` first.

    Where the walk reaches another placeholder or attribute before an input, that becomes an input too, unless it is
    a number that the program made a tensor of. Nodes in ``shapes`` are made to have that shape, and carry it in
    ``meta["shape"]``.
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
            copies[node] = _copied(graph, node, copies, shapes)
    leave(graph, (copies[call] for call in entered(result)))
    graph.output(copies[result])
    return GraphModule({}, graph), standing


def _copied(graph: Graph, node: Node, copies: Mapping[Node, Node], shapes: Shapes) -> Node:
    copy = graph.node_copy(node, copies.__getitem__)
    if node in shapes and node.op == "call_function":
        _shape(copy, shapes[node])
    return copy


def _shape(copy: Node, shape: tuple[int, ...]) -> None:
    copy.meta["shape"] = shape
    if changed := shrunk_arguments(copy, shape):
        copy.args, copy.kwargs = (), {**facts.arguments(copy), **changed}


def _needed(result: Node, stop: set[Node]) -> list[Node]:
    """Everything above ``result`` up to ``stop``, and what switches autocast before it, in graph order."""
    seen, stack = {result}, [result]
    while stack:
        node = stack.pop()
        if node in stop:
            continue
        for arg in node.all_input_nodes:
            if arg not in seen:
                seen.add(arg)
                stack.append(arg)
    return [node for node in _upto(result) if node in seen or switches(node)]


def _upto(last: Node) -> list[Node]:
    nodes: list[Node] = []
    node = last
    while node.op != "root":
        nodes.append(node)
        node = node.prev
    return nodes[::-1]
