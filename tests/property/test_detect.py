"""``detect(spell(spec)) == spec``: whatever the spelling, attnfuse reads what is computed."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from attnfuse.spec import AttentionSpec
from tests.property.menu import Spelling
from tests.property.recipe import Recipe
from tests.property.spell import spell
from tests.property.strategies import recipes, spellings, sweep
from tests.property.vocabulary import UNREAD
from tests.support.doors import DOORS, rewritten
from tests.support.specs import assert_same_spec

#: Each word once; the combinations of layouts are left to the random search.
SWEEP = {name: (recipe, spelling) for name, recipe, spelling in sweep() if "(" not in name}
NOT_YET = [f"{axis}: {word}" for axis, unread in UNREAD.items() for word in unread]


@pytest.mark.parametrize("name", [name for name in SWEEP if name not in NOT_YET])
def test_each_word_is_read(name: str) -> None:
    assert_detected("training IR", *SWEEP[name])


@pytest.mark.parametrize("name", NOT_YET)
def test_what_is_not_read_yet_is_left_as_it_is(name: str) -> None:
    recipe, spelling = SWEEP[name]
    spelled = spell(recipe, spelling)
    args = spelled.arguments(recipe.inputs())
    program = rewritten("training IR", spelled.module, args)
    assert not program.report.fused, f"{name} is read now: take it out of UNREAD"
    torch.testing.assert_close(program.run(*args), spelled.module(*args), rtol=0, atol=0)


@pytest.mark.parametrize("door", DOORS)
def test_any_spelling_is_read(door: str) -> None:
    @given(st.data())
    @settings(max_examples=max(10, settings().max_examples // 2))
    def check(data: st.DataObject) -> None:
        recipe = data.draw(recipes())
        assert_detected(door, recipe, data.draw(spellings(recipe, unread=False)))

    check()


def assert_detected(door: str, recipe: Recipe, spelling: Spelling) -> None:
    spelled = spell(recipe, spelling)
    report = rewritten(door, spelled.module, spelled.arguments(recipe.inputs()), certify="off").report
    assert [site.reason for site in report.refused] == [], spelled.source
    assert len(report.fused) == 1, spelled.source
    got = AttentionSpec.from_text(report.fused[0].spec)
    for want in _readings(recipe, spelling):
        assert_same_spec(got, want)


def _readings(recipe: Recipe, spelling: Spelling) -> list[AttentionSpec]:
    """What the spec must be; nothing where operands arrive with batch and heads in one dimension and a capture or a
    view of the scores tells these apart, so that more than one spec is right."""
    if not spelling.arrive.startswith("flat"):
        return [recipe.spec()]
    told_apart = any({"b", "h"} & set(arg.axes) for arg in recipe.args)
    return [] if told_apart or "viewed" in spelling.product else [replace(recipe.spec(), batch=0)]
