"""Where a program cuts off a gradient, by ``detach`` or under ``no_grad``: what is read must not lead past it."""

from __future__ import annotations

from collections.abc import Sequence, Set

from torch.fx import Node

from attnfuse.algebra import differentiated
from attnfuse.graph import facts
from attnfuse.passes.lift.atoms import Atom, Leaf, Reduced
from attnfuse.score import Expr

__all__ = ["is_cut_off"]


def is_cut_off(node: Node, found: Expr, atoms: Sequence[Atom], flows: Set[Node]) -> bool:
    """Whether no gradient flows through a node to what its value was ``found`` to be made of.

    ``flows`` are the nodes that one flows back from.
    """
    if not flows or node in flows or facts.kind(node) != "float":
        return False
    return any(_flows_back(atoms[part.slot], flows) for part in differentiated(found))


def _flows_back(atom: Atom, flows: Set[Node]) -> bool:
    match atom:
        case Leaf(node):
            return node in flows and facts.kind(node) == "float"
        case Reduced("max", node):  # kept where its gradient is cut off
            return node in flows
    return not flows.isdisjoint(atom.node.all_input_nodes)
