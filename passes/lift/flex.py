"""Calls of flex_attention: ``score_mod`` and ``mask_mod`` are read as the programs that they are."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._guards import tracing
from torch._subclasses import FakeTensor, FakeTensorMode
from torch.fx import Graph, GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx

from attnfuse.axes import Index, Unreadable, divided
from attnfuse.errors import Refused
from attnfuse.graph import facts
from attnfuse.graph.flex import Flex
from attnfuse.graph.order import Order
from attnfuse.passes.lift.assemble import Parts, site_of
from attnfuse.passes.lift.atoms import Leaf, Place
from attnfuse.passes.lift.operand import factored, viewed
from attnfuse.passes.lift.reader import Bound, Reader
from attnfuse.passes.site import Operand, Site
from attnfuse.score import Capture, Const, Expr, S, apply, reads_score, walk

__all__ = ["is_flex_result", "read_flex"]


def is_flex_result(node: Node) -> bool:
    """Whether a node is the result of a call of flex_attention."""
    if node.target is not operator.getitem:
        return False
    return node.args[1:] == (0,) and isinstance(node.all_input_nodes[0].target, Flex)


def read_flex(reader: Reader, node: Node) -> Site:
    """The attention that a call computes. Raises :class:`Unreadable` and :class:`Refused` where it cannot be said."""
    (call,) = node.all_input_nodes
    flex = call.target
    assert isinstance(flex, Flex)
    if flex.unproven:
        raise Refused(flex.unproven, call.name, facts.source_line(call), "pass what it masks as a score_mod")
    query, key, value, *captures = _arguments(call)
    operands, place, weight_place, inner = _operands(reader, call, node, (query, key, value))
    positions = tuple(map(reader.position, weight_place))
    scale = apply("mul", Const(flex.scale), apply("mul", operands[0].factor, operands[1].factor))
    of_score, of_mask = captures[: flex.score_captures], captures[flex.score_captures :]
    score = _read(reader, call, flex.score_mod, (apply("mul", scale, S), *positions), of_score)
    keep = _read(reader, call, flex.mask_mod, positions, of_mask)
    if not weight_place[-1].axes:
        raise Unreadable("there is a single key, whose weight is 1")
    parts = Parts(
        node=node,
        product=call,
        softmax=call,
        place=place,
        weight_place=weight_place,
        keys=weight_place[-1].axes,
        inner=inner,
        operands=operands,
        score=apply("where", keep, score, Const(float("-inf"))),
        empty_rows="zero",
        exact_scores=facts.dtype(node).itemsize < 4,
        source="flex",
    )
    return site_of(reader, parts)


def _arguments(call: Node) -> list[Node]:
    return [arg for arg in call.args if isinstance(arg, Node)]


def _operands(
    reader: Reader, call: Node, node: Node, given: tuple[Node, Node, Node]
) -> tuple[tuple[Operand, Operand, Operand], Place, Place, Any]:
    """Query, key and value, and the places of the result and of a score; heads are shared in runs."""
    query, key, value = given
    place = tuple(map(reader.space.fresh, facts.shape(node)))
    batch, head, row, outer = place
    keys, inner = reader.space.fresh(facts.shape(key)[-2]), reader.space.fresh(facts.shape(query)[-1])
    heads, kv_heads = facts.shape(query)[1], facts.shape(key)[1]
    group = divided(heads, kv_heads)
    if group is None:
        raise Unreadable("query heads that no whole number of key and value heads shares")
    shared = reader.space.regroup((head,), (heads,), (kv_heads, group))[0]
    operands = (
        factored(reader, query, (batch, head, row, inner), call, inner.axes),
        factored(reader, key, (batch, shared, keys, inner), call, inner.axes),
        viewed(reader, value, (batch, shared, keys, outer), call, (batch, head, row, keys)),
    )
    return operands, place, (batch, head, row, keys), inner.axes


def _read(reader: Reader, call: Node, program: GraphModule, given: Sequence[Expr], captures: Sequence[Node]) -> Expr:
    """The value of a program whose first inputs are ``given`` and whose others are tensors of the graph."""
    # of one element, since torch would ask a tensor without dimensions for its value where it is an index
    numbers = [torch.zeros(1, dtype=torch.float32 if reads_score(number) else torch.int64) for number in given]
    values = [facts.tensor(capture) for capture in captures]
    graph = _traced(program, numbers, values)
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    bound: dict[Node, Bound] = dict(zip(inputs, (*given, *captures), strict=True))
    (result,) = graph.output_node().all_input_nodes
    found = reader.inside(Order.of(graph), bound, call).read(result, (Index(),) * facts.rank(result))
    for part in walk(found):
        if isinstance(part, Capture) and isinstance(atom := reader.atoms[part.slot], Leaf) and atom.node.graph is graph:
            reason = f"what {atom.node.name} does in its score_mod or mask_mod is not read"
            raise Refused(reason, call.name, facts.source_line(call))
    return found


def _traced(program: GraphModule, numbers: Sequence[Tensor], captures: Sequence[Tensor]) -> Graph:
    """A program on numbers, as ATen operations."""
    mode = next((x.fake_mode for x in captures if isinstance(x, FakeTensor)), None) or FakeTensorMode()
    given = (*map(mode.from_tensor, numbers), *captures)

    def run(*values: Tensor) -> Tensor:
        result: Tensor = program(*values)
        return result

    with tracing(None):
        return make_fx(run, tracing_mode="fake", _allow_non_fake_inputs=True)(*given).graph
