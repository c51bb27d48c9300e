"""Whatever is spelt, its weights returned too: fused up to them, as good as the source, or refused and left alone."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from tests.property.judge import DATA, Data, inputs_of, otherwise_rounded, representable
from tests.property.menu import Spelling
from tests.property.recipe import Recipe
from tests.property.spell import Spelled, spell
from tests.property.strategies import recipes, spellings
from tests.support.compare import assert_as_good
from tests.support.doors import DOORS, rewritten


@pytest.mark.parametrize("door", DOORS)
def test_rewritten_is_as_good_as_its_source(door: str) -> None:
    @given(st.data())
    @settings(max_examples=max(10, settings().max_examples // 2))
    def check(data: st.DataObject) -> None:
        recipe, made_of = data.draw(recipes()), data.draw(DATA)
        recipe = representable(recipe, made_of.dtype)
        assert_equivalent(door, recipe, data.draw(spellings(recipe)), made_of)

    check()


def assert_equivalent(door: str, recipe: Recipe, spelling: Spelling, made_of: Data) -> None:
    spelled, exactly = (returning_weights(spell(recipe, spelling, wide)) for wide in (torch.float32, torch.float64))
    inputs = inputs_of(recipe, made_of)
    args = spelled.arguments(inputs)
    source = spelled.module(*args)
    program = rewritten(door, spelled.module, args)
    assert not [site.reason for site in program.report.refused if "bug of attnfuse" in site.reason], spelled.source
    fused = program.run(*args)
    if not program.report.fused:
        assert all(site.reason for site in program.report.refused)
        torch.testing.assert_close(fused, source, rtol=0, atol=0, equal_nan=True)
        return
    exact = exactly.module(*exactly.arguments(inputs.to(torch.float64)))
    for at, (ours, theirs, truth) in enumerate(zip(fused, source, exact, strict=True)):
        assert_as_good(ours, theirs, truth, moved=otherwise_rounded(spelled, args, at))


def returning_weights(spelled: Spelled) -> Spelled:
    """The same with ``weights`` as a second result; rejected where a call keeps them to itself."""
    if "weights = " not in spelled.source:
        reject()
    return replace(spelled, source=re.sub(r"(?m)^    return (.*)$", r"    return \1, weights", spelled.source))
