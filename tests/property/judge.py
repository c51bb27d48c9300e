"""What a random program is run on, and what its result must be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import EllipsisType

import torch
from hypothesis import strategies as st
from torch import Tensor

from attnfuse import reference
from attnfuse.graph import double
from attnfuse.operands import Operands
from tests.property.recipe import FINFO_MIN, Inputs, Recipe
from tests.property.spell import Spelled
from tests.support.record import recorded

__all__ = ["DATA", "Data", "exact_result", "inputs_of", "nudged", "otherwise_rounded", "representable"]


@dataclass(frozen=True)
class Data:
    """What the inputs are like: their dtype, how large the logits get, whether whole rows are masked."""

    dtype: torch.dtype = torch.float32
    magnitude: float = 1.0
    empty_rows: bool = False
    seed: int = 0


DATA = st.builds(
    Data,
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.sampled_from([1.0, 30.0]),
    st.booleans(),
    st.integers(0, 3),
)


def representable(recipe: Recipe, dtype: torch.dtype) -> Recipe:
    """float32's most negative number is an error as a fill of half types; they have their own."""
    return replace(recipe, fill=torch.finfo(dtype).min) if recipe.fill == FINFO_MIN else recipe


def inputs_of(recipe: Recipe, made_of: Data) -> Inputs:
    """The inputs, rounded to their dtype."""
    return recipe.inputs(made_of.seed, made_of.magnitude, made_of.empty_rows).to(made_of.dtype)


def exact_result(spelled: Spelled, inputs: Inputs) -> tuple[Tensor, Tensor]:
    """The result in float64 from the same rounded inputs, and which of its elements are in fully masked rows.

    Those are held against each other: an added finite fill costs the source all its digits there.
    """
    recipe, exact = spelled.recipe, inputs.to(torch.float64)
    captures = tuple(exact.captures[arg.name] for arg in recipe.args)
    out, lse = reference.attention(recipe.spec(torch.float64), Operands(exact.query, exact.key, exact.value, captures))
    empty = (lse < max(recipe.fill, FINFO_MIN) / 2).unsqueeze(-1).expand(out.shape)
    return spelled.leave(out), spelled.leave(empty)


def nudged(inputs: Inputs, random: torch.Generator) -> Inputs:
    """The inputs in float64, each element moved by one rounding."""
    move = partial(double.nudged, random=random)
    captures = {name: move(x) for name, x in inputs.captures.items()}
    return Inputs(move(inputs.query), move(inputs.key), move(inputs.value), captures)


def otherwise_rounded(
    spelled: Spelled, args: Sequence[Tensor], rows: Tensor | EllipsisType | int = ...
) -> list[Callable[[], Tensor]]:
    """What a program gives in ``rows``, or as that one of several results, where its inputs and steps are rounded
    otherwise; computed when asked for.
    """

    def run(random: torch.Generator) -> Tensor:
        graph = recorded(spelled.module, [x.clone() for x in args])
        out: Tensor = double.run_in_double(graph, [double.nudged(x, random) for x in args], random)
        return out[rows]

    return double.otherwise_rounded(run)
