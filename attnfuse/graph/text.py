"""Graphs as stable text, one line a node: what golden files and ``--print-after`` show.

::

    %matmul: f32[2, 4, 16, 8] = matmul(%q, %k)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg

from attnfuse.graph import facts

__all__ = ["kind_of", "render", "shape_of"]

_SHORT = {
    torch.float64: "f64", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16",
    torch.int64: "i64", torch.int32: "i32", torch.int16: "i16", torch.int8: "i8", torch.uint8: "u8", torch.bool: "bool",
}  # fmt: skip


def render(module: GraphModule | Graph) -> str:
    """The graph, and the graphs of nested modules below it, indented."""
    graph = module if isinstance(module, Graph) else module.graph
    lines = list(map(_line, graph.nodes))
    if isinstance(module, GraphModule):
        for name, child in module.named_children():
            if isinstance(child, GraphModule):
                lines += [f"{name}:", *(f"  {line}" for line in render(child).splitlines())]
    return "\n".join(lines)


def shape_of(graph: Graph) -> str:
    """The graph's text with its nodes numbered: equal for two graphs that differ in names alone."""
    numbers = {node: f"%{at}" for at, node in enumerate(graph.nodes)}
    lines = (
        f"{node.op} {kind_of(facts.value(node))} {facts.op_name(node)} {map_arg((node.args, node.kwargs), numbers.get)}"
        for node in graph.nodes
    )
    return "\n".join(lines)


def _line(node: Node) -> str:
    match node.op:
        case "placeholder":
            return f"%{node.name}: {kind_of(facts.value(node))}"
        case "output":
            return f"return {_argument(node.args[0])}"
        case "get_attr":
            return f"%{node.name}: {kind_of(facts.value(node))} = self.{node.target}"
    arguments = ", ".join(_arguments(node))
    return f"%{node.name}: {kind_of(facts.value(node))} = {_called(node)}({arguments})"


def _called(node: Node) -> str:
    if node.op == "call_method":
        return f".{node.target}"
    return facts.op_name(node) or str(node.target)


def _arguments(node: Node) -> Iterator[str]:
    yield from map(_argument, node.args)
    yield from (f"{name}={_argument(value)}" for name, value in node.kwargs.items())


def _argument(value: Any) -> str:
    match value:
        case Node():
            return f"%{value.name}"
        case list() | tuple():
            return f"[{', '.join(map(_argument, value))}]"
        case str():
            return value
    return str(value).removeprefix("torch.")


def kind_of(value: object) -> str:
    """``f32[2, s0]`` of a tensor, the kinds of several, ``int`` and the like of a number."""
    match value:
        case torch.Tensor():
            sizes = ", ".join(map(str, map(facts.size_of, value.shape)))
            return f"{_SHORT.get(value.dtype, str(value.dtype).removeprefix('torch.'))}[{sizes}]"
        case list() | tuple():
            return f"({', '.join(map(kind_of, value))})"
    return type(value).__name__
