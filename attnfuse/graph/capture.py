"""A graph to be edited, and the ATen graph that it is read by.

An exported graph is ATen already and is read as it is. A Dynamo graph speaks in torch functions and tensor
methods; it is traced once more, before dispatch, and what is found in the trace is edited in the Dynamo graph
(compiling the trace itself would lose checkpoints and custom autograd functions).
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor
from torch._guards import tracing
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.amp.autocast_mode import _enter_autocast  # what Dynamo calls where a program enters autocast
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.traceback import preserve_node_meta

from attnfuse.graph import facts
from attnfuse.graph.closed import Closed
from attnfuse.graph.fixed import fixed
from attnfuse.graph.flex import is_flex
from attnfuse.graph.mirror import Mirror
from attnfuse.graph.state import State

__all__ = ["Captured", "capture", "fake_mode_of"]


@dataclass(frozen=True)
class Captured:
    """``module`` is edited, ``aten`` is read; ``home`` leads from a node of ``aten`` to the one whose value it is.

    ``fixed`` are values of ``aten`` that numbers alone decide, as far as somebody has asked.

    Values inside one call of ``module``, such as multi_head_attention_forward, have no home until it is opened. Where
    ``aten`` is the edited graph, a node is its own home unless it was replaced.
    """

    module: GraphModule
    aten: Graph
    home: dict[Node, Node]
    closed: Mapping[Node, Closed]
    state: State = field(default_factory=State)
    fixed: dict[Node, Tensor | None] = field(default_factory=dict)

    @property
    def is_aten(self) -> bool:
        """Whether the edited graph is the one that is read."""
        return self.aten is self.module.graph

    def is_given(self, node: Node) -> bool:
        """Whether the edited graph has the value of a node of ``aten``."""
        return self.is_aten or node in self.home or (node in self.closed and self.closed[node].can_open)

    @cached_property
    def casts(self) -> bool:
        """Whether autocast is on, or switched on somewhere in the edited graph."""
        on = any(torch.is_autocast_enabled(device) for device in ("cpu", "cuda", "xpu"))
        return on or any(node.target is _enter_autocast for node in self.module.graph.nodes)

    def is_parameter(self, node: Node) -> bool:
        """Whether a node of ``aten`` is a module's parameter."""
        home = node if self.is_aten else self.home.get(node, node)
        return facts.is_parameter(home) or (home.op == "placeholder" and home.name in self.state.parameters)

    @cached_property
    def differentiated(self) -> frozenset[Node]:
        """The nodes of ``aten`` that a gradient flows back from.

        Dynamo's values know it, of calls and of what they are made of under ``no_grad``; of other nodes all do that are
        made of such and not detached.
        """
        found: set[Node] = set()
        for node in self.aten.nodes:
            home = self.home.get(node)
            if home is None and self.is_aten and node.op in ("placeholder", "get_attr"):
                home = node
            known = None if home is None else facts.value(home)
            if isinstance(known, Tensor):
                flows = known.requires_grad
            else:
                flows = facts.op_name(node) != "detach" and not found.isdisjoint(node.all_input_nodes)
            if flows:
                found.add(node)
        return frozenset(found)

    def constant(self, node: Node) -> Tensor | None:
        """The value that a node of ``aten`` has for good; None where it may have another."""
        if node.op == "placeholder":
            return self.state.constants.get(node.name) if self.is_aten else None
        if node not in self.fixed:
            self.fixed[node] = fixed(node)
        return self.fixed[node]

    def place_of(self, node: Node) -> Node | None:
        """The edited graph's node with the value of a node of ``aten``, where no call must be opened for it."""
        return self.home.get(node, node if self.is_aten else None)

    def moved(self, node: Node, home: Node) -> None:
        """Notes that the value of a node of ``aten`` is another node's of the edited graph from now on."""
        self.home[node] = home

    def value(self, node: Node) -> object:
        """The fake value of a node of ``aten``; only the edited graph's values know whether they need a gradient."""
        if self.is_aten or node not in self.closed or node in self.home:
            return facts.value(self.at_home(node))
        return self.closed[node].value(node)

    def at_home(self, node: Node) -> Node:
        """The edited graph's node with the value of a node of ``aten``; a call that is closed around it is opened."""
        if self.is_aten:
            return self.home.get(node, node)
        if node not in self.home:
            self.closed[node].open(self.home)
        return self.home[node]


def capture(module: GraphModule, state: State | None = None) -> Captured:
    """What a module is read by; ``state`` is what is known of its inputs. The module is not changed."""
    state = state or State()
    if _is_aten(module.graph):
        return Captured(module, module.graph, {}, {}, state)
    return replace(_traced(module), state=state)


def fake_mode_of(graph: Graph) -> FakeTensorMode | None:
    """The fake tensor mode that a graph's values live in. Inside a backend it is not the one of Dynamo's context."""
    values = (facts.value(node) for node in graph.nodes)
    return next((value.fake_mode for value in values if isinstance(value, FakeTensor)), None)


def _is_aten(graph: Graph) -> bool:
    """Whether every tensor in the graph is an operator's result, or an element of one; flex_attention is none."""
    if any(map(is_flex, graph.nodes)):
        return False
    return not any(node.op in ("call_method", "call_module") or _is_torch_function(node) for node in graph.nodes)


def _is_torch_function(node: Node) -> bool:
    known = (OpOverload, HigherOrderOperator)
    is_call = node.op == "call_function" and node.target is not operator.getitem
    return is_call and facts.is_tensor(node) and not isinstance(node.target, known)


def _traced(module: GraphModule) -> Captured:
    placeholders = [facts.value(node) for node in module.graph.nodes if node.op == "placeholder"]
    mirror = Mirror(module)
    # the tracer's own fake mode makes a copy of each placeholder's value, which only a shape changed in place needs
    mode: Literal["real", "fake"] = "real" if mirror.is_known else "fake"
    fake = fake_mode_of(module.graph) or FakeTensorMode(allow_non_fake_inputs=True)
    with tracing(None), preserve_node_meta(), _modes_restored(), fake:
        aten = make_fx(mirror.run, tracing_mode=mode, pre_dispatch=True)(*placeholders)
    return Captured(module, aten.graph, mirror.home, mirror.closed())


@contextmanager
def _modes_restored() -> Iterator[None]:
    """A traced program switches grad and autocast modes, and an error may leave it before it switches them back."""
    with ExitStack() as stack:
        stack.enter_context(torch.set_grad_enabled(torch.is_grad_enabled()))
        for device in ("cpu", "cuda", "xpu"):
            enabled, dtype = torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)
            stack.enter_context(torch.autocast(device, dtype, enabled))
        yield
