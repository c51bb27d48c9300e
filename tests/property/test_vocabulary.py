"""The tests' own ground: every spelling computes the spec it is said to spell."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attnfuse import reference
from attnfuse.operands import Operands
from tests.property.menu import Spelling
from tests.property.recipe import Inputs, Recipe
from tests.property.spell import spell
from tests.property.strategies import recipes, sizes, spellings, sweep

SWEEP = {name: (recipe, spelling) for name, recipe, spelling in sweep()}


@pytest.mark.parametrize("name", SWEEP)
def test_each_word_computes_its_spec(name: str) -> None:
    recipe, spelling = SWEEP[name]
    assert_computes(recipe, spelling, recipe.inputs())


@given(st.data())
def test_spellings_compute_their_spec(data: st.DataObject) -> None:
    recipe = data.draw(recipes(sizes(zero=True)))
    inputs = recipe.inputs(empty_rows=data.draw(st.booleans()))
    assert_computes(recipe, data.draw(spellings(recipe)), inputs)


def assert_computes(recipe: Recipe, spelling: Spelling, inputs: Inputs) -> None:
    """Both sides in float64, where only rounding of logits (as large as a finite fill) can tell them apart."""
    spelled, inputs = spell(recipe, spelling, wide=torch.float64), inputs.to(torch.float64)
    captures = tuple(inputs.captures[arg.name] for arg in recipe.args)
    spec = recipe.spec(torch.float64)
    want, _ = reference.attention(spec, Operands(inputs.query, inputs.key, inputs.value, captures))
    got = spelled.module(*spelled.arguments(inputs))
    added = recipe.fill if recipe.added and recipe.fill > -1e30 else 1.0
    rounding = torch.finfo(torch.float64).eps * max(1.0, abs(added))
    torch.testing.assert_close(
        got, spelled.leave(want), rtol=0, atol=1000 * rounding, equal_nan=True, msg=lambda m: f"{m}\n{spelled.source}"
    )
