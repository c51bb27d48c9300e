"""A rewritten program is as good as its source against float64, with the same NaNs, on whatever data it meets."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, reject, settings
from hypothesis import strategies as st
from torch import Tensor

from attnfuse import reference
from attnfuse.graph import double
from attnfuse.operands import Operands
from tests.property.judge import DATA, Data, exact_result, inputs_of, nudged, otherwise_rounded, representable
from tests.property.menu import Spelling
from tests.property.recipe import Inputs, Recipe, Sizes
from tests.property.spell import Spelled, spell
from tests.property.strategies import recipes, sizes, spellings
from tests.support.compare import assert_as_good
from tests.support.doors import DOORS, Rewritten, rewritten


@pytest.mark.parametrize("door", DOORS)
def test_rewritten_is_as_good_as_its_source(door: str) -> None:
    @given(st.data())
    @settings(max_examples=max(10, settings().max_examples // 2))
    def check(data: st.DataObject) -> None:
        recipe, made_of = data.draw(recipes(sizes(zero=True))), data.draw(DATA)
        recipe = representable(recipe, made_of.dtype)
        assert_equivalent(door, recipe, data.draw(spellings(recipe)), made_of)

    check()


def assert_equivalent(door: str, recipe: Recipe, spelling: Spelling, made_of: Data) -> None:
    spelled = spell(recipe, spelling)
    inputs = inputs_of(recipe, made_of)
    args = spelled.arguments(inputs)
    source = spelled.module(*args)
    program = rewritten(door, spelled.module, args)
    # a rewrite that its own certificate stopped was stopped in time, but is a bug all the same
    assert not [site.reason for site in program.report.refused if "not equivalent" in site.reason], spelled.source
    fused = program.run(*args)
    if not program.report.fused:
        # a refusal names its reason, and leaves the program as it was
        assert all(site.reason for site in program.report.refused)
        torch.testing.assert_close(fused, source, rtol=0, atol=0, equal_nan=True)
        return
    exact, empty = exact_result(spelled, inputs)
    for rows in (empty, ~empty):
        assert_as_good(fused[rows], source[rows], exact[rows], moved=otherwise_rounded(spelled, args, rows))


#: Sizes to trace with, and others of the same N - M to run with.
TRACED = Sizes(batch=(2,), heads=4, kv_heads=2, rows=5, keys=7, depth=8, value_depth=6)
OTHERS = (replace(TRACED, batch=(3,), rows=9, keys=11), replace(TRACED, rows=2, keys=4))


@pytest.mark.parametrize("door", ["dynamo", "training IR"])
def test_one_graph_serves_every_size(door: str) -> None:
    @given(st.data())
    @settings(max_examples=settings().max_examples // 10)
    def check(data: st.DataObject) -> None:
        recipe = data.draw(recipes(st.just(TRACED)))
        spelled = spell(recipe, data.draw(spellings(recipe, unread=False)))
        program = rewritten(door, spelled.module, spelled.arguments(recipe.inputs()), dynamic=True)
        for other in OTHERS:
            _assert_serves(program, replace(spelled, recipe=replace(recipe, sizes=other)))

    check()


def _assert_serves(program: Rewritten, spelled: Spelled) -> None:
    inputs = spelled.recipe.inputs()
    args = spelled.arguments(inputs)
    exact, empty = exact_result(spelled, inputs)
    fused, source = program.run(*args), spelled.module(*args)
    for rows in (empty, ~empty):
        assert_as_good(fused[rows], source[rows], exact[rows], moved=otherwise_rounded(spelled, args, rows))


@given(st.data())
@settings(max_examples=max(10, settings().max_examples // 2))
def test_gradients_are_as_good_as_the_source_s(data: st.DataObject) -> None:
    recipe = data.draw(recipes(sizes()))
    spelled = spell(recipe, data.draw(spellings(recipe)))
    inputs = recipe.inputs().leaves()
    args = spelled.arguments(inputs)
    program = rewritten("dynamo", spelled.module, args)
    source_out = spelled.module(*args)
    towards = torch.randn(source_out.shape, generator=torch.Generator().manual_seed(0))
    try:
        source = _gradients(source_out, inputs, towards)
    except RuntimeError as error:
        # some spellings overwrite what autograd would need: those are no training programs
        if "modified by an inplace operation" not in str(error):
            raise
        reject()
    fused = _gradients(program.run(*spelled.arguments(inputs)), inputs, towards)
    exact = _exact_gradients(spelled, recipe.inputs(), towards)
    moved = double.otherwise_rounded(lambda random: _exact_gradients(spelled, nudged(recipe.inputs(), random), towards))
    for at, (ours, theirs, truth) in enumerate(zip(fused, source, exact, strict=True)):
        assert_as_good(ours, theirs, truth, moved=[lambda at=at, each=each: each()[at] for each in moved])


def _exact_gradients(spelled: Spelled, inputs: Inputs, towards: Tensor) -> tuple[Tensor, ...]:
    recipe, leaves = spelled.recipe, inputs.to(torch.float64).leaves()
    captures = tuple(leaves.captures[arg.name] for arg in recipe.args)
    out, _ = reference.attention(recipe.spec(torch.float64), Operands(leaves.query, leaves.key, leaves.value, captures))
    return _gradients(spelled.leave(out), leaves, towards)


def _gradients(out: Tensor, inputs: Inputs, towards: Tensor) -> tuple[Tensor, ...]:
    leaves = [x for x in inputs.tensors if x.requires_grad]
    return torch.autograd.grad(out, leaves, towards.to(out.dtype), materialize_grads=True)
