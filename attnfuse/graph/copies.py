"""Graph modules whose graphs can be edited without anybody noticing."""

from __future__ import annotations

from torch.fx import Graph, GraphModule

__all__ = ["copied"]


def copied(gm: GraphModule) -> GraphModule:
    """A graph module with graphs of its own, nested ones too, over the same tensors."""
    graph = Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    copy = GraphModule(gm, graph)
    for name, child in gm.named_children():
        if isinstance(child, GraphModule):
            setattr(copy, name, copied(child))
    return copy
