"""Where plans and layouts meet: what plans ask for is decided by the place stage, and plans are made to fit."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from torch.fx import Node

from attnfuse.errors import NoKernel
from attnfuse.graph.capture import Captured
from attnfuse.graph.order import gone_with
from attnfuse.graph.refresh import refresh
from attnfuse.graph.weightless import source_of
from attnfuse.kernels.prices import prices_of
from attnfuse.passes.lower import Plan, Prices, Wishes, demands, relaid
from attnfuse.passes.place import Decision, Region, arrange, decide, extract, orders
from attnfuse.passes.site import Demand

__all__ = ["Placed", "Reads", "copies_for", "place", "rearrange", "refreshed"]

log = logging.getLogger(__name__)

#: By the node of a site, the nodes of the edited graph that its fused node reads for some of its inputs.
Reads = dict[Node, dict[Node, Node]]


@dataclass(frozen=True)
class Placed:
    """Plans that fit the layouts decided for their operands, or as they were, for a ``reason``."""

    plans: tuple[Plan, ...]
    decisions: tuple[Decision, ...] = ()
    reason: str = ""


def place(plans: Sequence[Plan], captured: Captured, wishes: Wishes) -> Placed:
    """The best layouts of the plans' operands. Nothing is edited yet."""
    try:
        return _placed(plans, captured, wishes)
    except Exception as error:  # a bug of ours must not stop a compilation: as they are, layouts are right, if not fast
        log.exception("placing transposes failed")
        reason = f"placing transposes failed with {type(error).__name__}: {error}, which is a bug of attnfuse"
        return Placed(tuple(plans), reason=reason)


def _placed(plans: Sequence[Plan], captured: Captured, wishes: Wishes) -> Placed:
    prices = Prices(wishes)
    asked = demands(plans, prices)
    if not any(demand.is_better_turned for demand in asked):
        return Placed(tuple(plans))
    kept = frozenset(node for each in plans for node in each.inputs)
    gone = gone_with(captured.aten, [_site(each) for each in plans], kept)
    table = prices_of(wishes.target)
    regions = extract(captured.aten, asked, gone, captured.place_of, table, compiled=wishes.compiled)
    fitter = _Fitter({_site(each): each for each in plans}, prices)
    decisions = tuple(map(fitter.decided, filter(_is_a_question, regions)))
    return Placed(tuple(fitter.plans.values()), decisions)


def _site(plan: Plan) -> Node:
    return plan.attention.site.node


def _is_a_question(region: Region) -> bool:
    """Whether any kernel minds how its operands lie."""
    return any(isinstance(part, Demand) and part.d != part.n for part in region.parts)


@dataclass
class _Fitter:
    """``plans`` by their site's node, as the decisions so far want them."""

    plans: dict[Node, Plan]
    prices: Prices

    def __post_init__(self) -> None:
        self._orders: dict[Node, dict[Node, tuple[int, ...]]] = {site: {} for site in self.plans}

    def decided(self, region: Region) -> Decision:
        """The best layouts of a region, given those of the regions before it; its plans are made to fit."""
        decision = decide(region.repriced(self._price))
        if not decision.changes:
            return decision
        sites = dict.fromkeys(demand.site.node for demand in decision.demands)
        lying = {site: self._orders[site] | orders(decision, site) for site in sites}
        try:
            new = {
                site: relaid(self.plans[site], decision.minors(site), lying[site], self.prices.wishes) for site in sites
            }
        except NoKernel:
            return decision.withdrawn()
        # operands of one kernel may gain less together than each alone
        if sum(_seconds(self.plans[site]) - _seconds(plan) for site, plan in new.items()) < decision.spent:
            return decision.withdrawn()
        self.plans |= new
        self._orders |= lying
        return decision

    def _price(self, demand: Demand) -> tuple[float, float]:
        return self.prices.of(self.plans[demand.site.node].problem, demand.operands)


def _seconds(plan: Plan) -> float:
    return plan.choice.seconds[plan.choice.kernel]


def rearrange(decisions: Iterable[Decision], sites: Collection[Node], captured: Captured) -> Reads:
    """Edits the graph as was decided, except for regions of which a site is not among ``sites``."""
    reads: Reads = {site: {} for site in sites}
    values: list[Node] = []
    for decision in decisions:
        if decision.changes and all(demand.site.node in reads for demand in decision.demands):
            done = arrange(decision, captured)
            values += done.values
            for demand, node in done.operands.items():
                reads[demand.site.node][demand.node] = node
    # what the fusions leave without users cannot follow, and need not
    region = {call for value in values for call in (value, source_of(value))}
    refresh(captured.module.graph, {user for value in values for user in value.users}, among=region)
    return reads


def refreshed(decisions: Iterable[Decision], captured: Captured) -> None:
    """Lets the fake values of all that reads rearranged values follow; for after the dead nodes are gone."""
    moved = {captured.at_home(node) for each in decisions if each.changes for node in each.chosen}
    alive = [node for node in moved if not node._erased]
    followers = {user for node in alive for user in node.users} - moved
    refresh(captured.module.graph, followers)


def copies_for(site: Node, decisions: Iterable[Decision]) -> tuple[int, int]:
    """How many tensors are copied for the layouts of a site's operands, in the source and as decided."""
    counts = [each.copies for each in decisions if any(demand.site.node is site for demand in each.demands)]
    return sum(before for before, _ in counts), sum(now for _, now in counts)
