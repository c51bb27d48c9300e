"""Whether anybody relies on how a result lies in memory, and how to lay it out as the source did.

Kernels write heads side by side, ``[*B, M, H, D]``, which is what an output projection reads. The source's product
is contiguous as ``[*B, H, M, D]``, and a later ``view`` may work on that alone.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch.fx import Node

from attnfuse.graph import facts
from attnfuse.graph.build import Builder

__all__ = ["laid_out_like", "matters", "memory_order", "ordered"]

#: Operations whose result does not depend on how their operands lie in memory.
_FORGETTING = frozenset(
    (
        *("contiguous", "clone", "linear", "matmul", "bmm", "mm", "addmm", "baddbmm", "einsum", "cat", "stack"),
        *("layer_norm", "native_layer_norm", "rms_norm", "conv1d", "conv2d", "embedding", "sum", "mean"),
    )
)

#: Operations that hand on the layout, as it is or permuted, and take any.
_PASSING = frozenset(
    (
        *("transpose", "permute", "t", "mT", "swapaxes", "movedim", "unsqueeze", "squeeze", "expand", "select"),
        *("slice", "narrow", "reshape", "flatten", "getitem", "split", "chunk", "unbind", "alias", "detach"),
        *("add", "sub", "mul", "div", "dropout", "to", "_to_copy", "type_as", "where", "masked_fill", "neg"),
        *("gelu", "relu", "silu", "sigmoid", "tanh", "pow", "rsqrt", "sqrt", "add_", "mul_", "_assert_tensor_metadata"),
    )
)


def matters(node: Node, ignored: Collection[Node] = ()) -> bool:
    """Whether a user, through operations that hand the layout on, may rely on it; what is not known, may.

    ``ignored`` users are known not to.
    """
    seen, stack = {node}, [node]
    while stack:
        for user in stack.pop().users:
            name = facts.op_name(user)
            if user in seen or user in ignored or name in _FORGETTING:
                continue
            if name not in _PASSING:
                return True
            seen.add(user)
            stack.append(user)
    return False


def laid_out_like(builder: Builder, node: Node, source: Node) -> Node:
    """``node`` with its dimensions in the order in memory that those of ``source`` have; itself where they are."""
    found, wanted = facts.tensor(node), facts.tensor(source)
    # no element is a step away along a dimension of one, whatever its stride says
    steps = zip(wanted.shape, found.stride(), wanted.stride(), strict=True)
    if all((type(size) is int and size == 1) or have == want for size, have, want in steps):
        return node
    return ordered(builder, node, memory_order(wanted.stride()))


def memory_order(strides: Sequence[int]) -> tuple[int, ...]:
    """Dimensions in their order in memory, outermost first; expanded ones lie outside of all others."""
    return tuple(sorted(range(len(strides)), key=lambda dim: (bool(strides[dim]), -strides[dim], dim)))


def ordered(builder: Builder, node: Node, order: Sequence[int]) -> Node:
    """A dense copy of ``node`` whose dimensions lie in memory in that order."""
    straight = list(order) == sorted(order)
    outward = node if straight else builder.call(torch.ops.aten.permute.default, node, list(order))
    copy = builder.call(torch.ops.aten.clone.default, outward, memory_format=torch.contiguous_format)
    back = [order.index(dim) for dim in range(len(order))]
    return copy if straight else builder.call(torch.ops.aten.permute.default, copy, back)
