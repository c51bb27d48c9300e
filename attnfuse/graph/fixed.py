"""Integers that a graph computes from nothing but numbers, worked out while it is read.

Models number the documents that are packed into one row by the jumps of their positions. Where nobody hands positions
in, these are an arange: the numbers are all the same, and the mask made of them hides nothing.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.fx import Node
from torch.fx.node import map_arg
from torch.utils._pytree import tree_leaves, tree_map

from attnfuse.graph import facts
from attnfuse.graph.order import storage

__all__ = ["fixed"]

#: More is not computed while a graph is read.
_MOST_NODES, _MOST_ELEMENTS = 64, 1 << 20
#: Their operations have one result on every device.
_EXACT = (torch.bool, torch.int32, torch.int64)
#: What these make is whatever the memory held.
_UNSET = ("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided")


def fixed(node: Node) -> Tensor | None:
    """The value of a tensor of integers or booleans, on CPU; None where more than numbers goes into it."""
    made = _made_of(node)
    if not made or _is_written(made):
        return None
    values: dict[Node, Any] = {}
    try:
        with unset_fake_temporarily(), torch.no_grad():
            for each in made:
                values[each] = _called(each, values)
    except (NotImplementedError, RuntimeError):
        # what only another device computes stays a tensor
        return None
    found = values[node]
    return found if isinstance(found, Tensor) else None


def _made_of(node: Node) -> list[Node]:
    """The node and all that goes into it, in order; empty where that cannot be computed here."""
    found: set[Node] = set()
    stack = [node]
    while stack:
        each = stack.pop()
        if each in found:
            continue
        if len(found) == _MOST_NODES or not _is_exact(each):
            return []
        found.add(each)
        stack += each.all_input_nodes
    return [each for each in node.graph.nodes if each in found]


def _is_exact(node: Node) -> bool:
    target = node.target
    if not isinstance(target, OpOverload) or torch.Tag.nondeterministic_seeded in target.tags:
        return False
    if facts.op_name(node) in _UNSET:
        return False
    if not facts.is_tensor(node) or facts.dtype(node) not in _EXACT or facts.is_mutating(node):
        return False
    sizes = facts.shape(node)
    if not all(isinstance(size, int) for size in sizes) or facts.tensor(node).numel() > _MOST_ELEMENTS:
        return False
    return not any(isinstance(each, torch.SymInt) for each in tree_leaves((node.args, node.kwargs)))


def _is_written(made: list[Node]) -> bool:
    """Whether somebody writes into one of the tensors, or into what shares their storage."""
    rooms = {storage(node) for node in made}
    writers = (node for node in made[0].graph.nodes if facts.is_mutating(node))
    return any(storage(target) in rooms for writer in writers for target in facts.written(writer))


def _called(node: Node, values: dict[Node, Any]) -> object:
    args, kwargs = tree_map(
        lambda arg: torch.device("cpu") if isinstance(arg, torch.device) else arg,
        map_arg((node.args, node.kwargs), values.__getitem__),
    )
    assert isinstance(node.target, OpOverload)
    if any(arg.name == "device" and arg.kwarg_only for arg in node.target._schema.arguments):
        kwargs = {**kwargs, "device": torch.device("cpu")}
    return node.target(*args, **{name: arg for name, arg in kwargs.items() if name != "pin_memory"})
