"""Calls that are attention already: scaled_dot_product_attention, read into the same site as a written-out program.

Semantics as documented: https://pytorch.org/docs/stable/generated/torch.nn.functional.scaled_dot_product_attention.html
is_causal is aligned top left, a bool mask says what is kept, and a row that keeps no key is zero.
"""

from __future__ import annotations

import operator

from torch.fx import Node

from attnfuse.axes import Unreadable, divided
from attnfuse.graph import facts
from attnfuse.kernels import Source
from attnfuse.passes.lift.assemble import Parts, site_of
from attnfuse.passes.lift.atoms import Place
from attnfuse.passes.lift.operand import factored, viewed
from attnfuse.passes.lift.reader import Arguments, Reader
from attnfuse.passes.lift.view import aligned
from attnfuse.passes.site import Site
from attnfuse.score import Const, Expr, S, apply

__all__ = ["is_call", "read_call"]

_CALL = "scaled_dot_product_attention"
#: What export to core ATen may leave of it: a call that gives the log of each row's sum besides.
_WITH_LSE = "_scaled_dot_product_flash_attention_for_cpu"

_MASKED = Const(float("-inf"))


def is_call(node: Node) -> bool:
    """Whether a node's value is the result of such a call."""
    return _call_of(node) is not None


def _call_of(node: Node) -> Node | None:
    if facts.op_name(node) == _CALL and facts.is_aten(node):
        return node
    if node.target is operator.getitem and node.args[1:] == (0,):
        (many,) = node.all_input_nodes
        return many if facts.op_name(many) == _WITH_LSE and facts.is_aten(many) else None
    return None


def read_call(reader: Reader, node: Node) -> Site:
    """The attention that a call computes. Raises :class:`Unreadable` and :class:`Refused` where it cannot be said."""
    call = _call_of(node) or node
    args = facts.arguments(call)
    query, key, value = args["query"], args["key"], args["value"]
    shapes = tuple(map(facts.shape, (query, key, value)))
    if any(size == 0 for shape in shapes for size in shape):
        raise Unreadable("a dimension is empty")
    place = tuple(map(reader.space.fresh, facts.shape(node)))
    keys, inner = reader.space.fresh(shapes[1][-2]), reader.space.fresh(shapes[0][-1])
    if not keys.axes:
        raise Unreadable("there is a single key, whose weight is 1")
    lead, row, outer = place[:-2], place[-2], place[-1]
    kv_lead = _shared_heads(reader, args, lead)
    weight_place = (*lead, row, keys)
    operands = (
        factored(reader, query, (*aligned(shapes[0][:-2], lead), row, inner), call, inner.axes),
        factored(reader, key, (*aligned(shapes[1][:-2], kv_lead), keys, inner), call, inner.axes),
        viewed(reader, value, (*aligned(shapes[2][:-2], kv_lead), keys, outer), call, weight_place),
    )
    scale = apply("mul", _scale(reader, args, query), apply("mul", operands[0].factor, operands[1].factor))
    parts = Parts(
        node=node,
        product=call,
        softmax=call,
        place=place,
        weight_place=weight_place,
        keys=keys.axes,
        inner=inner.axes,
        operands=operands,
        score=_logit(reader, args, apply("mul", scale, S), weight_place),
        dropout=float(args["dropout_p"]),
        empty_rows="zero",
        source=_source(args),
        exact_scores=facts.dtype(node).itemsize < 4,
    )
    return site_of(reader, parts)


def _shared_heads(reader: Reader, args: Arguments, lead: Place) -> Place:
    """The batch dimensions of key and value: with enable_gqa a run of query heads shares one of theirs."""
    if not args.get("enable_gqa"):
        return lead
    heads, kv_heads = (facts.shape(args[name])[-3] for name in ("query", "key"))
    group = divided(heads, kv_heads)
    if group is None or facts.shape(args["value"])[-3] != kv_heads:
        raise Unreadable("query heads that no whole number of key and value heads shares")
    head = reader.space.regroup(lead[-1:], (heads,), (kv_heads, group))[0]
    return (*lead[:-1], head)


def _scale(reader: Reader, args: Arguments, query: Node) -> Expr:
    if (given := args["scale"]) is not None:
        return reader.scalar(given)
    width = facts.shape(query)[-1]
    return Const(width**-0.5) if isinstance(width, int) else apply("rsqrt", apply("float", reader.size(width)))


def _logit(reader: Reader, args: Arguments, score: Expr, place: Place) -> Expr:
    if args["is_causal"]:
        row, key = map(reader.position, place[-2:])
        score = apply("where", apply("le", key, row), score, _MASKED)
    mask = args.get("attn_mask")
    if mask is None:
        return score
    read = reader.read(mask, aligned(facts.shape(mask), place))
    return apply("where", read, score, _MASKED) if facts.kind(mask) == "bool" else apply("add", score, read)


def _source(args: Arguments) -> Source:
    if args.get("attn_mask") is not None:
        return "sdpa masked"
    return "sdpa causal" if args["is_causal"] else "sdpa"
