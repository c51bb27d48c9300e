"""Finds attention: a contraction of values with weights that come from a normalised contraction.

The walk goes from the second contraction backwards. It mutates nothing; a place that looks like attention and
cannot be lifted is a :class:`Refused` that says why.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from functools import partial

from torch.fx import Graph, Node

from attnfuse.axes import Unreadable
from attnfuse.errors import Refused
from attnfuse.graph import facts
from attnfuse.graph.order import Order, storage
from attnfuse.passes.lift.activation import ACTIVATIONS
from attnfuse.passes.lift.assemble import read_site
from attnfuse.passes.lift.call import is_call, read_call
from attnfuse.passes.lift.constant import Constants
from attnfuse.passes.lift.contraction import CONTRACTIONS
from attnfuse.passes.lift.create import CREATE
from attnfuse.passes.lift.flex import is_flex_result, read_flex
from attnfuse.passes.lift.hazards import observed, without_hazards
from attnfuse.passes.lift.normaliser import NORMALISER_NAMES, NORMALISERS
from attnfuse.passes.lift.pointwise import POINTWISE
from attnfuse.passes.lift.reader import Reader, Rules, TakeAsTensor
from attnfuse.passes.lift.reduction import REDUCTIONS, is_product_sum
from attnfuse.passes.lift.rescaled import read_rescaled
from attnfuse.passes.lift.unnormalised import can_hold, read_unnormalised
from attnfuse.passes.lift.view import VIEWS
from attnfuse.passes.site import Site

__all__ = ["Given", "lift"]

log = logging.getLogger(__name__)

#: Everything that is read, later rules before earlier ones of the same name.
_RULES: Rules = {**VIEWS, **POINTWISE, **ACTIVATIONS, **CREATE, **CONTRACTIONS, **REDUCTIONS, **NORMALISERS}

#: What scores and weights pass through without a new contraction.
_THROUGH = frozenset((*VIEWS, *POINTWISE, *ACTIVATIONS, *REDUCTIONS, *NORMALISERS, "tril", "triu", "native_dropout"))

#: What moves elements in ways that are not read: attention through it is refused, not overlooked.
_MOVED = frozenset(("pad", "constant_pad_nd", "as_strided", "roll", "gather", "scatter", "slice_scatter", "copy"))

Found = list[Site | Refused]


@dataclass(frozen=True)
class Given:
    """What lift asks about a graph's nodes: whether a fused node could be handed the value of one, which are
    parameters, which never change, and which a gradient flows back from.
    """

    is_given: Callable[[Node], bool] = lambda node: True
    is_parameter: Callable[[Node], bool] = facts.is_parameter
    constants: Constants = field(default_factory=Constants)
    differentiated: frozenset[Node] = frozenset()


def lift(graph: Graph, given: Given | None = None) -> Found:
    """Every attention site of an ATen graph, in graph order; linear in its size."""
    order, given = Order.of(graph), given or Given()
    found: dict[Node, Site | Refused] = {}
    for each in _candidates(graph, given.is_parameter):
        for item in _attempt(each, order, given):
            # one site may give several products their weights
            found.setdefault(item.node if isinstance(item, Site) else each.node, item)
    found |= observed([item for item in found.values() if isinstance(item, Site)], order)
    inside = {inner for item in found.values() if isinstance(item, Site) for inner in item.interior}
    # what is refused alone may be a part of what is not
    return [item for node, item in found.items() if node not in inside]


#: Reads the attention that a node is the result of; None where it is none.
Read = Callable[[Reader, Node], "Site | None"]


@dataclass(frozen=True)
class Candidate:
    """A node that may be an attention's result. ``start`` is where it surely begins if it is one; None where
    something that cannot be read need not be attention.
    """

    node: Node
    read: Read
    start: Node | None = None


def _candidates(graph: Graph, is_parameter: Callable[[Node], bool]) -> list[Candidate]:
    """Calls that are attention; contractions of something that a normaliser of scores made, from the normaliser on;
    quotients and products of such; and contractions of something pointwise that another made.
    """
    unnormalised = partial(read_unnormalised, is_parameter=is_parameter)
    bare = _downstream(graph, lambda n: _is_score_product(n) and can_hold(n))
    scored = _downstream(graph, _is_score_product)
    weighted = _downstream(graph, lambda n: facts.op_name(n) in NORMALISER_NAMES and n.all_input_nodes[0] in scored)
    products = {node: start for node in graph.nodes if _is_product(node) and (start := _reached(node, weighted))}
    summed = _downstream(graph, products.__contains__)
    found: list[Candidate] = []
    for node in graph.nodes:
        if is_call(node):
            found.append(Candidate(node, read_call, node))
        elif is_flex_result(node):
            found.append(Candidate(node, read_flex, node))
        elif node in products:
            found.append(Candidate(node, read_site, products[node]))
        elif facts.op_name(node) in ("div", "mul") and _reached_by(node.all_input_nodes, summed):
            found.append(Candidate(node, read_rescaled))
        elif _is_score_product(node) and can_hold(node) and _reached(node, bare):
            found.append(Candidate(node, unnormalised))
    return found


def _is_product(node: Node) -> bool:
    return _base(node) in CONTRACTIONS or is_product_sum(node)


def _is_score_product(node: Node) -> bool:
    """``linear`` does not count: a softmax of a projection is a router, not attention."""
    return _is_product(node) and _base(node) != "linear"


def _reached(node: Node, reached: dict[Node, Node]) -> Node | None:
    """The start that one of a node's operands comes from; a broadcast product is looked through."""
    operands = node.all_input_nodes[0].all_input_nodes if is_product_sum(node) else node.all_input_nodes
    return next((reached[arg] for arg in operands if arg in reached), None)


def _downstream(graph: Graph, is_start: Callable[[Node], bool]) -> dict[Node, Node]:
    """Nodes reached from a start by views and pointwise operations, with the last start on the way."""
    reached: dict[Node, Node] = {}
    for node in graph.nodes:
        if node.op == "call_function" and node.all_input_nodes and is_start(node):
            reached[node] = node
        elif start := _reached_by(node.all_input_nodes, reached):
            if _base(node) in _THROUGH or _base(node) in _MOVED:
                reached[node] = start
            if facts.is_mutating(node):
                reached |= {storage(target): start for target in facts.written(node)}
    return reached


def _reached_by(nodes: Collection[Node], reached: dict[Node, Node]) -> Node | None:
    return next((reached[node] for node in nodes if node in reached), None)


def _base(node: Node) -> str:
    """An operation's name without the underscore of its in-place variant."""
    name = facts.op_name(node)
    return name if name in _THROUGH or name in CONTRACTIONS else name.rstrip("_")


def _unread_weights(reader: Reader, start: Node) -> Found:
    """A refusal for the first step from the normaliser on that could not be read; none where all could."""
    for node, reason in reader.unread.items():
        if node is start or start in node.all_input_nodes:
            return [Refused(reason, node.name, facts.source_line(node))]
    moved = _mover(start)
    if moved is None:
        return []
    reason = f"the weights go through {facts.op_name(moved)} before the product with the values, which is not read"
    return [Refused(reason, start.name, facts.source_line(start))]


def _mover(start: Node) -> Node | None:
    """The first operation on the way from ``start`` that moves elements as is not read."""
    seen, queue = {start}, [start]
    for node in queue:
        if _base(node) in _MOVED:
            return node
        for user in node.users:
            if user not in seen and (_base(user) in _THROUGH or _base(user) in _MOVED):
                seen.add(user)
                queue.append(user)
    return None


def _attempt(
    candidate: Candidate, order: Order, given: Given, opaque: frozenset[Node] = frozenset(), *, narrow: bool = True
) -> Found:
    node, start = candidate.node, candidate.start
    try:
        # where the result has no gradient, neither has anything that it alone is made of
        flows = given.differentiated if node in given.differentiated else frozenset()
        reader = Reader(_RULES, order, given.is_given, given.constants, opaque, flows, narrow=narrow)
        site = candidate.read(reader, node)
        if site is not None and narrow and site.is_narrow:
            wide = _attempt(candidate, order, given, opaque, narrow=False)
            site = replace(site, widened=next((each for each in wide if isinstance(each, Site)), None))
        if site is not None:
            return [without_hazards(site, order)]
        return [] if start is None else _unread_weights(reader, start)
    except TakeAsTensor as error:
        return _attempt(candidate, order, given, opaque | {error.node}, narrow=narrow)
    except Unreadable as error:
        return [] if start is None else [Refused(str(error), start.name, facts.source_line(start))]
    except Refused as refusal:
        return [refusal]
    except Exception as error:  # nothing was changed yet, and a bug of ours must not stop the compilation of a model
        log.exception("reading %s failed", node.name)
        where = start or node
        reason = f"reading it failed with {type(error).__name__}: {error}, which is a bug of attnfuse"
        return [Refused(reason, where.name, facts.source_line(where), "please report it")]
