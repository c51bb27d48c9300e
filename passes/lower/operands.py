"""Puts a site's operands, in the canonical layout, before the place where its fused node goes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch.fx import Node

from attnfuse.graph import facts
from attnfuse.graph.build import Builder
from attnfuse.passes.site import Attention, Layout, Leaf

__all__ = ["Operands", "build_operands", "nearest", "restore"]


@dataclass(frozen=True)
class Operands:
    """Nodes with the shapes of :mod:`attnfuse.spec`; ``values`` is the value, or nothing; ``symbols`` ints or nodes."""

    query: Node
    key: Node
    values: tuple[Node, ...]
    captures: tuple[Node, ...]
    symbols: tuple[int | Node, ...]


def build_operands(builder: Builder, attention: Attention, at_home: Callable[[Node], Node]) -> Operands:
    """All operands of ``attention``; ``at_home`` leads from the nodes that were read to those of the edited graph."""
    query, key, *values = (_build(builder, layout, at_home) for layout in attention.operands)
    captures = tuple(_build(builder, layout, at_home) for layout in attention.captures)
    return Operands(query, key, tuple(values), captures, tuple(map(builder.size, attention.symbols)))


def restore(builder: Builder, attention: Attention, out: Node) -> Node:
    """The fused node's result in the shape that the source's second contraction has."""
    wanted = [index.axes for index in attention.site.place]
    return builder.arranged(out, attention.groups, wanted, [False] * len(wanted))


def _build(builder: Builder, layout: Layout, at_home: Callable[[Node], Node]) -> Node:
    leaf = nearest(layout)
    part = builder.part(at_home(leaf.node), leaf.place)
    node = builder.arranged(part, [i.axes for i in leaf.place], layout.groups, layout.expand)
    if facts.dtype(node) != layout.dtype:
        node = builder.call(torch.ops.aten.to.dtype, node, layout.dtype)
    return node


def nearest(layout: Layout) -> Leaf:
    """The view that already is in the wanted layout, else the tensor that all of them are views of."""
    ready = (leaf for leaf in layout.views if tuple(i.axes for i in leaf.place) == layout.groups)
    return next(ready, layout.views[-1])
