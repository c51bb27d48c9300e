"""Operations written so that another dimension of their result is contiguous."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.fx import Node

from attnfuse.graph import facts
from attnfuse.graph.build import Builder
from attnfuse.passes.place.reading import OPERANDS
from attnfuse.passes.place.region import folds

__all__ = ["gathered", "written"]

_ATEN = torch.ops.aten

Reads = Callable[[Node], Node]


def written(builder: Builder, node: Node, reads: Reads, *, batched: bool) -> Node:
    """A contraction with its operands swapped, as a transposed view: of the same shape, its rows contiguous.

    ``reads`` leads from the operands to the nodes that the new nodes read.
    """
    args = facts.arguments(node)
    if facts.op_name(node) not in OPERANDS:
        return _convolution(builder, args, reads)
    names = OPERANDS[facts.op_name(node)]
    left, right, bias = args[names[0]], args[names[1]], args.get(names[2])
    scales = {name: args[name] for name in ("beta", "alpha") if name in args}
    # a linear layer's weight is stored transposed
    right = reads(right) if facts.op_name(node) == "linear" else _transposed(builder, reads(right))
    bias = _transposed(builder, reads(bias)) if isinstance(bias, Node) else None
    if not folds(node):
        return _transposed(builder, _product(builder, right, _transposed(builder, reads(left)), bias, scales))
    return (_batch_by_batch if batched else _all_at_once)(builder, reads(left), right, bias, scales)


def _all_at_once(builder: Builder, left: Node, right: Node, bias: Node | None, scales: Mapping[str, Any]) -> Node:
    """``[*B, M, K]`` and ``[N, K]`` to ``[*B, M, N]``, lying as ``[N, *B, M]``: one product of matrices."""
    *batch, inner = facts.shape(left)
    flat = builder.call(_ATEN.reshape.default, left, [-1, builder.size(inner)])
    product = _product(builder, right, _transposed(builder, flat), bias, scales)
    sizes = [builder.size(size) for size in (facts.shape(right)[0], *batch)]
    apart = builder.call(_ATEN.reshape.default, product, sizes)
    return builder.call(_ATEN.permute.default, apart, [*range(1, len(sizes)), 0])


def _batch_by_batch(builder: Builder, left: Node, right: Node, bias: Node | None, scales: Mapping[str, Any]) -> Node:
    """``[*B, M, K]`` and ``[N, K]`` to ``[*B, M, N]``, lying as ``[*B, N, M]``."""
    *batch, rows, inner = map(builder.size, facts.shape(left))
    flat = builder.call(_ATEN.reshape.default, left, [-1, rows, inner]) if len(batch) > 1 else left
    count, columns = builder.size(facts.shape(flat)[0]), builder.size(facts.shape(right)[0])
    shared = builder.call(_ATEN.expand.default, right, [count, columns, inner])
    product = _product(builder, shared, _transposed(builder, flat), bias, scales)
    if len(batch) > 1:
        product = builder.call(_ATEN.reshape.default, product, [*batch, columns, rows])
    return _transposed(builder, product)


def _product(builder: Builder, left: Node, right: Node, bias: Node | None, scales: Mapping[str, Any]) -> Node:
    """The product of two matrices or batches of them, its addend rounded with it."""
    flat, by_batch = facts.rank(left) == facts.rank(right) == 2, facts.rank(left) == facts.rank(right) == 3
    if bias is not None:
        return builder.call(_ATEN.addmm.default if flat else _ATEN.baddbmm.default, bias, left, right, **scales)
    if flat or (by_batch and facts.shape(left)[0] == facts.shape(right)[0]):
        return builder.call(_ATEN.mm.default if flat else _ATEN.bmm.default, left, right)
    return builder.call(_ATEN.matmul.default, left, right)


def _transposed(builder: Builder, node: Node) -> Node:
    """The matrices of a node transposed; a vector, which is added to rows, as a column."""
    if facts.rank(node) == 1:
        return builder.call(_ATEN.unsqueeze.default, node, 1)
    return builder.call(_ATEN.transpose.int, node, -2, -1)


def _convolution(builder: Builder, args: Mapping[str, Any], reads: Reads) -> Node:
    """``[B, C, *S]`` with weight ``[O, C, 1...]`` to ``[B, O, *S]``, lying as ``[B, *S, O]``."""
    weight = builder.call(_ATEN.flatten.using_ints, reads(args["weight"]), 1)
    channels_last = builder.call(_ATEN.movedim.int, reads(args["input"]), 1, -1)
    bias = args.get("bias")
    found = builder.call(_ATEN.linear.default, channels_last, weight, None if bias is None else reads(bias))
    return builder.call(_ATEN.movedim.int, found, -1, 1)


def gathered(builder: Builder, node: Node, reads: Reads, minor: int) -> Node:
    """A concatenation or the like of permuted operands, permuted back: the same, with ``minor`` contiguous."""
    order = [dim for dim in range(facts.rank(node)) if dim != minor] + [minor]
    at = facts.arguments(node)["dim"] % facts.rank(node)

    def permuted(part: Any) -> Any:
        if not isinstance(part, Node) or not facts.is_tensor(part):
            return part
        kept = order if facts.rank(part) == len(order) else [dim - (dim > at) for dim in order if dim != at]
        return builder.call(_ATEN.permute.default, reads(part), kept)

    schema = node.target._schema  # type: ignore[union-attr]  # callers ask about operators
    found = facts.arguments(node)
    args = [
        _argument(arg.name, found[arg.name], permuted, reads, order.index(at))
        for arg in schema.arguments
        if not arg.kwarg_only
    ]
    moved = builder.call(node.target, *args)  # type: ignore[arg-type]  # an operator
    return builder.call(_ATEN.permute.default, moved, [order.index(dim) for dim in range(len(order))])


def _argument(name: str, value: Any, permuted: Callable[[Any], Any], reads: Reads, dim: int) -> Any:
    match name:
        case "dim":
            return dim
        case "tensors":
            return [permuted(part) for part in value]
        case "self" | "source" | "src":
            return permuted(value)
    return reads(value) if isinstance(value, Node) else value
