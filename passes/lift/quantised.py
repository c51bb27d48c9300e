"""Weights that are rounded to a float8 type between the softmax and the second product."""

from __future__ import annotations

from torch.fx import Node

from attnfuse.graph import facts
from attnfuse.passes.lift.pointwise import CASTS
from attnfuse.passes.lift.view import VIEWS
from attnfuse.reference import is_float8, name_of

__all__ = ["quantised_to"]

#: What may stand between weights that are quantised and their product with the values.
_BEHIND_WEIGHTS = frozenset((*VIEWS, *CASTS, "mul", "div"))


def quantised_to(weights: Node) -> str | None:
    """The float8 type that weights are rounded to on their way to the product with the values; None where to none."""
    while not (facts.is_tensor(weights) and is_float8(facts.dtype(weights))):
        if facts.op_name(weights) not in _BEHIND_WEIGHTS or not weights.all_input_nodes:
            return None
        weights = weights.all_input_nodes[0]
    return name_of(facts.dtype(weights))
