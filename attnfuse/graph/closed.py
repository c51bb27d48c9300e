"""A call that a Dynamo graph keeps whole and whose inside its trace shows, such as multi_head_attention_forward.

Opened, it is replaced in the Dynamo graph by the operators that it was traced to.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch.fx import Node
from torch.fx.node import map_arg

from attnfuse.graph import facts

__all__ = ["Closed"]


@dataclass(frozen=True)
class Closed:
    """``call`` was traced to the nodes ``inside``; ``results`` are those of its results that are tensors."""

    call: Node
    inside: tuple[Node, ...]
    results: Any

    @property
    def can_open(self) -> bool:
        """Whether every use of the call is of one of its traced results, and no tensor of the trace's own is inside."""
        if any(node.op == "get_attr" for node in self.inside):
            return False
        if not isinstance(self.results, tuple):
            return isinstance(self.results, Node)
        return all(self._result(user) is not None for user in self.call.users)

    def _result(self, user: Node) -> Node | None:
        if user.target is not operator.getitem or not isinstance(user.args[1], int):
            return None
        found = self.results[user.args[1]]
        return found if isinstance(found, Node) else None

    def value(self, node: Node) -> object:
        """The fake value of a node inside; it needs a gradient if anything that goes into the call does."""
        found = facts.value(node)
        given = (facts.tensor(arg) for arg in self.call.all_input_nodes if facts.is_tensor(arg))
        if isinstance(found, torch.Tensor) and found.is_floating_point():
            return found.detach().requires_grad_(any(tensor.requires_grad for tensor in given))
        return found

    def open(self, home: dict[Node, Node]) -> None:
        """Puts the traced nodes where the call is, and enters them in ``home``."""
        for unused in [user for user in self.call.users if not user.users and user.op != "output"]:
            unused.graph.erase_node(unused)
        uses = {user: self._result(user) for user in self.call.users} if isinstance(self.results, tuple) else {}
        needed = {self.results} if isinstance(self.results, Node) else set(filter(None, uses.values()))
        for node in reversed(self.inside):
            if node in needed or facts.is_mutating(node):
                needed.update(node.all_input_nodes)
        with self.call.graph.inserting_before(self.call):
            for node in self.inside:
                if node in needed or facts.is_mutating(node):
                    home[node] = self._copied(node, home)
        for user, result in uses.items():
            if result is not None:
                user.replace_all_uses_with(home[result])
                user.graph.erase_node(user)
        if isinstance(self.results, Node):
            self.call.replace_all_uses_with(home[self.results])
        self.call.graph.erase_node(self.call)

    def _copied(self, node: Node, home: dict[Node, Node]) -> Node:
        args, kwargs = map_arg((node.args, node.kwargs), home.__getitem__)
        copy = self.call.graph.create_node(node.op, node.target, args, kwargs, name=node.name)
        copy.meta.update(
            {key: self.call.meta[key] for key in ("stack_trace", "nn_module_stack") if key in self.call.meta}
        )
        copy.meta["example_value"] = self.value(node)
        return copy
