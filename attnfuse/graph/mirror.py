"""Runs a Dynamo graph under tracing, noting for each traced node which node of the Dynamo graph it belongs to."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from contextlib import nullcontext
from functools import partial
from types import BuiltinFunctionType, MethodDescriptorType
from typing import Any, cast

import torch
from torch._ops import HigherOrderOperator
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import get_innermost_proxy_mode, get_proxy_slot, track_tensor_tree
from torch.fx.node import map_aggregate
from torch.fx.traceback import set_current_meta

from attnfuse.graph import facts
from attnfuse.graph.closed import Closed
from attnfuse.graph.flex import flex_of, is_flex
from attnfuse.graph.single import Single

__all__ = ["Mirror"]


class Mirror(Interpreter):
    """``home`` leads from a traced node to the node whose value it is."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.home: dict[Node, Node] = {}
        self._calls: list[Closed] = []
        #: Whether the known values are what calls give.
        self.is_known = _keeps_metadata(module.graph)
        self._single: Single | None = None

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The module's result, traced."""
        mode = get_innermost_proxy_mode()
        if mode is not None and self.is_known:
            self._single = Single(mode)
        with self._single or nullcontext():
            return super().run(*args, **kwargs)

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
        if self._is_single(n, known):
            return known
        before = _last_traced()
        with set_current_meta(n):
            result = super().run_node(n)
        if isinstance(result, torch.Tensor) and (traced := _node_of(result)) is not None:
            self.home.setdefault(traced, n)
        inside = _traced_since(before)
        if n.op == "call_function" and len(inside) > 1:
            self._calls.append(Closed(n, inside, map_aggregate(result, _node_of)))
        return result

    def _is_single(self, n: Node, known: Any) -> bool:
        """Whether a call was traced without running it."""
        if self._single is None or not _calls_at_once(n) or not _has_tensors(known):
            return False
        call = partial(getattr(self, n.op), n.target, *self.fetch_args_kwargs_from_env(n))
        node = self._single.traced(call, known)
        if node is None:
            return False
        if "stack_trace" in n.meta:
            node.meta["stack_trace"] = n.meta["stack_trace"]
        if isinstance(known, torch.Tensor):
            self.home.setdefault(node, n)
        return True

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


def _calls_at_once(n: Node) -> bool:
    """Whether a call is of C code, which looks at no operator's result before it returns it.

    Indexing does: it leaves out a slice of all that earlier indices have left.
    """
    if n.op == "call_method":
        return isinstance(getattr(torch.Tensor, str(n.target), None), MethodDescriptorType)
    if n.target is operator.getitem:
        index = n.args[1] if isinstance(n.args[1], tuple) else (n.args[1],)
        return sum(not (isinstance(part, slice) and part == slice(None)) and part is not ... for part in index) <= 1
    return n.op == "call_function" and isinstance(n.target, BuiltinFunctionType)


def _has_tensors(value: Any) -> bool:
    return isinstance(value, torch.Tensor) or (isinstance(value, tuple) and all(map(_has_tensors, value)))


def _keeps_metadata(graph: Graph) -> bool:
    """Whether no call changes a shape in place: after one, the known values of what came before it are too late."""
    return not any(node.op == "call_method" and _reshapes_in_place(str(node.target)) for node in graph.nodes)


def _reshapes_in_place(method: str) -> bool:
    packet = getattr(torch.ops.aten, method, None) if method.endswith("_") and not method.endswith("__") else None
    overloads = [getattr(packet, name) for name in packet.overloads()] if packet is not None else []
    return any(torch.Tag.inplace_view in overload.tags for overload in overloads)


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
