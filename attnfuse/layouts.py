"""Where plans and layouts meet: what plans ask for is decided by the place stage, and plans are made to fit."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from torch.fx import Node

from attnfuse.errors import NoKernel
from attnfuse.graph.capture import Captured
from attnfuse.graph.order import gone_with
from attnfuse.graph.refresh import refresh
from attnfuse.graph.weightless import source_of
from attnfuse.kernels.prices import prices_of
from attnfuse.passes.lower import Plan, Wishes, demands, relaid
from attnfuse.passes.place import Decision, arrange, decide, extract, orders

__all__ = ["Reads", "copies_for", "place", "rearrange", "refreshed"]

#: By the node of a site, the nodes of the edited graph that its fused node reads for some of its inputs.
Reads = dict[Node, dict[Node, Node]]


def place(plans: Sequence[Plan], captured: Captured, wishes: Wishes) -> tuple[tuple[Plan, ...], tuple[Decision, ...]]:
    """Plans that fit the best layouts of their operands, and what is to be done for those. Nothing is edited yet."""
    asked = demands(plans, wishes)
    if not any(demand.is_better_turned for demand in asked):
        return tuple(plans), ()
    gone = gone_with(captured.aten, [each.attention.site.node for each in plans])
    regions = extract(captured.aten, asked, gone, captured.place_of, prices_of(wishes.target))
    fitter = _Fitter({_site(each): each for each in plans}, wishes)
    decisions = tuple(fitter.fitted(decision) for decision in decide(regions))
    return tuple(fitter.plans.values()), decisions


def _site(plan: Plan) -> Node:
    return plan.attention.site.node


@dataclass
class _Fitter:
    """``plans`` by their site's node, as the decisions so far want them."""

    plans: dict[Node, Plan]
    wishes: Wishes

    def __post_init__(self) -> None:
        self._orders: dict[Node, dict[Node, tuple[int, ...]]] = {site: {} for site in self.plans}

    def fitted(self, decision: Decision) -> Decision:
        """The decision, its plans made to fit; withdrawn where kernels together do not gain what each promised."""
        if not decision.changes:
            return decision
        wanted = {site: dict(known) for site, known in self._orders.items()}
        for demand, order in orders(decision).items():
            wanted[demand.site.node][demand.node] = order
        touched = dict.fromkeys(demand.site.node for demand in decision.demands)
        try:
            new = {site: relaid(self.plans[site], wanted[site], self.wishes) for site in touched}
        except NoKernel:
            return decision.withdrawn()
        gain = sum(_seconds(self.plans[site]) - _seconds(plan) for site, plan in new.items())
        if gain < decision.spent:
            return decision.withdrawn()
        self.plans |= new
        self._orders = wanted
        return decision


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
    refresh(captured.module.graph, values, among=frozenset(source_of(value) for value in values) | set(values))
    return reads


def refreshed(decisions: Iterable[Decision], captured: Captured) -> None:
    """Lets the fake values of all that reads rearranged values follow; for after the dead nodes are gone."""
    moved = (captured.at_home(node) for each in decisions if each.changes for node in each.chosen)
    refresh(captured.module.graph, [node for node in moved if not node._erased])


def copies_for(site: Node, decisions: Iterable[Decision]) -> tuple[int, int]:
    """How many tensors are copied for the layouts of a site's operands, in the source and as decided."""
    counts = [each.copies for each in decisions if any(demand.site.node is site for demand in each.demands)]
    return sum(before for before, _ in counts), sum(now for _, now in counts)
