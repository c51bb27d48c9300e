"""Counts attention in a graph, in a way that shares nothing with the passes under test.

A site is a softmax with a product of two activations on the way to it and another on the way from it,
and no further product, projection or softmax on either way. A router's softmax has projections on both
sides and so is no site.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch.fx import GraphModule, Node

__all__ = ["count"]

PRODUCTS = frozenset({"matmul", "bmm", "baddbmm", "einsum"})
SOFTMAXES = frozenset({"softmax", "_softmax"})
#: Where a way ends: what lies behind is another computation.
ENDS = PRODUCTS | SOFTMAXES | {"linear", "addmm", "mm", "conv2d", "convolution", "embedding", "layer_norm", "topk"}


def count(program: GraphModule) -> int:
    """The number of attention sites of a Dynamo or ATen graph, those of its submodules included."""
    graphs = [module.graph for module in program.modules() if isinstance(module, GraphModule)]
    return sum(_is_site(node) for graph in graphs for node in graph.nodes)


def _is_site(node: Node) -> bool:
    return (
        _operation(node) in SOFTMAXES
        and _meets_product(node, lambda at: at.all_input_nodes)
        and _meets_product(node, lambda at: at.users)
    )


def _meets_product(start: Node, onward: Callable[[Node], Iterable[Node]]) -> bool:
    seen, todo = {start}, list(onward(start))
    while todo:
        node = todo.pop()
        name = _operation(node)
        if name in PRODUCTS:
            return True
        if node not in seen and name not in ENDS:
            seen.add(node)
            todo.extend(onward(node))
    return False


def _operation(node: Node) -> str:
    """``softmax`` for ``aten.softmax.int``, ``F.softmax`` and ``x.softmax()`` alike."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return node.op
    packet = getattr(node.target, "overloadpacket", node.target)
    return getattr(packet, "__name__", str(packet))
