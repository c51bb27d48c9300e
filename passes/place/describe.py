"""A decision in words and numbers, for the report."""

from __future__ import annotations

from torch.fx import Node

from attnfuse.graph import facts
from attnfuse.graph.weightless import source_of
from attnfuse.passes.place.decide import Decision
from attnfuse.passes.place.extract import Gathered, Outside, Part
from attnfuse.passes.place.reading import Stops
from attnfuse.passes.place.region import Held
from attnfuse.passes.site import Demand
from attnfuse.report import Lying, Region

__all__ = ["described"]


def described(decision: Decision) -> Region:
    """The region, what was chosen and what else could have been."""
    problem = decision.region.problem
    copied: dict[int, float] = {}
    for i, minor in problem.copies(decision.labels):
        copied[i] = copied.get(i, 0.0) + problem.values[i].copy.of(minor)
    values = (
        Lying(
            name=value.name,
            what=_what(part),
            before=value.today,
            now=label,
            reads=(*value.reads, *value.tied),
            seconds=value.price.of(label),
            copied=copied.get(i, 0.0),
        )
        for i, (value, (part, label)) in enumerate(zip(problem.values, decision.parts(), strict=True))
    )
    sites = dict.fromkeys(demand.site.node.name for demand in decision.demands)
    return Region(tuple(sites), tuple(values), decision.copies, {**decision.alternatives, "chosen": decision.seconds})


def _what(part: Part) -> str:
    match part:
        case Demand():
            return "operand"
        case Outside():
            return "reader that may rely on the layout"
        case Gathered():
            return "read to be moved"
        case Held(node, _, _, Stops()):
            return f"fixed: {_origin(node)}"
    return _origin(part.node)


def _origin(node: Node) -> str:
    match node.op:
        case "placeholder":
            return "input"
        case "get_attr":
            return "parameter"
    return facts.op_name(source_of(node)) or str(node.target)
