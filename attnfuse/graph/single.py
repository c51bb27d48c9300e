"""Traces a call without running it, where it is one operator and its result is known already.

What a graph's calls compute is known, as fake values. Most calls are a single operator, so that it is enough to see
which one: it is given the known result at once, instead of a fake kernel that computes it anew. A call that returns
just that result, without having looked at it, did nothing else; any other is run. Values are kept as they are found,
where a proxy mode of torch's copies and describes each, which takes most of its time.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch._ops import OpOverload
from torch.fx import Node, Proxy
from torch.fx.experimental.proxy_tensor import (
    ProxyTorchDispatchMode,
    _ProxyTensor,
    get_proxy_slot,
    set_proxy_slot,
    track_tensor_tree,
)
from torch.fx.node import map_aggregate
from torch.utils._pytree import tree_leaves

__all__ = ["Single"]


@dataclass(frozen=True)
class _Operator:
    """A call of an operator."""

    target: OpOverload
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


class _Untraced(Exception):
    """An argument that no node stands for, or a second operator."""


class Single(ProxyTorchDispatchMode):
    """A proxy mode that traces as the one that it is made from, and can look at one operator without running it."""

    def __init__(self, mode: ProxyTorchDispatchMode) -> None:
        # torch 2.11 keeps them elsewhere
        decompositions = {name: getattr(mode, name) for name in ("decomposition_table",) if hasattr(mode, name)}
        super().__init__(mode.tracer, mode.tracing_mode, mode.pre_dispatch, **decompositions)
        self._known: Any = None
        self._seen: _Operator | None = None

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """The known result of the first operator, while one is looked at; else what the operator gives, traced."""
        call = _Operator(func, args, kwargs or {})
        if self._known is not None:
            if self._seen is not None:
                raise _Untraced
            self._seen = call
            return self._known
        if _is_plain(func) and (arguments := self._arguments(call)) is not None:
            result = func(*call.args, **call.kwargs)
            self._note(func, arguments, result)
            return result
        return super().__torch_dispatch__(func, types, args, kwargs)

    def traced(self, call: Callable[[], Any], known: Any) -> Node | None:
        """The node of the one operator that ``call`` is, whose result is ``known``; None, and no node, where it is not
        one, or not a plain one. ``call`` does not look at an operator's result before it returns it.
        """
        self._known, self._seen = known, None
        try:
            result = call()
        except Exception:  # noqa: BLE001 - handed a result before its time; what truly fails will fail again
            return None
        finally:
            self._known = None
        seen = self._seen
        if seen is None or not _identical(result, known) or not _is_plain(seen.target):
            return None
        arguments = self._arguments(seen)
        return None if arguments is None else self._note(seen.target, arguments, known)

    def _note(self, target: OpOverload, arguments: tuple[Any, Any], result: Any) -> Node:
        # named as torch's own mode names it
        name = self.tracer.graph._target_to_str(target.overloadpacket.__name__)
        node = self._create(target, *arguments, name)
        with torch._C.DisableTorchFunction():
            if _is_static(result):
                self._track(node, result)
            else:
                track_tensor_tree(result, Proxy(node, self.tracer), constant=None, tracer=self.tracer)
        return node

    def _create(self, target: Callable[..., Any], args: Any, kwargs: Any, name: str) -> Node:
        return self.tracer.graph.create_node("call_function", target, args, kwargs, name=name)

    def _track(self, node: Node, result: Any) -> None:
        node.meta["val"] = result
        if isinstance(result, torch.Tensor):
            set_proxy_slot(result, self.tracer, _ProxyTensor(Proxy(node, self.tracer), None))
            return
        for at, part in enumerate(result):
            self._track(self._create(operator.getitem, (node, at), {}, "getitem"), part)

    def _arguments(self, call: _Operator) -> tuple[Any, Any] | None:
        """The nodes for a call's arguments; None where one has none, or is a constant, or a symbolic number."""
        try:
            with torch._C.DisableTorchFunction():
                found: tuple[Any, Any] = map_aggregate((call.args, dict(call.kwargs)), self._argument)
        except _Untraced:
            return None
        return found

    def _argument(self, value: Any) -> Any:
        if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
            raise _Untraced
        if not isinstance(value, torch.Tensor):
            return value
        slot = get_proxy_slot(value, self.tracer, None)
        if slot is None or slot.constant is not None:
            raise _Untraced
        return slot.proxy.node


def _is_static(result: Any) -> bool:
    """Whether a result is made of tensors whose sizes are numbers."""
    parts = tree_leaves(result)
    return all(isinstance(part, torch.Tensor) and all(isinstance(size, int) for size in part.shape) for part in parts)


def _identical(result: Any, known: Any) -> bool:
    results, expected = tree_leaves(result), tree_leaves(known)
    return len(results) == len(expected) and all(a is b for a, b in zip(results, expected, strict=True))


@cache
def _is_plain(target: OpOverload) -> bool:
    """Whether an operator makes tensors, writes nothing, is traced as it is called, and its result is handed on as it
    is: Python's functions that make new tensors, and these alone can pin memory, wrap it again while others hold it.
    """
    schema = target._schema
    tensors = all(str(result.type) in ("Tensor", "List[Tensor]") for result in schema.returns)
    is_new = any(argument.name == "pin_memory" for argument in schema.arguments)
    return tensors and not is_new and not schema.is_mutable and target is not torch.ops.aten.lift_fresh.default
