"""Runs a Dynamo graph under tracing, noting for each traced node which node of the Dynamo graph it belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch._ops import HigherOrderOperator
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import get_innermost_proxy_mode, get_proxy_slot, track_tensor_tree
from torch.fx.node import map_aggregate
from torch.fx.traceback import set_current_meta

from attnfuse.graph import facts
from attnfuse.graph.closed import Closed
from attnfuse.graph.flex import flex_of, is_flex

__all__ = ["Mirror"]


class Mirror(Interpreter):
    """``home`` leads from a traced node to the node whose value it is."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.home: dict[Node, Node] = {}
        self._calls: list[Closed] = []

    def closed(self) -> Mapping[Node, Closed]:
        """The call that each traced node without a home lies inside of."""
        return {node: call for call in self._calls for node in call.inside if node not in self.home}

    def run_node(self, n: Node) -> Any:
        """The node's value, traced."""
        known = facts.value(n)
        if n.op == "call_method" and n.target == "item" and isinstance(known, (torch.SymFloat, torch.SymInt)):
            return self._known_number(n, known)
        if is_flex(n):
            return self._flex(n, known)
        if isinstance(n.target, HigherOrderOperator):
            return self._unopened(n, known)
        before = _last_traced()
        with set_current_meta(n):
            result = super().run_node(n)
        if isinstance(result, torch.Tensor) and (traced := _node_of(result)) is not None:
            self.home.setdefault(traced, n)
        inside = _traced_since(before)
        if n.op == "call_function" and len(inside) > 1:
            self._calls.append(Closed(n, inside, map_aggregate(result, _node_of)))
        return result

    def _unopened(self, n: Node, known: Any) -> Any:
        """The result of a checkpointed region, a branch or a loop, whose body is a graph of its own."""
        mode = get_innermost_proxy_mode()
        if mode is None:
            return known
        traced = (_node_of(self.env[arg]) for arg in n.all_input_nodes)
        proxies = tuple(mode.tracer.proxy(node) for node in traced if node is not None)
        proxy = mode.tracer.create_proxy("call_function", n.target, proxies, {}, name=n.name)
        return track_tensor_tree(known, proxy, constant=None, tracer=mode.tracer)

    def _flex(self, n: Node, known: Any) -> Any:
        """The result of flex_attention, traced as a call of what it computes."""
        mode = get_innermost_proxy_mode()
        called = flex_of(n, cast("GraphModule", self.module))
        traced = [_node_of(self.env[arg]) for arg in called[1]]
        if mode is None or None in traced:
            return known
        proxies = tuple(mode.tracer.proxy(node) for node in traced if node is not None)
        proxy = mode.tracer.create_proxy("call_function", called[0], proxies, {}, name=n.name)
        return track_tensor_tree(known, proxy, constant=None, tracer=mode.tracer)

    def _known_number(self, n: Node, number: torch.SymFloat | torch.SymInt) -> Any:
        """``tensor.item()`` as the symbol that Dynamo gave it; running it would make a second one without a value."""
        mode = get_innermost_proxy_mode()
        (origin,) = n.all_input_nodes
        source = self.env[origin]
        if mode is None or (traced := _node_of(source)) is None:
            return number
        proxy = mode.tracer.create_proxy("call_function", torch.ops.aten.item.default, (mode.tracer.proxy(traced),), {})
        return track_tensor_tree(number, proxy, constant=None, tracer=mode.tracer)


def _last_traced() -> Node | None:
    mode = get_innermost_proxy_mode()
    return None if mode is None else mode.tracer.graph._root.prev


def _traced_since(before: Node | None) -> tuple[Node, ...]:
    found: list[Node] = []
    node = _last_traced()
    while node is not None and node is not before and node.op != "root":
        found.append(node)
        node = node.prev
    return tuple(reversed(found))


def _node_of(value: Any) -> Node | None:
    mode = get_innermost_proxy_mode()
    if mode is None or not isinstance(value, torch.Tensor):
        return None
    slot = get_proxy_slot(value, mode.tracer, None)
    return None if slot is None else slot.proxy.node
