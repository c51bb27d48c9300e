"""A program as the ATen graph that ``make_fx`` makes of it before dispatch, at a twentieth of the cost.

The program runs once, on real tensors, and each operator that it calls becomes a node; nothing is simulated. What it
cannot record are control flow, symbolic sizes, and changes of grad or autocast modes.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._dispatch.python import enable_python_dispatcher, no_python_dispatcher
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Node, Tracer
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode
from torch.fx.node import map_aggregate
from torch.utils.weak import WeakTensorKeyDictionary

__all__ = ["recorded"]

_LIFT, _COPIED = torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default


def recorded(program: Callable[..., Any], args: Sequence[Tensor]) -> GraphModule:
    """The graph of ``program(*args)``, whose placeholders are ``args``; it may change them."""
    recorder = _Recorder()
    for at, arg in enumerate(args):
        recorder.note(recorder.graph.placeholder(f"arg{at}_1"), arg)
    with torch.no_grad(), enable_python_dispatcher(), recorder:
        result = program(*args)
    recorder.graph.output(map_aggregate(result, recorder.node_of))
    return GraphModule(recorder.constants, recorder.graph)


class _Recorder(ProxyTorchDispatchMode):
    """Sees what the tracer's own mode sees: torch lets no other mode stand before its dispatcher."""

    def __init__(self) -> None:
        super().__init__(Tracer(), "real", pre_dispatch=True)
        self.graph = Graph()
        self.constants: dict[str, Tensor] = {}
        self._fake = FakeTensorMode()
        # weak: torch makes a copy, which nobody knows, of a new tensor that somebody else holds
        self._nodes = WeakTensorKeyDictionary()

    def note(self, node: Node, result: Any) -> None:
        """``node`` has computed ``result``."""
        if isinstance(result, Tensor):
            self._nodes[result] = node
            node.meta["val"] = self._fake_of(result)
        elif isinstance(result, (tuple, list)):
            node.meta["val"] = tuple(map(self._fake_of, result))
            for at, part in enumerate(result):
                self.note(self.graph.call_function(operator.getitem, (node, at)), part)

    def _fake_of(self, real: Tensor) -> FakeTensor:
        shape, stride = real.shape, real.stride()
        return FakeTensor(self._fake, torch.empty_strided(shape, stride, dtype=real.dtype, device="meta"), real.device)

    def node_of(self, value: Any) -> Any:
        """The node that computed a tensor, or holds it where the program brought it along; all else as it is."""
        if not isinstance(value, Tensor):
            return value
        if value not in self._nodes:
            name = f"_tensor_constant{len(self.constants)}"
            self.constants[name] = value
            self.note(self.graph.get_attr(name), value)
        return self._nodes[value]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _LIFT:
            func = _COPIED
        given = map_aggregate((args, kwargs or {}), self.node_of)
        name = self.graph._target_to_str(func.overloadpacket.__name__)
        node = self.graph.create_node("call_function", func, *given, name=name)
        # which would decompose in Python what torch computes at once
        with no_python_dispatcher():
            result = func(*args, **(kwargs or {}))
        self.note(node, result)
        return result
