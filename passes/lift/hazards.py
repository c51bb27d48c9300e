"""Why an attention that was read well may still not be replaced: others look at it, or write into it."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import replace

from torch.fx import Node

from attnfuse.errors import Refused
from attnfuse.graph import facts
from attnfuse.graph.order import Order, Write, storage
from attnfuse.passes.lift.reader import TakeAsTensor
from attnfuse.passes.site import UNWANTED, Leaf, Site
from attnfuse.score import P

__all__ = ["interior", "observed", "without_hazards"]


def without_hazards(site: Site, order: Order) -> Site:
    """The site with its interior; where a weight is used outside, the part of it that gives the weights.

    Raises :class:`Refused` where that is no node's value, or where something that was read is overwritten;
    :class:`TakeAsTensor` where what was read is the overwriting itself.
    """
    inside = interior(site, order)
    for node, user in _uses_outside(site, inside, order):
        if not order.before(node, site.softmax):
            escape = _escape(site, node, user, order)
            return without_hazards(_weights_alone(site, escape, order), order)
    for leaf in {leaf.node for leaf in site.read()}:
        if leaf in inside:
            reason = "what is done with the scores needs all of them at once"
            raise Refused(reason, leaf.name, facts.source_line(leaf))
        _refuse_overwritten(leaf, site, inside, order)
    for write in order.writes_between(site.product, site.node):
        if write.target in inside:
            _refuse_shared_write(write, inside, order)
    return replace(site, interior=frozenset(inside))


def _weights_alone(site: Site, escape: Refused, order: Order) -> Site:
    """The site up to its weights, at the last node that has them and that everybody has them from.

    Raises ``escape`` where there is none: what escapes is no weight, or a score's exponential, or is written in place,
    so that others see it under another name.
    """
    found = (_upto(leaf, site, escape.reason) for leaf in site.weights[::-1] if _holds_weights(leaf, site))
    for each in found:
        uses = _uses_outside(each, interior(each, order), order)
        if all(order.before(node, site.softmax) for node, _ in uses):
            return each
    raise escape


def _holds_weights(leaf: Leaf, site: Site) -> bool:
    """Whether a node may be the result instead: its keys are a dimension, and it is made, not written into."""
    keyed = any(index.axes == site.keys for index in leaf.place)
    return keyed and not facts.is_mutating(leaf.node) and not site.is_narrow


def _upto(leaf: Leaf, site: Site, wanted: str) -> Site:
    alone = replace(site, value=None, weight=P, dropout=0.0, weight_dtype=None, weights=(), wanted=wanted)
    return replace(alone, node=leaf.node, place=leaf.place, weight_place=leaf.place)


def observed(sites: Collection[Site], order: Order) -> dict[Node, Refused]:
    """The sites that are refused since a score is used elsewhere, by their node; that another site uses it, which will
    then compute it itself, is no reason.
    """
    refused: dict[Node, Refused] = {}
    while True:
        kept = [site for site in sites if site.node not in refused]
        replaced = {node for site in kept for node in site.interior}
        replaced |= {site.node for site in kept if site.value is None}
        found = {site.node: seen for site in kept if (seen := _observer(site, replaced, order))}
        if not found:
            return refused
        refused |= found


def _observer(site: Site, replaced: Collection[Node], order: Order) -> Refused | None:
    uses = _uses_outside(site, site.interior, order)
    return next((_escape(site, node, user, order) for node, user in uses if user not in replaced), None)


def _uses_outside(site: Site, inside: Collection[Node], order: Order) -> Iterator[tuple[Node, Node]]:
    """The nodes inside that have another use, each with its user, in graph order."""
    for node in sorted(inside, key=order.position.__getitem__):
        for user in node.users:
            if user not in inside and user is not site.node and order.is_live(user):
                yield node, user


def interior(site: Site, order: Order) -> set[Node]:
    """The nodes from the first product up to, not including, the second: scores, logits and weights."""
    after = _closure([site.product], lambda n: (u for u in n.users if order.before(u, site.node)))
    return _closure([site.node], lambda n: (a for a in n.all_input_nodes if a in after)) - {site.node}


def _closure(start: list[Node], step: Callable[[Node], Iterable[Node]]) -> set[Node]:
    seen, stack = set(start), list(start)
    while stack:
        for node in step(stack.pop()):
            if node not in seen:
                seen.add(node)
                stack.append(node)
    return seen


def _escape(site: Site, node: Node, user: Node, order: Order) -> Refused:
    what = "scores" if order.before(node, site.softmax) else "weights"
    by = "returned" if user.op == "output" else f"also used by {user.name}"
    return Refused(f"the attention {what} are {by}", node.name, facts.source_line(node), UNWANTED)


def _refuse_overwritten(leaf: Node, site: Site, inside: set[Node], order: Order) -> None:
    """The fused node reads an operand where it stands itself, which may be later than where the source read it."""
    read = site.consumers.get(leaf, leaf)
    for write in order.writes_between(leaf, site.node):
        if storage(write.target) is storage(leaf) and not order.before(write.node, read):
            if write.node in site.reads and write.node not in inside:
                raise TakeAsTensor(write.node)
            reason = f"{leaf.name} is overwritten before the product with the values"
            raise Refused(reason, write.node.name, facts.source_line(write.node), "write into a copy")


def _refuse_shared_write(write: Write, inside: set[Node], order: Order) -> None:
    """An in-place step on the scores is as good as a pure one while nobody else sees the storage."""
    home = storage(write.target)
    stale = [
        node
        for node in inside | {home}
        if storage(node) is home
        and order.before(node, write.node)
        and any(order.before(write.node, user) for user in node.users)
    ]
    if home not in inside or stale:
        reason = "the scores are written in place while another view of them is in use"
        raise Refused(reason, write.node.name, facts.source_line(write.node), "use the out-of-place operation")
