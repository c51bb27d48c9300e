"""A graph to be edited, and the ATen graph that it is read by.

An exported graph is ATen already and is read as it is. A Dynamo graph speaks in torch functions and tensor
methods; it is traced once more, before dispatch, and what is found in the trace is edited in the Dynamo graph
(compiling the trace itself would lose checkpoints and custom autograd functions).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._guards import tracing
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.fx.experimental.proxy_tensor import (
    get_innermost_proxy_mode,
    get_proxy_slot,
    make_fx,
    track_tensor_tree,
)
from torch.fx.traceback import preserve_node_meta, set_current_meta

from attnfuse.graph import facts

__all__ = ["Captured", "capture", "fake_mode_of"]


@dataclass(frozen=True)
class Captured:
    """``module`` is edited, ``aten`` is read; ``home`` leads from a node of ``aten`` to the one whose value it is."""

    module: GraphModule
    aten: Graph
    home: Mapping[Node, Node]

    @property
    def is_aten(self) -> bool:
        """Whether the edited graph is the one that is read."""
        return self.aten is self.module.graph

    def is_given(self, node: Node) -> bool:
        """Whether the edited graph has the value of a node of ``aten``."""
        return self.is_aten or node in self.home

    def at_home(self, node: Node) -> Node:
        """The edited graph's node with the value of a node of ``aten``."""
        return node if self.is_aten else self.home[node]


def capture(module: GraphModule) -> Captured:
    """What a module is read by. The module is not changed."""
    if _is_aten(module.graph):
        return Captured(module, module.graph, {})
    return _traced(module)


def fake_mode_of(graph: Graph) -> FakeTensorMode | None:
    """The fake tensor mode that a graph's values live in. Inside a backend it is not the one of Dynamo's context."""
    values = (facts.value(node) for node in graph.nodes)
    return next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)


def _is_aten(graph: Graph) -> bool:
    """Whether every tensor in the graph is an operator's result, or an element of one."""
    return not any(node.op in ("call_method", "call_module") or _is_torch_function(node) for node in graph.nodes)


def _is_torch_function(node: Node) -> bool:
    known = (OpOverload, HigherOrderOperator)
    is_call = node.op == "call_function" and node.target is not operator.getitem
    return is_call and facts.is_tensor(node) and not isinstance(node.target, known)


def _traced(module: GraphModule) -> Captured:
    placeholders = [facts.value(node) for node in module.graph.nodes if node.op == "placeholder"]
    mirror = _Mirror(module)
    with tracing(None), preserve_node_meta(), _modes_restored():
        aten = make_fx(mirror.run, tracing_mode="fake", pre_dispatch=True, _allow_non_fake_inputs=True)(*placeholders)
    return Captured(module, aten.graph, mirror.home)


class _Mirror(Interpreter):
    """Runs a Dynamo graph under tracing, noting for each traced node which node it is the value of."""

    def __init__(self, module: GraphModule) -> None:
        super().__init__(module)
        self.home: dict[Node, Node] = {}

    def run_node(self, n: Node) -> Any:
        known = facts.value(n)
        if n.op == "call_method" and n.target == "item" and isinstance(known, (torch.SymFloat, torch.SymInt)):
            return self._known_number(n, known)
        with set_current_meta(n):
            result = super().run_node(n)
        if isinstance(result, torch.Tensor) and (traced := _node_of(result)) is not None:
            self.home.setdefault(traced, n)
        return result

    def _known_number(self, n: Node, number: torch.SymFloat | torch.SymInt) -> Any:
        """``tensor.item()`` as the symbol that Dynamo gave it; running it would make a second one without a value."""
        mode = get_innermost_proxy_mode()
        (origin,) = n.all_input_nodes
        source = self.env[origin]
        if mode is None or (traced := _node_of(source)) is None:
            return number
        proxy = mode.tracer.create_proxy("call_function", torch.ops.aten.item.default, (mode.tracer.proxy(traced),), {})
        return track_tensor_tree(number, proxy, constant=None, tracer=mode.tracer)


@contextmanager
def _modes_restored() -> Iterator[None]:
    """A traced program switches grad and autocast modes, and an error may leave it before it switches them back."""
    with ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(torch.is_grad_enabled()))
        for device in ("cpu", "cuda", "xpu"):
            enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
            stack.enter_context(torch.autocast(device, dtype, enabled))
        yield


def _node_of(value: torch.Tensor) -> Node | None:
    mode = get_innermost_proxy_mode()
    slot = None if mode is None else get_proxy_slot(value, mode.tracer, None)
    return None if slot is None else slot.proxy.node
