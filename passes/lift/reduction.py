"""Reductions over one dimension: the maximum, sum and logsumexp that people write softmax with, and "any"."""

from __future__ import annotations

from torch.fx import Node

from attnfuse.axes import Index, Unreadable
from attnfuse.graph import facts
from attnfuse.passes.lift.atoms import Dot, Place, Reduced
from attnfuse.passes.lift.pointwise import POINTWISE
from attnfuse.passes.lift.reader import Arguments, Reader, Rule
from attnfuse.passes.lift.view import VIEWS, broadcast
from attnfuse.score import Expr

__all__ = ["REDUCTIONS", "is_product_sum", "read_whole"]


def read_whole(reader: Reader, reduced: Reduced, key: Index) -> Expr:
    """What is reduced, read at ``key`` along the dimension that it is reduced over."""
    at = reduced.dim
    return reader.read(reduced.operand, (*reduced.place[:at], key, *reduced.place[at + 1 :]))


def _reduction(kind: str) -> Rule:
    def rule(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
        dims = args.get("dim")
        if dims is None:
            raise Unreadable(f"a {kind} over all dimensions")
        if isinstance(dims, (list, tuple)):
            if len(dims) != 1:
                raise Unreadable(f"a {kind} over several dimensions")
            (dims,) = dims
        return _reduced(reader, kind, node, args, dims, place)

    return rule


def _reduced(reader: Reader, kind: str, node: Node, args: Arguments, dim: int, place: Place) -> Expr:
    operand: Node = args["self"]
    at = dim % facts.rank(operand)
    if kind == "sum" and is_product_sum(node):
        return _product_sum(reader, node, operand, at, place, args["keepdim"])
    full = (*place[:at], Index(), *place[at + (1 if args["keepdim"] else 0) :])
    return reader.atom(Reduced(kind, node, operand, at, full, place))


def is_product_sum(node: Node) -> bool:
    """Whether a node is the sum of a product of two tensors: a contraction, spelled with a broadcast."""
    if facts.op_name(node) != "sum" or facts.op_name(node.all_input_nodes[0]) != "mul":
        return False
    factors = node.all_input_nodes[0].all_input_nodes
    return len(factors) == 2 and all(facts.is_tensor(factor) and facts.rank(factor) > 0 for factor in factors)


def _product_sum(reader: Reader, node: Node, product: Node, at: int, place: Place, keepdim: bool) -> Expr:
    if any(reader.order.is_written_between(each, node) for each in (product, *product.all_input_nodes)):
        raise Unreadable("a product that is written into, or its operands, before it is summed")
    inner = reader.space.fresh(facts.shape(product)[at])
    full = (*place[:at], inner, *place[at + (1 if keepdim else 0) :])
    left, right = product.all_input_nodes
    dot = Dot(node, place, left, broadcast(left, full), right, broadcast(right, full), inner.axes)
    return reader.atom(dot)


def _getitem(reader: Reader, node: Node, args: Arguments, place: Place) -> Expr:
    """``x.max(dim).values``, the values of a dropout, or a piece of a split."""
    many, number = node.args
    if isinstance(many, Node) and facts.op_name(many) == "max" and number == 0:
        inner = facts.arguments(many)
        return _reduced(reader, "max", node, inner, inner["dim"], place)
    if isinstance(many, Node) and facts.op_name(many) == "native_dropout" and number == 0:
        return POINTWISE["dropout"](reader, many, facts.arguments(many), place)
    return VIEWS["getitem"](reader, node, args, place)


#: Reductions, by ATen name.
REDUCTIONS: dict[str, Rule] = {
    "amax": _reduction("max"),
    "sum": _reduction("sum"),
    "logsumexp": _reduction("logsumexp"),
    "any": _reduction("any"),
    "getitem": _getitem,
}
