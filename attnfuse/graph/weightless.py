"""A node's operator carried out on tensors without data: where would its result lie, if its operands lay elsewhere?"""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node
from torch.fx.node import map_aggregate

from attnfuse.graph import facts

__all__ = ["Strides", "result_of", "source_of", "strides_of"]

Strides = tuple[int, ...]


def strides_of(node: Node) -> Strides:
    """A tensor's strides, symbolic ones at their hints."""
    return tuple(map(facts.hint_of_size, facts.tensor(node).stride()))


def source_of(node: Node) -> Node:
    """The call that made a value: the node, or the split that it is a piece of."""
    if node.target is operator.getitem and isinstance(facts.value(node.all_input_nodes[0]), (tuple, list)):
        return node.all_input_nodes[0]
    return node


def result_of(node: Node, given: Mapping[Node, Strides]) -> tuple[Tensor, dict[Node, Tensor]] | None:
    """The node's value and its operands on the meta device, those in ``given`` with other strides than they have.

    None where the operator cannot be carried out so: a view that would need a copy.
    """
    call = source_of(node)
    operands = {arg: _operand(arg, given) for arg in call.all_input_nodes}

    def as_meta(part: Any) -> Any:
        match part:
            case Node():
                return operands[part]
            case torch.device():
                return torch.device("meta")
            case torch.SymInt():
                return facts.hint_of_size(part)
        return part

    try:
        args, kwargs = map_aggregate(call.args, as_meta), map_aggregate(call.kwargs, as_meta)
        found = call.target(*args, **kwargs)  # type: ignore[operator]  # callers ask about calls of operators
        found = found if call is node else found[node.args[1]]
    except (RuntimeError, NotImplementedError, TypeError, ValueError, IndexError):
        return None
    return (found, operands) if isinstance(found, Tensor) else None


def _operand(node: Node, given: Mapping[Node, Strides]) -> Any:
    value = facts.value(node)
    if isinstance(value, Tensor):
        strides = given.get(node) or strides_of(node)
        return torch.empty_strided(facts.hint(node), strides, dtype=value.dtype, device="meta")
    return facts.hint_of_size(value) if isinstance(value, (torch.SymInt, int)) else value
