"""Writes ATen calls into a graph, each with the fake value that every node must carry."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import count
from typing import Any, cast

import torch
from torch.fx import Graph, GraphModule, Node
from torch.fx.node import map_arg
from torch.nn import Module

from attnfuse.axes import Axis, Index, Size, product, same_size
from attnfuse.errors import AttnfuseError
from attnfuse.graph import facts
from attnfuse.graph.capture import fake_mode_of

__all__ = ["Builder", "UnknownSize"]

Place = Sequence[tuple[Axis, ...]]
Groups = Sequence[tuple[Axis, ...]]

_ATEN = torch.ops.aten


class UnknownSize(AttnfuseError):
    """A symbolic size that no node of the graph has."""


def _name(target: Callable[..., Any]) -> str:
    """``attention`` for ``attnfuse.attention.default``, as tracing names nodes."""
    packet = getattr(target, "overloadpacket", target)
    return str(packet.__name__)


class Builder:
    """Inserts nodes before a point of a graph. Their values are stored as the graph's other nodes store theirs."""

    def __init__(self, graph: Graph, before: Node | None = None, like: Node | None = None) -> None:
        self._graph, self._before, self._like = graph, before, like or before
        self._mode = fake_mode_of(graph)
        self._meta = "example_value" if before is not None and "example_value" in before.meta else "val"
        self._sizes: dict[Size, Node] = {}
        #: Graphs that calls are given, by their attribute's name, of a graph that no module has yet.
        self.modules: dict[str, Module] = {}
        self._given: dict[Node, Module] = {}

    def call(self, target: Callable[..., Any], *args: Any, **kwargs: Any) -> Node:
        """A call of ``target``, its value computed on the fake values of its arguments."""
        values = map_arg((args, kwargs), lambda arg: self._given.get(arg, facts.value(arg)))
        with self._mode or nullcontext():
            value = target(*values[0], **values[1])
        return self._called(target, args, kwargs, value)

    def _called(self, target: Callable[..., Any], args: Any, kwargs: Any, value: Any) -> Node:
        with self._inserting():
            node = self._graph.create_node("call_function", target, args, kwargs, name=_name(target))
        node.meta[self._meta] = value
        if self._like is not None:
            copied = ("stack_trace", "nn_module_stack", "source_fn_stack", "torch_fn", "custom")
            node.meta.update({key: self._like.meta[key] for key in copied if key in self._like.meta})
        return node

    def item(self, node: Node, number: int) -> Node:
        """One of the results of a call that has several."""
        return self.call(operator.getitem, node, number)

    def inline(self, module: GraphModule, inputs: Sequence[Node]) -> Node:
        """A copy of a traced module's nodes, its placeholders replaced by ``inputs``; the node of its one result."""
        names = [node for node in module.graph.nodes if node.op == "placeholder"]
        copies: dict[Node, Any] = dict(zip(names, inputs, strict=True))
        # of the same values the same is computed
        known = all(facts.value(name) is facts.value(node) for name, node in zip(names, inputs, strict=True))
        for node in module.graph.nodes:
            if node.op == "call_function" and node.users:
                args, kwargs = map_arg((node.args, node.kwargs), copies.__getitem__)
                if known:
                    copies[node] = self._called(node.target, args, kwargs, facts.value(node))
                else:
                    copies[node] = self.call(node.target, *args, **kwargs)
            elif node.op == "get_attr":
                copies[node] = self._attribute(module, str(node.target))
        result: Any = module.graph.output_node().args[0]
        return cast("Node", copies[result[0] if isinstance(result, (tuple, list)) else result])

    def _attribute(self, module: GraphModule, name: str) -> Node:
        """A graph of ``module``'s, which a higher-order operator is given, as an attribute here."""
        given = getattr(module, name)
        if not isinstance(given, GraphModule):
            raise AttnfuseError(f"a kernel's trace holds the constant {name}")
        owner = self._graph.owning_module
        taken = self.modules if owner is None else dict(owner.named_children())
        fresh = next(new for at in count() if (new := f"{name}_{at}") not in taken)
        if owner is None:
            self.modules[fresh] = given
        else:
            owner.add_submodule(fresh, given)
        with self._inserting():
            node = self._graph.create_node("get_attr", fresh)
        self._given[node] = given
        return node

    @contextmanager
    def _inserting(self) -> Iterator[None]:
        if self._before is None:
            yield
        else:
            with self._graph.inserting_before(self._before):
                yield

    # --- sizes --------------------------------------------------------------------------------------

    def size(self, size: Size) -> int | Node:
        """A size as an argument: an int, or a node that computes it. Raises :class:`UnknownSize`."""
        if isinstance(size, int):
            return size
        if size not in self._sizes:
            self._sizes[size] = self._find_size(size)
        return self._sizes[size]

    def _find_size(self, size: Size) -> Node:
        for node in self._graph.nodes:
            if node is self._before:
                break
            if isinstance(facts.value(node), torch.SymInt) and same_size(facts.size_of(node), size):
                return cast("Node", node)
            if facts.is_tensor(node):
                for dim, found in enumerate(facts.shape(node)):
                    if found == size:
                        return self.call(_ATEN.sym_size.int, node, dim)
        raise UnknownSize(f"no value in the graph has size {size}")

    # --- layouts ------------------------------------------------------------------------------------

    def part(self, node: Node, place: Sequence[Index]) -> Node:
        """The part of a node that ``place`` runs over: itself, or a slice of it."""
        for dim, index in enumerate(place):
            if not index.covers(facts.shape(node)[dim]):
                start, stop = self.size(index.offset), self.size(index.offset + index.extent)
                node = self.call(_ATEN.slice.Tensor, node, dim, start, stop)
        return node

    def arranged(self, node: Node, place: Place, groups: Groups, expand: Sequence[bool]) -> Node:
        """``node``, whose dimensions are made of the axes in ``place``, with one dimension for each of ``groups``.

        A group of which the node has no axis becomes a dimension of size 1, or is expanded.
        """
        present = [axis for axes in place for axis in axes]
        order = [axis for group in groups for axis in group if axis in present]
        if present != order:
            split = self.reshaped(node, [(axis,) for axis in present])
            node = self.call(_ATEN.permute.default, split, [present.index(axis) for axis in order])
        kept = [tuple(axis for axis in group if axis in present) for group in groups]
        partial = [tuple(group) if some else () for group, some in zip(groups, kept, strict=True)]
        if kept != partial:
            node = self._spread(node, order, partial)
        node = self.reshaped(node, partial)
        if any(wanted and group and not some for group, some, wanted in zip(groups, kept, expand, strict=True)):
            full = [self.size(product(a.size for a in g)) if w else -1 for g, w in zip(groups, expand, strict=True)]
            node = self.call(_ATEN.expand.default, node, full)
        return node

    def _spread(self, node: Node, order: Sequence[Axis], groups: Groups) -> Node:
        """Expands the axes that a group has and the node lacks, so that the group can be one dimension."""
        every = [axis for group in groups for axis in group]
        node = self.reshaped(node, [(axis,) if axis in order else () for axis in every])
        return self.call(_ATEN.expand.default, node, [self.size(axis.size) for axis in every])

    def reshaped(self, node: Node, groups: Groups) -> Node:
        """``node`` with one dimension for each group of consecutive axes; itself where that is its shape."""
        shape = [product(axis.size for axis in group) for group in groups]
        found = facts.shape(node)
        if len(found) == len(shape) and all(map(same_size, found, shape)):
            return node
        unknown = [at for at, size in enumerate(shape) if not isinstance(size, int)]
        given: list[int | Node] = [self.size(size) if at not in unknown[:1] else -1 for at, size in enumerate(shape)]
        return self.call(_ATEN.reshape.default, node, given)
